"""Write a folder for timm's local-dir: or, once uploaded, hf-hub: (config.json, model.safetensors, README.md).

    write_timm_folder(*read_backbone("checkpoint.pth"), Path("vit"))
    model = timm.create_model("local-dir:vit", pretrained=True)     # timm 1.0.16 or later
"""
import json
import os
from pathlib import Path

import torch

from selfpatch.checkpoints.files import CheckpointError, write_checkpoint
from selfpatch.checkpoints.info import CheckpointInfo
from selfpatch.data.normalisation import IMAGENET_MEAN, IMAGENET_STD
from selfpatch.errors import printable
from selfpatch.method.vision_transformer import vit_pico
from selfpatch.whole_files import whole_folder

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
# options about the machine and its folders rather than the training
NOT_FOR_A_CARD = {"data_path", "output_dir", "init_weights", "knn_data", "knn_val_labels", "local_rank", "gpu", "rank",
                  "port", "dist_url", "dist_backend", "dist_timeout", "num_workers", "loader_timeout"}
CITATION = """\
@inproceedings{yun2022selfpatch,
  title     = {Patch-level Representation Learning for Self-supervised Vision Transformers},
  author    = {Yun, Sukmin and Lee, Hankook and Kim, Jaehyung and Shin, Jinwoo},
  booktitle = {CVPR},
  year      = {2022}
}"""


def timm_arch(info: CheckpointInfo) -> str:
    """Name timm's architecture; what else differs are arguments, see timm_arguments."""
    return f"{'vit_tiny' if info.arch == 'vit_pico' else info.arch}_patch16_224"


def timm_arguments(info: CheckpointInfo) -> dict:
    """Arguments of timm.create_model, beside the name, that reproduce this project's features."""
    arguments = {"num_classes": 0, "global_pool": ""}  # tokens [B, N, D] instead of a pooled vector
    if info.arch == "vit_pico":  # which timm does not have
        with torch.device("meta"):
            network = vit_pico()
        arguments |= {"embed_dim": network.embed_dim, "depth": len(network.blocks), "num_heads": network.num_heads}
    if not info.class_token:
        arguments["class_token"] = False
    if not info.final_norm:
        arguments["final_norm"] = False
    if info.patch_size != 16:
        arguments["patch_size"] = info.patch_size
    if info.grid * info.patch_size != 224:
        arguments["img_size"] = info.grid * info.patch_size
    if info.num_heads:
        arguments["num_heads"] = info.num_heads
    return arguments


def timm_config(info: CheckpointInfo) -> dict:
    """Content of config.json: the architecture, its arguments, and the preparation of images."""
    side, arguments = info.grid * info.patch_size, timm_arguments(info)
    return {
        "architecture": timm_arch(info), "num_classes": arguments.pop("num_classes"), "num_features": info.embed_dim,
        "global_pool": arguments["global_pool"], "model_args": arguments,
        "pretrained_cfg": {
            "num_classes": 0, "input_size": [3, side, side], "fixed_input_size": True, "pool_size": None,
            # DINO's evaluation, as in evaluation/image_features.py: the short side to 256/224 of the crop, bicubic
            "crop_pct": 0.875, "crop_mode": "center", "interpolation": "bicubic",
            "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD),
            "first_conv": "patch_embed.proj", "classifier": "head"}}


def card_options(args: dict) -> dict[str, str]:
    """Select the options of a run for a model card, as text: no paths, addresses or objects."""
    def is_plain(value: object) -> bool:
        if isinstance(value, (list, tuple)):
            return all(map(is_plain, value))
        return isinstance(value, (bool, int, float)) or isinstance(value, str) and not set(value) & set("/\\")

    return {printable(name): printable(" ".join(map(str, value)) if isinstance(value, (list, tuple)) else value)
            for name, value in sorted(args.items(), key=str)
            if isinstance(name, str) and name not in NOT_FOR_A_CARD and is_plain(value)}


