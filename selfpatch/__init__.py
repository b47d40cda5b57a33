"""SelfPatch: patch-level self-supervised pretraining of Vision Transformers (Yun et al., CVPR 2022).

    from selfpatch import load_backbone
    model = load_backbone("checkpoint.pth")     # any file of docs/CHECKPOINTS.md
    features = model(images)                    # [B, 3, H, W] -> [B, N, D], row by row

The names below are loaded when they are first asked for, so that importing the package is instant.
"""
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from selfpatch.checkpoints.loading import load_backbone, load_with_info
    from selfpatch.method.losses import DINOLoss
    from selfpatch.method.selfpatch_head import SelfPatchHead

__version__ = "0.1.0"
__all__ = ["DINOLoss", "SelfPatchHead", "load_backbone", "load_with_info"]
_MODULES = {"DINOLoss": "method.losses", "SelfPatchHead": "method.selfpatch_head",
            "load_backbone": "checkpoints.loading", "load_with_info": "checkpoints.loading"}


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
