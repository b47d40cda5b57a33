"""Linear segmentation: BatchNorm and one linear map from frozen patch features to classes.

The design is DINOv2's (Oquab et al. 2023, Sec. 7.4) with mmsegmentation's test: windows over the image in its own
aspect ratio, scored at full size. Without them, the same features score far lower.
"""
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from selfpatch.distributed.collectives import sum_over_processes, sync_batchnorms
from selfpatch.distributed.processes import get_rank, get_world_size
from selfpatch.evaluation.segmentation import IGNORE


class LinearHead(nn.Module):
    """Patch features [B, N, D] -> logits [B, N, C]: BatchNorm, dropout of whole channels, linear map N(0, 0.01²).

    Args:
        dropout: share of an image's channels dropped in training.
    """

    def __init__(self, dim: int, num_classes: int, dropout: float = 0.1):
        super().__init__()
        self.norm, self.linear, self.dropout = nn.BatchNorm1d(dim), nn.Linear(dim, num_classes), dropout
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """Logits; kept, bool [B, D], are the channels of each image that dropout keeps, None for all."""
        x = self.norm(features.float().flatten(0, 1)).unflatten(0, features.shape[:2])
        return self.linear(x if kept is None else x * kept[:, None] / (1 - self.dropout))


def build_linear_head(dim: int, num_classes: int, device: torch.device, seed: int = 0,
                      dropout: float = 0.1) -> LinearHead:
    """A head on the device, the same in every process, with BatchNorm over all processes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = LinearHead(dim, num_classes, dropout)
    return (sync_batchnorms(head, device) if get_world_size() > 1 else head).to(device)


def kept_channels(head: LinearHead, images: int, seed: int) -> torch.Tensor:
    """Dropout's choice for this process's images of a step, bool [images, D]; any number of processes draws the same.

    Args:
        seed: of the step.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(images * get_world_size(), head.linear.in_features, generator=generator) >= head.dropout
    return kept.chunk(get_world_size())[get_rank()].to(head.linear.weight.device)


def segmentation_loss(logits: torch.Tensor, ids: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Cross-entropy of bilinearly interpolated logits [B, N, C] against ids [B, H, W].

    The sum over this process's pixels divided by the number of scored pixels of all processes: add up the losses and
    gradients of all processes.
    """
    logits = logits.transpose(1, 2).unflatten(2, grid)
    logits = F.interpolate(logits, ids.shape[1:], mode="bilinear", align_corners=False)
    pixels = sum_over_processes((ids != IGNORE).sum())
    return F.cross_entropy(logits, ids.long(), ignore_index=IGNORE, reduction="sum") / pixels.clamp(min=1)


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows start along a side of an image; the last one ends at its edge."""
    if length <= window:
        return [0]
    return [*range(0, length - window, stride), length - window]


def sliding_logits(image: torch.Tensor, logits_of: Callable[[torch.Tensor], torch.Tensor], num_classes: int,
                   window: int, stride: int) -> torch.Tensor:
    """Logits [C, H, W] of an image [3, H, W]: the mean over all windows that contain a pixel.

    Args:
        image: normalised; a side shorter than the window shortens it.
        logits_of: windows [1, 3, window, window] -> logits of patches [1, C, h, w].
        window, stride: side of the square windows and the distance between them, in pixels.
    """
    height, width = image.shape[1:]
    total, count = image.new_zeros(num_classes, height, width), image.new_zeros(height, width)
    for top in window_starts(height, window, stride):
        for left in window_starts(width, window, stride):
            part = image[None, :, top:top + window, left:left + window]
            place = ..., slice(top, top + part.shape[2]), slice(left, left + part.shape[3])
            logits = F.interpolate(logits_of(part).float(), part.shape[2:], mode="bilinear", align_corners=False)[0]
            total[place] += logits
            count[place] += 1
    return total / count


def full_size_prediction(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Class of every pixel of the original image, [H, W], from logits [C, h, w] of the resized one."""
    return F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0].argmax(0)
