"""SelfPatch: patch-level self-supervised pretraining of Vision Transformers (Yun et al., CVPR 2022).

    from selfpatch import load_backbone
    model = load_backbone("checkpoint.pth")     # any file of docs/CHECKPOINTS.md
    features = model(images)                    # [B, 3, H, W] -> [B, N, D], row by row

The names below are loaded when they are first asked for, so that importing the package is instant.
"""
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from selfpatch.checkpoints.loading import build_head, load_backbone, load_with_info
    from selfpatch.method.losses import DINOLoss

__version__ = "0.1.0"
__all__ = ["DINOLoss", "build_head", "load_backbone", "load_with_info"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "DINOLoss":
        from selfpatch.method import losses as module
    else:
        from selfpatch.checkpoints import loading as module
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
