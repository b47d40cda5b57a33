"""Convert any checkpoint that this project loads to the format of another library.

    python convert_checkpoint.py checkpoint.pth backbone.safetensors --to backbone
    python convert_checkpoint.py runs/one weights.safetensors --to selfpatch --half     # to release, with the head
    python convert_checkpoint.py checkpoint.pth timm.pth --to timm      # prints the timm.create_model call for it
    python convert_checkpoint.py checkpoint.pth vit --to timm           # a folder: local-dir:, Hugging Face Hub
    python convert_checkpoint.py checkpoint.pth vit.onnx --to onnx      # pip install onnx onnxscript onnxruntime
    python convert_checkpoint.py checkpoint.pth vit.pth --to mmseg      # layers.{i}.ln1, layers.{i}.attn.attn.…
    python convert_checkpoint.py segmenter.pth backbone.pth --to backbone               # and back to our names
    python convert_checkpoint.py segmenter.pth ours.pth --to mmdet --keep_heads         # the whole model, our names

The output is read back and compared before the job reports success. Existing files are kept without --overwrite.
A number of attention heads that the architecture alone does not tell, such as the 12 of MoCo v3's ViT-S, is recorded in
the output; give it with --num_heads where the input does not tell it either.
"""
import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P leaves it out
import torch

from selfpatch.checkpoints.files import CheckpointError, write_checkpoint
from selfpatch.checkpoints.info import CheckpointInfo
from selfpatch.checkpoints.layouts import to_mmseg_names
from selfpatch.checkpoints.loading import build_backbone, read_backbone
from selfpatch.checkpoints.onnx_file import INPUT, check_packages, write_onnx
from selfpatch.checkpoints.published import FORMS, resolve_path
from selfpatch.checkpoints.timm_folder import WEIGHTS, check_timm_folder, timm_arch, timm_arguments, write_timm_folder
from selfpatch.errors import ArgumentParser, run_main

FORMATS = {
    "backbone": "the backbone's tensors alone",
    "selfpatch": "backbone and SelfPatch head of a run, without its projection heads and optimizer",
    "timm": "the backbone's tensors, and the call that loads them; a name that is not a file's is a folder that timm "
            "and the Hugging Face Hub read",
    "onnx": "the network for images of whole patches, in batches of any number",
    "mmdet": "our names in the state_dict wrapper of mmdet and mmseg",
    "mmseg": "the names of mmseg's own VisionTransformer in that wrapper",
}
SUFFIXES = {"onnx": (".onnx",), "mmdet": (".pth", ".pt"), "mmseg": (".pth", ".pt"),
            "backbone": (".pth", ".pt", ".safetensors"), "selfpatch": (".pth", ".pt", ".safetensors"),
            "timm": (".pth", ".pt", ".safetensors")}
# a name for --to timm that ends otherwise is that of a folder
FILES = (*SUFFIXES["timm"], *SUFFIXES["onnx"], ".bin", ".ckpt", ".pkl", ".h5", ".npz", ".tar", ".zip")
FORMAT_OPTIONS = {"keep_heads": ("mmdet", "mmseg"), "half": ("backbone", "selfpatch"), "image_size": ("onnx",)}


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description="Convert a checkpoint for another library.")
    parser.add_argument("input", type=os.path.expanduser,
                        help=f"{FORMS}: a training run, a backbone, a detector, a segmenter")
    parser.add_argument("output", type=os.path.expanduser,
                        help="file to write: .pth, .safetensors for backbone, selfpatch and timm, .onnx for onnx; "
                             "for timm, any other name is a folder")
    parser.add_argument("--to", required=True, choices=list(FORMATS),
                        help="; ".join(f"{name}: {text}" for name, text in FORMATS.items()))
    parser.add_argument("--checkpoint_key", default="teacher", help="network of a training run: teacher or student")
    parser.add_argument("--num_heads", type=int,
                        help="attention heads, where the line about the input says another number than is true")
    parser.add_argument("--keep_heads", action="store_true",
                        help="with mmdet or mmseg, from a detector or segmenter: keep its neck and heads unchanged")
    parser.add_argument("--half", action="store_true",
                        help="with backbone or selfpatch: in float16, half the size; every job loads it as float32")
    parser.add_argument("--image_size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"),
                        help="with onnx: fix the size of the images; default: any multiples of the patch size")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser


