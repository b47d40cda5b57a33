"""SelfPatch: patch-level self-supervised pretraining of Vision Transformers (Yun et al., CVPR 2022)."""
__version__ = "0.1.0"


def __getattr__(name: str):
    """Load load_backbone when it is first asked for, so that importing the package is instant."""
    if name != "load_backbone":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from selfpatch.checkpoints.loading import load_backbone
    return load_backbone
