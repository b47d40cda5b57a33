"""FLOPs that a training step needs by the model's arithmetic, for model-FLOPs utilisation (MFU)."""
import re

import torch
from torch import nn

BOTTLENECK = 256  # of DINOHead
# TFLOP/s of dense bfloat16 or float16 products by the data sheet, by a part of torch's name for the GPU; first match
PEAK_TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L4": 121,
               "A40": 150, "A10": 125, "V100": 125, "T4": 65}


def peak_tflops(device: torch.device) -> float:
    """What a GPU can do at most in half precision; 0 for a CPU and for one that is not in PEAK_TFLOPS."""
    if device.type != "cuda":
        return 0
    words = torch.cuda.get_device_name(device)
    return next((peak for name, peak in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", words)), 0)


def flops_per_image(backbone: nn.Module, local_crops: int, global_size: int = 224, local_size: int = 96,
                    out_dim: int = 65536, out_dim_selfpatch: int = 4096, use_patches: bool = True,
                    hidden_dim: int = 2048) -> float:
    """Model FLOPs per image: the student's forward pass three times (backward is twice as much), the teacher's once.

    Multiply and add count as two, and what is computed again or without need does not count.

    Args:
        backbone: a VisionTransformer.
        out_dim, out_dim_selfpatch: prototypes of the image and of the patch head.
        use_patches: False for DINO, whose teacher sees the two global crops alone.
        hidden_dim: width of the hidden layers of both projection heads.
    """
    D, depth, patch = backbone.embed_dim, len(backbone.blocks), backbone.patch_size
    projection = 2 * (D + hidden_dim + BOTTLENECK) * hidden_dim

    def forward(tokens: list[int]) -> float:
        """Backbone, class token and projections of crops with so many patches each, without the image prototypes."""
        blocks = sum(depth * (24 * n * D * D + 4 * n * n * D) + 2 * n * 3 * patch * patch * D for n in tokens)
        class_tokens = sum(tokens) * 8 * D * D + len(tokens) * (projection + 48 * D * D)
        patches = sum(tokens) * (projection + 2 * BOTTLENECK * out_dim_selfpatch)
        return blocks + class_tokens + use_patches * patches

    tokens = [(size // patch) ** 2 for size in [global_size] * 2 + [local_size] * local_crops]
    student = forward(tokens) + len(tokens) * 2 * BOTTLENECK * out_dim
    # the teacher's targets: query, projection and MLP, twice a patch
    teacher = forward(tokens if use_patches else tokens[:2]) + use_patches * sum(tokens) * 48 * D * D
    return 3 * student + teacher + 2 * 2 * BOTTLENECK * out_dim
