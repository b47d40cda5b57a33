"""FLOPs of a training step by the model's arithmetic, for model-FLOPs utilisation (MFU)."""
import re
from collections.abc import Sequence

import torch

from selfpatch.method.selfpatch_head import MultiCropWrapper

# TFLOP/s of dense bfloat16 or float16 products by the data sheet, by a part of torch's name for the GPU; first match
PEAK_TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L4": 121,
               "A40": 150, "A10": 125, "V100": 125, "T4": 65}


def peak_tflops(device: torch.device) -> float:
    """A GPU's peak rate in half precision; 0 for a CPU and for a GPU that is not in PEAK_TFLOPS."""
    if device.type != "cuda":
        return 0
    words = torch.cuda.get_device_name(device)
    return next((peak for name, peak in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", words)), 0)


def flops_per_image(network: MultiCropWrapper, crop_sizes: Sequence[int]) -> float:
    """Model FLOPs per image: the student's forward pass three times (backward is twice as much), the teacher's once.

    Multiply and add count as two; recomputed and unnecessary work does not count.

    Args:
        network: student or teacher; on the meta device, too.
        crop_sizes: sides in pixels of an image's crops, the two global ones first.
    """
    D, depth, patch = network.backbone.embed_dim, len(network.backbone.blocks), network.backbone.patch_size
    hidden, (out_dim, bottleneck) = network.c_head.mlp[0].out_features, network.c_head.last_layer.weight_v.shape
    projection = 2 * (D + hidden + bottleneck) * hidden
    patch_logits = 2 * bottleneck * len(network.p_head.last_layer.weight_v)

    def forward(tokens: list[int]) -> float:
        """Backbone, class token and projections of crops with so many patches each, without image prototypes."""
        blocks = sum(depth * (24 * n * D * D + 4 * n * n * D) + 2 * n * 3 * patch * patch * D for n in tokens)
        class_tokens = sum(tokens) * 8 * D * D + len(tokens) * (projection + 48 * D * D)
        return blocks + class_tokens + network.use_patches * sum(tokens) * (projection + patch_logits)

    tokens = [(size // patch) ** 2 for size in crop_sizes]
    student = forward(tokens) + len(tokens) * 2 * bottleneck * out_dim
    # the teacher's targets: query, projection and MLP, twice a patch
    teacher = forward(tokens if network.use_patches else tokens[:2]) + network.use_patches * sum(tokens) * 48 * D * D
    return 3 * student + teacher + 2 * 2 * bottleneck * out_dim
