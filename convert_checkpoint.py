"""Convert any checkpoint that this project loads to the format of another library.

    python convert_checkpoint.py checkpoint.pth backbone.safetensors --to backbone
    python convert_checkpoint.py checkpoint.pth timm.pth --to timm      # prints the timm.create_model call for it
    python convert_checkpoint.py checkpoint.pth vit.pth --to mmseg      # layers.{i}.ln1, layers.{i}.attn.attn.…
    python convert_checkpoint.py segmenter.pth backbone.pth --to backbone               # and back to our names
    python convert_checkpoint.py segmenter.pth ours.pth --to mmdet --keep_heads         # the whole model, our names

The output is read back and compared before the job reports success. Existing files are kept without --overwrite.
A number of attention heads that the architecture alone does not tell, such as the 12 of MoCo v3's ViT-S, is recorded in
the output; give it with --num_heads where the input does not tell it either.
"""
import argparse
import os
from pathlib import Path

import torch

from checkpoint_files import CheckpointError, write_checkpoint
from checkpoint_layouts import to_mmseg_names
from checkpoints import CheckpointInfo, read_backbone, resolve_path
from errors import ArgumentParser, run_main

FORMATS = {
    "backbone": "the backbone's tensors alone",
    "timm": "the same, and the call that loads it",
    "mmdet": "our names in the state_dict wrapper of mmdet and mmseg",
    "mmseg": "the names of mmseg's own VisionTransformer in that wrapper",
}


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description="Convert a checkpoint for another library.")
    parser.add_argument("input", type=os.path.expanduser,
                        help="any checkpoint: a training run, a backbone, a detector, a segmenter")
    parser.add_argument("output", type=os.path.expanduser,
                        help="file to write: .pth, or .safetensors for backbone and timm")
    parser.add_argument("--to", required=True, choices=list(FORMATS),
                        help="; ".join(f"{name}: {text}" for name, text in FORMATS.items()))
    parser.add_argument("--checkpoint_key", default="teacher", help="network of a training run: teacher or student")
    parser.add_argument("--num_heads", type=int,
                        help="attention heads, where the line about the input says another number than is true")
    parser.add_argument("--keep_heads", action="store_true",
                        help="with mmdet or mmseg, from a detector or segmenter: keep its neck and heads unchanged")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output file")
    return parser


def check_paths(source: Path, output: Path, to: str, keep_heads: bool = False, overwrite: bool = False) -> None:
    """Reject an output that cannot or should not be written, before the input is read.

    Raises:
        CheckpointError: see the messages.
    """
    with_wrapper = to in ("mmdet", "mmseg")
    suffixes = (".pth", ".pt") if with_wrapper else (".pth", ".pt", ".safetensors")
    if output.suffix not in suffixes:
        raise CheckpointError(f"{output}: --to {to} is written as {' or '.join(suffixes)}")
    if not output.parent.is_dir():
        raise CheckpointError(f"{output.parent} is not a directory: create it first")
    if output.exists() and source.exists() and output.samefile(source):
        raise CheckpointError(f"{output} is the input: give the output another name")
    if output.exists() and not overwrite:
        raise CheckpointError(f"{output} exists already: give another name, or --overwrite")
    if keep_heads and not with_wrapper:
        raise CheckpointError(f"--keep_heads requires --to mmdet or mmseg, not {to}")


