"""Entry points for torch.hub.

    model = torch.hub.load("/path/to/this/checkout", "vit_small", pretrained="/path/to/checkpoint.pth", source="local")
    features = model(images)    # [B, 3, H, W] -> [B, N, D], row by row

torch.hub.list shows every public name of this module, so the imports have private names.
"""
from pathlib import Path as _Path

from selfpatch.checkpoints import loading as _loading

dependencies = ["torch", "timm", "safetensors"]

if (_found := _Path(_loading.__file__).resolve().parents[2]) != (_here := _Path(__file__).resolve().parent):
    raise ImportError(f"the package selfpatch of {_found} is loaded already, so that of {_here} cannot be: use one of "
                      "them in a process")


def vit_tiny(pretrained: str = "", checkpoint_key: str = "teacher", patch_size: int | None = None,
             arch: str = "vit_tiny", **kwargs):
    """ViT-Ti, embedding dimension 192, in eval mode.

    Args:
        pretrained: any checkpoint that this project reads; empty gives random weights and prints a line saying so.
        checkpoint_key: network of a training run, teacher or student.
        patch_size: default: the file's own, or 16 without a file.
        arch: the network, which each entry sets.
        kwargs: further arguments of VisionTransformer, such as drop_path_rate.

    Raises:
        ValueError: the file is not a checkpoint or does not fit.
    """
    if isinstance(pretrained, bool):
        raise ValueError(f"pretrained={pretrained}: give the path of a checkpoint, or omit it for random weights")
    return _loading.load_backbone(pretrained, checkpoint_key, arch, patch_size, random_weights=not pretrained, **kwargs)


def vit_small(*args, **kwargs):
    """ViT-S, embedding dimension 384; see vit_tiny for the arguments."""
    return vit_tiny(*args, arch="vit_small", **kwargs)


def vit_base(*args, **kwargs):
    """ViT-B, embedding dimension 768; see vit_tiny for the arguments."""
    return vit_tiny(*args, arch="vit_base", **kwargs)
