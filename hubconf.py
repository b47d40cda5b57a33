"""Entry points for torch.hub.

    model = torch.hub.load("/path/to/this/checkout", "vit_small", pretrained="/path/to/checkpoint.pth", source="local")
    features = model(images)    # [B, 3, H, W] -> [B, N, D], row by row

torch.hub.list shows every public name of this module, so the imports have private names.
"""
import checkpoints as _checkpoints
import vision_transformer as _vision_transformer

dependencies = ["torch", "timm", "safetensors"]


def _load(arch: str, pretrained: str, checkpoint_key: str, patch_size: int | None,
          kwargs: dict) -> _vision_transformer.VisionTransformer:
    if isinstance(pretrained, bool):
        raise ValueError(f"pretrained={pretrained}: give the path of a checkpoint, or omit it for random weights")
    return _checkpoints.load_backbone(pretrained, checkpoint_key, arch, patch_size, random_weights=not pretrained,
                                      **kwargs)


def vit_tiny(pretrained: str = "", checkpoint_key: str = "teacher", patch_size: int | None = None, **kwargs):
    """ViT-Ti, embedding dimension 192, in eval mode.

    Args:
        pretrained: any checkpoint that this project reads; empty gives random weights and prints a line saying so.
        checkpoint_key: network of a training run, teacher or student.
        patch_size: default: the file's own, or 16 without a file.
        kwargs: further arguments of VisionTransformer, such as drop_path_rate.

    Raises:
        ValueError: the file is not a checkpoint or does not fit.
    """
    return _load("vit_tiny", pretrained, checkpoint_key, patch_size, kwargs)


def vit_small(pretrained: str = "", checkpoint_key: str = "teacher", patch_size: int | None = None, **kwargs):
    """ViT-S, embedding dimension 384; see vit_tiny for the arguments."""
    return _load("vit_small", pretrained, checkpoint_key, patch_size, kwargs)


def vit_base(pretrained: str = "", checkpoint_key: str = "teacher", patch_size: int | None = None, **kwargs):
    """ViT-B, embedding dimension 768; see vit_tiny for the arguments."""
    return _load("vit_base", pretrained, checkpoint_key, patch_size, kwargs)