def describe_network(state: dict[str, torch.Tensor], info: CheckpointInfo) -> str:
    """Describe the network and its origin in two lines for the card."""
    side, millions = info.grid * info.patch_size, sum(tensor.numel() for tensor in state.values()) / 1e6
    parts = [f"{info.arch}, patch size {info.patch_size}", f"{millions:.1f} million parameters",
             f"images of {side}×{side} pixels", f"with{'' if info.class_token else 'out'} a class token",
             f"with{'' if info.final_norm else 'out'} a final norm"]
    source = [info.kind, *([f"network {info.key}"] if info.key else []),
              *([f"epoch {info.epoch}"] if info.epoch is not None else [])]
    by = " pretrained without labels by SelfPatch" if info.kind.startswith("SelfPatch") else ""
    return (f"A Vision Transformer{by}: {', '.join(parts)}.\n"
            f"Converted from `{printable(info.path.name).replace('`', chr(39))}` ({', '.join(source)}).")


def model_card(state: dict[str, torch.Tensor], info: CheckpointInfo, name: str) -> str:
    """Write a model card in Markdown from the metadata, with a list of what the author has to add."""
    tokens = info.grid ** 2 + info.class_token
    # an indented block shows any text as it is
    listed = "\n".join(f"    {option}: {value}" for option, value in card_options(info.args).items())
    first = ", the class token first" if info.class_token else ""
    return f"""\
---
library_name: timm
pipeline_tag: image-feature-extraction
tags:
- timm
---
# {printable(name)}

{describe_network(state, info)}

## Use

```python
import timm
model = timm.create_model("hf-hub:USER/NAME", pretrained=True).eval()    # a local copy: "local-dir:/path/to/folder"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
tokens = model(transform(image)[None])    # of a PIL image in RGB: [1, {tokens}, {info.embed_dim}], row by row{first}
```

`local-dir:` needs timm 1.0.16 or later.

## Options of the run

{listed or "The checkpoint does not record them."}

## To be added by the author

- the licence of the weights (`license:` in the header of this file)
- the training data
- results, and what the model should not be used for
{f'''
## Citation

```bibtex
{CITATION}
```
''' if info.kind.startswith("SelfPatch") else ""}"""


def check_timm_folder(output: Path, source: Path, overwrite: bool) -> None:
    """Reject a folder that cannot or should not be replaced.

    Raises:
        CheckpointError: it is a file, contains the input or foreign files, or exists without overwrite.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise CheckpointError(f"{output} is a file, and --to timm writes a folder of that name: give another name, or "
                              "one that ends in .pth or .safetensors")
    if source.exists() and source.resolve().is_relative_to(output.resolve()):
        raise CheckpointError(f"{output} holds the input: give the output another name")
    names = sorted(os.listdir(output))
    if others := [name for name in names if name not in (CONFIG, WEIGHTS, CARD)]:
        raise CheckpointError(f"{output} holds other files, such as {others[0]}: give the name of a new folder")
    if names and not overwrite:
        raise CheckpointError(f"{output} exists already: give another name, or --overwrite")


def write_timm_folder(state: dict[str, torch.Tensor], info: CheckpointInfo, output: Path) -> None:
    """Write the folder whole or not at all, replacing an earlier one; call check_timm_folder first.

    Args:
        state, info: result of loading.read_backbone.

    Raises:
        WriteError: the disk is full, or the folder cannot be written.
    """
    metadata = {"num_heads": str(info.num_heads)} if info.num_heads else None
    with whole_folder(output) as folder:
        write_checkpoint(state, folder / WEIGHTS, metadata=metadata)
        (folder / CONFIG).write_text(json.dumps(timm_config(info), indent=2) + "\n", encoding="utf-8")
        name = Path(os.path.realpath(output)).name
        (folder / CARD).write_text(model_card(state, info, name), encoding="utf-8")
