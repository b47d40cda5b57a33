"""Convert a checkpoint of any kind that loads here into the form that another library reads.

    python convert_checkpoint.py checkpoint.pth backbone.safetensors --to backbone
    python convert_checkpoint.py checkpoint.pth timm.pth --to timm      # prints the timm.create_model line for it
    python convert_checkpoint.py checkpoint.pth vit.pth --to mmseg      # layers.{i}.ln1, layers.{i}.attn.attn.…
    python convert_checkpoint.py segmenter.pth backbone.pth --to backbone               # and back to our names
    python convert_checkpoint.py segmenter.pth ours.pth --to mmdet --keep_heads         # the whole model, our names

What is written is read back and compared before the job says so. Nothing is overwritten without --overwrite.
"""
import argparse
import sys
from pathlib import Path

import torch

from checkpoint_files import CheckpointError, write_checkpoint
from checkpoints import CheckpointInfo, checkpoint_file, read_backbone, to_mmseg_names

FORMATS = {
    "backbone": "the backbone's tensors alone",
    "timm": "the same, with the line that loads it",
    "mmdet": "our names in mmdet's and mmseg's state_dict wrapper",
    "mmseg": "the names of mmseg's own VisionTransformer in that wrapper",
}


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Convert a checkpoint for another library.")
    parser.add_argument("input", help="checkpoint of any kind: a training run, a backbone, a detector, a segmenter")
    parser.add_argument("output", help="file to write: .pth, or .safetensors for backbone and timm")
    parser.add_argument("--to", required=True, choices=list(FORMATS),
                        help="; ".join(f"{name}: {text}" for name, text in FORMATS.items()))
    parser.add_argument("--checkpoint_key", default="teacher", help="network of a training run: teacher or student")
    parser.add_argument("--keep_heads", action="store_true",
                        help="with mmdet or mmseg, from a detector or segmenter: keep its neck and heads as they are")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file if it is there")
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Refuse what cannot be written before anything is read."""
    output = Path(args.output)
    wrapped = args.to in ("mmdet", "mmseg")
    suffixes = (".pth", ".pt") if wrapped else (".pth", ".pt", ".safetensors")
    if output.suffix not in suffixes:
        raise CheckpointError(f"{output}: --to {args.to} is written as {' or '.join(suffixes)}")
    if not output.parent.is_dir():
        raise CheckpointError(f"{output.parent} is no folder: make it first")
    source = checkpoint_file(args.input)
    if output.exists() and source.exists() and output.samefile(source):
        raise CheckpointError(f"{output} is the input: give the output another name")
    if output.exists() and not args.overwrite:
        raise CheckpointError(f"{output} is already there: give another name, or --overwrite")
    if args.keep_heads and not wrapped:
        raise CheckpointError(f"--keep_heads goes with --to mmdet or mmseg, not with {args.to}")


def convert(state: dict[str, torch.Tensor], info: CheckpointInfo, to: str, keep_heads: bool = False) -> dict:
    """What to save: a backbone's state dict under our names, in the form that `to` names.

    Args:
        keep_heads: with mmdet and mmseg, the whole detector or segmenter that the backbone stands in.
    """
    if to == "mmseg":
        state = to_mmseg_names(state)
    if to in ("backbone", "timm"):
        return state
    if keep_heads:
        if not any(name.startswith(("neck.", "decode_head.", "rpn_head.", "roi_head.")) for name in info.beside):
            raise CheckpointError(f"--keep_heads: {info.path} is a {info.kind}, not a detector or a segmenter")
        state = {f"backbone.{name}": tensor for name, tensor in state.items()} | info.beside
    meta = {"source": info.path.name, "arch": info.arch, "patch_size": info.patch_size, "epoch": info.epoch}
    return {"meta": meta, "state_dict": state}


def how_to_load(info: CheckpointInfo, to: str, keep_heads: bool, output: Path) -> str:
    """The line of code or config that reads the output."""
    if to == "timm":
        options = ["num_classes=0", "global_pool=''"]  # the tokens [B, N, D], not a pooled vector
        if not info.class_token:
            options.append("class_token=False")
        if not info.final_norm:
            options.append("final_norm=False")
        if info.patch_size != 16:
            options.append(f"patch_size={info.patch_size}")
        if info.grid * info.patch_size != 224:
            options.append(f"img_size={info.grid * info.patch_size}")
        return f"timm.create_model('{info.arch}_patch16_224', {', '.join(options)}, checkpoint_path='{output}')"
    if to == "backbone":
        return f"checkpoints.load_backbone('{output}')"
    if keep_heads:
        return f"load_from = '{output}'"
    return f"backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='{output}'))"


def main(args: argparse.Namespace) -> None:
    check_args(args)
    state, info = read_backbone(args.input, args.checkpoint_key)
    print(f"loaded {info}")
    output = Path(args.output)
    write_checkpoint(convert(state, info, args.to, args.keep_heads), output)
    again, written = read_backbone(output)
    if again.keys() != state.keys() or not all(torch.equal(again[name], state[name]) for name in state):
        raise CheckpointError(f"{output} does not read back as it was written: the disk may be full or failing")
    print(f"wrote {written}")
    print(f"load it with: {how_to_load(info, args.to, args.keep_heads, output)}")


if __name__ == "__main__":
    try:
        main(get_args_parser().parse_args())
    except (CheckpointError, OSError) as error:
        print(f"convert_checkpoint.py: error: {error}", file=sys.stderr)
        sys.exit(2)
