"""Entries for torch.hub.

    model = torch.hub.load("/path/to/this/checkout", "vit_small", pretrained="/path/to/checkpoint.pth", source="local")
    features = model(images)    # [B, 3, H, W] -> [B, N, D], row by row

torch.hub.list shows every public name here, so what these entries are made of is imported under private ones.
"""
import checkpoints as _checkpoints
import vision_transformer as _vision_transformer

dependencies = ["torch", "timm", "safetensors"]


def _entry(arch: str, pretrained: str, checkpoint_key: str, patch_size: int | None,
           kwargs: dict) -> _vision_transformer.VisionTransformer:
    if isinstance(pretrained, bool):
        raise ValueError(f"pretrained={pretrained}: give the path of a checkpoint, or leave it out for random weights")
    return _checkpoints.load_backbone(pretrained, checkpoint_key, arch, patch_size, random_weights=not pretrained,
                                      **kwargs)


def vit_tiny(pretrained: str = "", checkpoint_key: str = "teacher", patch_size: int | None = None, **kwargs):
    """ViT-Ti, 192 wide, in eval mode.

    Args:
        pretrained: any checkpoint that this project reads; empty gives random weights, and says so.
        checkpoint_key: network of a training run, teacher or student.
        patch_size: the file's own if not given, 16 without a file.
        kwargs: more of VisionTransformer's arguments, such as drop_path_rate.

    Raises:
        ValueError: the file is no checkpoint or does not fit, with what is wrong.
    """
    return _entry("vit_tiny", pretrained, checkpoint_key, patch_size, kwargs)


def vit_small(pretrained: str = "", checkpoint_key: str = "teacher", patch_size: int | None = None, **kwargs):
    """ViT-S, 384 wide; arguments as vit_tiny's."""
    return _entry("vit_small", pretrained, checkpoint_key, patch_size, kwargs)


def vit_base(pretrained: str = "", checkpoint_key: str = "teacher", patch_size: int | None = None, **kwargs):
    """ViT-B, 768 wide; arguments as vit_tiny's."""
    return _entry("vit_base", pretrained, checkpoint_key, patch_size, kwargs)