def convert(state: dict[str, torch.Tensor], info: CheckpointInfo, to: str, keep_heads: bool = False,
            with_metadata: bool = False) -> dict:
    """Convert a backbone to the content of a file in another format.

    Args:
        state, info: as checkpoints.read_backbone returns them.
        to: one of FORMATS.
        keep_heads: with mmdet and mmseg, convert the whole detector or segmenter that contains the backbone.
        with_metadata: the file has a header of its own for the number of attention heads. Without one, backbone and
            timm hold the tensors under state_dict if there is such a number to record.

    Raises:
        CheckpointError: keep_heads, but the file is neither a detector nor a segmenter.
    """
    if to == "mmseg":
        state = to_mmseg_names(state)
    if to in ("backbone", "timm") and (with_metadata or info.num_heads is None):
        return state
    if keep_heads:
        heads = ("neck.", "decode_head.", "rpn_head.", "roi_head.")
        if not any(name.startswith(heads) for name in info.other_tensors):
            raise CheckpointError(f"--keep_heads: {info.path} is a {info.kind}, not a detector or a segmenter")
        state = {f"backbone.{name}": tensor for name, tensor in state.items()} | info.other_tensors
    meta = {"source": info.path.name, "arch": info.arch, "patch_size": info.patch_size, "epoch": info.epoch}
    if info.num_heads is not None:
        meta["num_heads"] = info.num_heads
    return {"meta": meta, "state_dict": state}


def loading_code(info: CheckpointInfo, to: str, keep_heads: bool, output: Path) -> str:
    """The line of Python or of a config that loads the output."""
    path = str(output)
    if to == "timm":
        options = ["num_classes=0", "global_pool=''"]  # tokens [B, N, D] instead of a pooled vector
        if not info.class_token:
            options.append("class_token=False")
        if not info.final_norm:
            options.append("final_norm=False")
        if info.patch_size != 16:
            options.append(f"patch_size={info.patch_size}")
        if info.grid * info.patch_size != 224:
            options.append(f"img_size={info.grid * info.patch_size}")
        if info.num_heads:
            options.append(f"num_heads={info.num_heads}")
        return f"timm.create_model('{info.arch}_patch16_224', {', '.join(options)}, checkpoint_path={path!r})"
    if to == "backbone":
        return f"checkpoints.load_backbone({path!r})"
    if keep_heads:
        heads = f"model = dict(backbone=dict(num_heads={info.num_heads})); " if info.num_heads else ""
        return f"{heads}load_from = {path!r}"
    num_heads = f"num_heads={info.num_heads}, " if info.num_heads else ""
    return f"backbone=dict({num_heads}init_cfg=dict(type='Pretrained', checkpoint={path!r}))"


def convert_file(source: str | Path, output: str | Path, to: str, key: str = "teacher", keep_heads: bool = False,
                 overwrite: bool = False, num_heads: int | None = None) -> None:
    """Convert a file, verify the result, and print how to load it.

    Args:
        source: any checkpoint, see checkpoints.read_backbone.
        output: file to write.
        to: one of FORMATS.
        key: network of a training run, teacher or student.
        keep_heads: see convert.
        overwrite: replace an existing output.
        num_heads: attention heads; None for what the input says.

    Raises:
        CheckpointError: the input cannot be read, or the output cannot be written.
    """
    output = Path(output)
    try:
        check_paths(resolve_path(source), output, to, keep_heads, overwrite)
    except OSError as error:  # a folder that may not be read
        raise CheckpointError(str(error)) from None
    state, info = read_backbone(source, key)
    if num_heads is not None:
        info = info.with_heads(num_heads, "--num_heads")
    print(f"loaded {info}")
    header = output.suffix == ".safetensors"
    metadata = {"num_heads": str(info.num_heads)} if header and info.num_heads else None
    write_checkpoint(convert(state, info, to, keep_heads, header), output, metadata=metadata)
    written, written_info = read_backbone(output)
    if (written.keys() != state.keys() or written_info.num_heads != info.num_heads
            or not all(torch.equal(written[name], state[name]) for name in state)):
        raise CheckpointError(f"{output} differs from what was written to it: the disk may be full or failing")
    print(f"wrote {written_info}")
    print(f"load it with: {loading_code(info, to, keep_heads, output)}")


def main(args: argparse.Namespace) -> None:
    convert_file(args.input, args.output, args.to, args.checkpoint_key, args.keep_heads, args.overwrite,
                 args.num_heads)


if __name__ == "__main__":
    run_main(main, get_args_parser().parse_args())
