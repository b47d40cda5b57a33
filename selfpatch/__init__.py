"""SelfPatch: patch-level self-supervised pretraining of Vision Transformers (Yun et al., CVPR 2022)."""
__version__ = "0.1.0"
