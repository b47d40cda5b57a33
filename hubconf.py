"""Entry points for torch.hub.

    model = torch.hub.load("/path/to/this/checkout", "vit_small", pretrained="/path/to/checkpoint.pth", source="local")
    features = model(images)    # [B, 3, H, W] -> [B, N, D], row by row

force_reload=True takes effect in the next process. torch.hub.list shows every public name: imports have private ones.
"""
from pathlib import Path as _Path

from selfpatch.checkpoints import loading as _loading

dependencies = ["torch", "timm", "safetensors"]

if (_found := _Path(_loading.__file__).resolve().parents[2]) != (_here := _Path(__file__).resolve().parent):
    raise ImportError(f"the package selfpatch of {_found} is loaded already, so that of {_here} cannot be: use one of "
                      "them in a process")


def _load(arch, pretrained, key, patch_size, **kwargs):
    if isinstance(pretrained, bool):
        raise ValueError(f"pretrained={pretrained}: give the path of a checkpoint, or omit it for random weights")
    return _loading.load_backbone(pretrained, key, arch, patch_size, random_weights=not pretrained, **kwargs)


def vit_tiny(pretrained: str = "", checkpoint_key: str = "teacher", patch_size: int | None = None, **kwargs):
    """ViT-Ti, embedding dimension 192, in eval mode.

    pretrained is any checkpoint that this project reads, or empty for random weights; checkpoint_key a network of a
    training run, teacher or student; patch_size by default the file's, or 16. kwargs are VisionTransformer's, such as
    drop_path_rate. Raises ValueError if the file is not a checkpoint or does not fit.
    """
    return _load("vit_tiny", pretrained, checkpoint_key, patch_size, **kwargs)


def vit_small(pretrained: str = "", checkpoint_key: str = "teacher", patch_size: int | None = None, **kwargs):
    """ViT-S, embedding dimension 384; see vit_tiny."""
    return _load("vit_small", pretrained, checkpoint_key, patch_size, **kwargs)


def vit_base(pretrained: str = "", checkpoint_key: str = "teacher", patch_size: int | None = None, **kwargs):
    """ViT-B, embedding dimension 768; see vit_tiny."""
    return _load("vit_base", pretrained, checkpoint_key, patch_size, **kwargs)