def check_paths(source: Path, output: Path, to: str, overwrite: bool = False) -> None:
    """Raise CheckpointError if the output cannot or should not be written, before the input is read."""
    suffixes = SUFFIXES[to]
    if output.suffix not in suffixes and not is_folder(output, to):
        folder = ", or with another name as a folder" if to == "timm" else ""
        raise CheckpointError(f"{output}: --to {to} is written as {' or '.join(suffixes)}{folder}")
    if not output.parent.is_dir():
        raise CheckpointError(f"{output.parent} is not a directory: create it first")
    if is_folder(output, to):
        check_timm_folder(output, source, overwrite)
        return
    if output.is_dir():
        raise CheckpointError(f"{output} is a folder, and --to {to} with a suffix writes a file: give another name")
    if output.exists() and source.exists() and output.samefile(source):
        raise CheckpointError(f"{output} is the input: give the output another name")
    if output.exists() and not overwrite:
        raise CheckpointError(f"{output} exists already: give another name, or --overwrite")


def is_folder(output: str | Path, to: str) -> bool:
    """Whether the output is a folder for timm: a name that does not end like a file's is, such as vit.v2."""
    return to == "timm" and Path(output).suffix.lower() not in FILES


def convert(state: dict[str, torch.Tensor], info: CheckpointInfo, to: str, keep_heads: bool = False,
            with_metadata: bool = False) -> dict:
    """Convert a backbone to the content of a file in another format.

    Args:
        state, info: as loading.read_backbone returns them.
        to: one of FORMATS.
        keep_heads: with mmdet and mmseg, convert the whole detector or segmenter that contains the backbone.
        with_metadata: the file has a header for the number of attention heads. Without one, backbone and timm hold the
            tensors under state_dict if there is such a number to record.

    Raises:
        CheckpointError: the file has no SelfPatch head to write, or no heads to keep.
    """
    if to == "mmseg":
        state = to_mmseg_names(state)
    if to == "selfpatch":
        if not info.has_selfpatch_head:
            raise CheckpointError(f"--to selfpatch: {info.path} is a {info.kind} without a SelfPatch head (ca_head); "
                                  "use --to backbone")
        head = {name: tensor for name, tensor in info.other_tensors.items() if name.startswith("ca_head.")}
        state = {f"backbone.{name}": tensor for name, tensor in state.items()} | head
    if with_metadata or to in ("backbone", "timm") and info.num_heads is None:
        return state
    if keep_heads:
        heads = ("neck.", "decode_head.", "rpn_head.", "roi_head.")
        if not any(name.startswith(heads) for name in info.other_tensors):
            raise CheckpointError(f"--keep_heads: {info.path} is a {info.kind}, not a detector or a segmenter")
        state = {f"backbone.{name}": tensor for name, tensor in state.items()} | info.other_tensors
    meta = {"source": info.path.name, "arch": info.arch, "patch_size": info.patch_size, "epoch": info.epoch}
    if info.num_heads is not None:
        meta["num_heads"] = info.num_heads
    if to == "selfpatch":
        meta["k_num"] = info.k_num
    return {"meta": meta, "state_dict": state}


def to_half(content: dict) -> dict:
    """Convert floating-point tensors to float16, also those under state_dict.

    Raises:
        CheckpointError: a tensor has values outside float16's range.
    """
    half = {name: to_half(value) if name == "state_dict" else
            value.half() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in content.items()}
    for name, value in half.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not value.isfinite().all():
            raise CheckpointError(f"--half: {name} has values outside float16's range")
    return half


def loading_code(info: CheckpointInfo, to: str, keep_heads: bool, output: Path) -> str:
    """Return the line of Python or of a config that loads the output."""
    path = str(output)
    if is_folder(output, to):
        return f"timm.create_model({f'local-dir:{path}'!r}, pretrained=True)"
    if to == "timm":
        options = [f"{name}={value!r}" for name, value in timm_arguments(info).items()]
        return f"timm.create_model('{timm_arch(info)}', {', '.join(options)}, checkpoint_path={path!r})"
    if to == "onnx":
        return f"onnxruntime.InferenceSession({path!r}).run(None, {{{INPUT!r}: images}})"
    if to == "selfpatch":
        return f"model, info = selfpatch.load_with_info({path!r}); head = selfpatch.build_head(info)"
    if to == "backbone":
        return f"selfpatch.load_backbone({path!r})"
    if keep_heads:
        heads = f"model = dict(backbone=dict(num_heads={info.num_heads})); " if info.num_heads else ""
        return f"{heads}load_from = {path!r}"
    num_heads = f"num_heads={info.num_heads}, " if info.num_heads else ""
    return f"backbone=dict({num_heads}init_cfg=dict(type='Pretrained', checkpoint={path!r}))"


def convert_file(source: str | Path, output: str | Path, to: str, key: str = "teacher", overwrite: bool = False,
                 num_heads: int | None = None, **options) -> None:
    """Convert a file, verify the result, and print how to load it.

    Args:
        source: as in loading.read_backbone.
        output: file, or folder for timm, to write.
        to: one of FORMATS.
        key: network of a training run, teacher or student.
        overwrite: replace an existing output.
        num_heads: attention heads; None for what the input says.
        options: of single formats (FORMAT_OPTIONS): keep_heads, see convert; half, to write float16; image_size, the
            only height and width of an ONNX file's images, by default any multiples of the patch size.

    Raises:
        ConfigError: a package that --to onnx needs is not installed, or image_size does not fit.
        CheckpointError: the input cannot be read, the output should not be replaced, or an option is of other formats.
        WriteError: the output cannot be written.
    """
    output = Path(output)
    for name, value in options.items():
        if value and to not in (formats := FORMAT_OPTIONS[name]):
            raise CheckpointError(f"--{name} requires --to {' or '.join(formats)}, not {to}")
    try:
        source = resolve_path(source)
        check_paths(source, output, to, overwrite)
    except OSError as error:  # a folder that may not be read
        raise CheckpointError(str(error)) from None
    if to == "onnx":
        check_packages()
    state, info = read_backbone(source, key)
    if num_heads is not None:
        info = info.with_heads(num_heads, "--num_heads")
    print(f"loaded {info}")
    if to == "onnx":
        write_onnx_file(state, info, output, options.get("image_size"))
    elif is_folder(output, to):
        write_timm_folder(state, info, output)
        print(f"wrote {read_back(state, info, output / WEIGHTS)}")
        print(f"complete {output / 'README.md'} before you upload the folder")
    else:
        print(f"wrote {write_file(state, info, output, to, options)}")
    print(f"load it with: {loading_code(info, to, options.get('keep_heads', False), output)}")


def write_file(state: dict[str, torch.Tensor], info: CheckpointInfo, output: Path, to: str,
               options: dict) -> CheckpointInfo:
    """Write a .pth or .safetensors file, read it back, and return its metadata; arguments as for convert_file."""
    header = output.suffix == ".safetensors"
    recorded = {"num_heads": info.num_heads, "k_num": info.k_num if to == "selfpatch" else None}
    metadata = {name: str(number) for name, number in recorded.items() if number} if header else None
    content = convert(state, info, to, options.get("keep_heads", False), header)
    if options.get("half"):
        content, state = to_half(content), {name: tensor.half().float() for name, tensor in state.items()}
    write_checkpoint(content, output, metadata=metadata)
    others = {name: tensor for name, tensor in content.get("state_dict", content).items() if name in info.other_tensors}
    return read_back(state, info, output, others)


def write_onnx_file(state: dict[str, torch.Tensor], info: CheckpointInfo, output: Path,
                    image_size: tuple[int, int] | None) -> None:
    """Write an ONNX file and print how far its features are from the network's."""
    metadata = {"arch": info.arch, "patch_size": str(info.patch_size), "source": info.path.name}
    difference = write_onnx(build_backbone(state, info), output, image_size, metadata)
    compared = (f"features differ by at most {difference:.1e} from the network's" if difference is not None else
                "not compared with the network, since onnxruntime is not installed: pip install onnxruntime")
    height, width = image_size or (f"rows·{info.patch_size}", f"columns·{info.patch_size}")
    print(f"wrote {output}: images [batch, 3, {height}, {width}], {compared}")


def read_back(state: dict[str, torch.Tensor], info: CheckpointInfo, path: Path,
              others: dict[str, torch.Tensor] | None = None) -> CheckpointInfo:
    """Return the metadata of a file that was written, after a comparison with what it should hold.

    Raises:
        CheckpointError: it does not hold the tensors of state, those of others beside them, or another number of
            attention heads.
    """
    written, written_info = read_backbone(path)
    expected, found = state | (others or {}), written_info.other_tensors | written
    if (written.keys() != state.keys() or not expected.keys() <= found.keys()
            or info.num_heads not in (None, written_info.num_heads)
            or not all(torch.equal(found[name], tensor) for name, tensor in expected.items())):
        raise CheckpointError(f"{path} differs from what was written to it: the disk may be full or failing")
    return written_info


def main(args: argparse.Namespace) -> None:
    convert_file(args.input, args.output, args.to, args.checkpoint_key, args.overwrite, args.num_heads,
                 keep_heads=args.keep_heads, half=args.half, image_size=args.image_size)


if __name__ == "__main__":
    run_main(main, get_args_parser())
