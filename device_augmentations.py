"""Multi-crop in two halves: workers decode and crop to uint8, the device does the photometric part for a whole batch.

The same augmentation as augmentations.py (Caron et al. 2021, Sec. 3.2), for many times the images a second of a worker:
PIL spends nine tenths of its time on colours and blur. Every operation follows PIL's to the rounding, on 0 … 255.
"""
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resized_crop

from augmentations import IMAGENET_MEAN, IMAGENET_STD

# ----------------------------------------------------------------------------------------------------------------------
# In the workers: an image becomes uint8 crops


def draw_boxes(count: int, height: int, width: int, scale: tuple[float, float]) -> list[tuple[int, int, int, int]]:
    """Boxes (top, left, height, width) as RandomResizedCrop draws them, all from one call of the generator.

    The area is uniform between the two shares of the image, the logarithm of the aspect ratio between 3/4 and 4/3; ten
    tries, then the largest such box in the middle.
    """
    least, most, widest = scale[0] * height * width, scale[1] * height * width, math.log(4 / 3)

    def box(tries: list[list[float]]) -> tuple[int, int, int, int]:
        for area, ratio, top, left in tries:
            area, ratio = least + (most - least) * area, math.exp(widest * (2 * ratio - 1))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        return (height - h) // 2, (width - w) // 2, h, w

    return [box(tries) for tries in torch.rand(count, 10, 4, dtype=torch.float64).tolist()]


class RandomCrops:
    """uint8 [3, H, W] -> [global crops uint8 [2, 3, G, G], local crops uint8 [n, 3, L, L]], without flip and colours.

    Args:
        global_crops_scale, local_crops_scale: (least, most) share of the image's area that a crop covers.
    """

    def __init__(self, global_crops_scale: tuple[float, float], local_crops_scale: tuple[float, float],
                 local_crops_number: int, global_crops_size: int = 224, local_crops_size: int = 96):
        self.local_crops_number = local_crops_number
        self.kinds = [(2, global_crops_scale, global_crops_size)]
        if local_crops_number:
            self.kinds.append((local_crops_number, local_crops_scale, local_crops_size))

    def __call__(self, image: torch.Tensor) -> list[torch.Tensor]:
        crops = []
        for count, scale, size in self.kinds:
            crops.append(torch.empty(count, 3, size, size, dtype=torch.uint8))
            for crop, box in zip(crops[-1], draw_boxes(count, *image.shape[1:], scale), strict=True):
                crop.copy_(resized_crop(image, *box, [size, size], InterpolationMode.BICUBIC, antialias=True))
        return crops


# ----------------------------------------------------------------------------------------------------------------------
# On the device: PIL's operations on batches, float32 [N, 3, H, W] of whole numbers 0 … 255, one factor [N] for each


def column(values: torch.Tensor) -> torch.Tensor:
    return values[:, None, None, None]


def grey(images: torch.Tensor) -> torch.Tensor:
    """[N, 3, H, W] -> luma [N, 1, H, W], in PIL's fixed point (ITU-R 601), which float32 holds exactly."""
    r, g, b = images.split(1, dim=1)
    return ((r * 19595 + g * 38470 + b * 7471 + 32768) / 65536).floor()


def blend(base: torch.Tensor | float, images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Away from the base by the factor, cut down to whole numbers as PIL does."""
    return (images - base).mul_(column(factor)).add_(base).clamp_(0, 255).floor_()


def adjust_brightness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return blend(0.0, images, factor)


def adjust_contrast(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return blend((grey(images).mean((1, 2, 3), keepdim=True) + 0.5).floor(), images, factor)


def adjust_saturation(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return blend(grey(images), images, factor)


def adjust_hue(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Turn the hue by the factor, in turns, through HSV in bytes as PIL and torchvision do."""
    r, g, b = images.split(1, dim=1)
    top = images.amax(1, keepdim=True)
    spread = top - images.amin(1, keepdim=True)
    sixth = torch.where(r == top, g - b, torch.where(g == top, b - r, r - g)) / spread.clamp(min=1)
    sixth = sixth + torch.where(r == top, 0.0, torch.where(g == top, 2.0, 4.0))
    hue = ((sixth / 6 + 1).frac() * 255).floor()
    saturation = (spread * 255 / top.clamp(min=1)).floor() / 255
    sixth = (hue + column((factor * 255).trunc())).remainder(256) * (6 / 255)
    # each channel is the value, less what the saturation takes at its distance from the channel's own hue
    steps = (sixth + torch.arange(5, 0, -2, device=images.device)[:, None, None]).remainder(6)
    return (top - top * saturation * torch.minimum(steps, 4 - steps).clamp(0, 1)).round()


def to_grey(images: torch.Tensor) -> torch.Tensor:
    return grey(images).repeat(1, 3, 1, 1)


def blur_matrices(sigma: torch.Tensor, size: int) -> torch.Tensor:
    """[N] -> [N, size, size]: what PIL's Gaussian blur does to a row of pixels; sigma 0 is the identity.

    PIL runs three box filters with fractional ends (Gwosdek et al. 2011), the row's ends repeated before each.
    """
    variance = sigma * sigma / 3
    whole = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    rest = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    radius = (whole + rest)[:, None]
    reach = 2  # enough for a sigma of 2, whose boxes have radius 1.5
    taps = (radius + 1 - torch.arange(-reach, reach + 1, device=sigma.device).abs()).clamp(0, 1) / (2 * radius + 1)
    taps = F.pad(taps, (size - 1, size - 1))  # now offset i from a pixel has the tap number i + size + 1
    offset = torch.arange(-reach, size + reach, device=sigma.device) - torch.arange(size, device=sigma.device)[:, None]
    box = taps[:, offset + size + 1]  # [N, size, reach + size + reach]
    before, box, after = box.split((reach, size, reach), dim=2)
    box = torch.cat((box[..., :1] + before.sum(2, keepdim=True), box[..., 1:-1],
                     box[..., -1:] + after.sum(2, keepdim=True)), dim=2)
    return box @ box @ box


def gaussian_blur(images: torch.Tensor, sigma: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Blur by sigma [N] pixels; dtype is that of the matrix products."""
    matrices = blur_matrices(sigma, images.shape[-1]).to(dtype)
    rows = (images.to(dtype).flatten(1, 2) @ matrices.mT).round().view_as(images)
    return (matrices[:, None] @ rows).round().to(images.dtype)


def solarize(images: torch.Tensor) -> torch.Tensor:
    return torch.where(images < 128, images, 255 - images)


class Draws(NamedTuple):
    """What happens to each of N crops."""

    flip: torch.Tensor  # [N] bool
    order: torch.Tensor  # [4, N]: number of the adjustment that comes first, second, …; -1 for none
    factors: torch.Tensor  # [4, N]: of brightness, contrast, saturation and hue
    grey: torch.Tensor  # [N] bool
    sigma: torch.Tensor  # [N]: of the blur in pixels, 0 for none
    solarize: torch.Tensor  # [N] bool


def draw(blur: torch.Tensor, solarization: torch.Tensor) -> Draws:
    """Draw for N crops, on the odds' device and from its own generator; blur and solarization [N] are their odds."""
    u = torch.rand(14, len(blur), device=blur.device)
    flip, jitter, colour, rank, greyed, blurred, radius, solarized = u.split((1, 1, 4, 4, 1, 1, 1, 1))
    brightness, contrast, saturation, hue = 2 * colour - 1
    return Draws(flip=flip[0] < 0.5, order=torch.where(jitter < 0.8, rank.argsort(0), -1),
                 factors=torch.stack((1 + 0.4 * brightness, 1 + 0.4 * contrast, 1 + 0.2 * saturation, 0.1 * hue)),
                 grey=greyed[0] < 0.2, sigma=torch.where(blurred[0] < blur, 0.1 + 1.9 * radius[0], 0.0),
                 solarize=solarized[0] < solarization)


ADJUSTMENTS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def apply(images: torch.Tensor, draws: Draws, everywhere: bool) -> torch.Tensor:
    """uint8 [N, 3, H, W] -> float32 [N, 3, H, W], 0 … 255: flipped, coloured, blurred and solarised as drawn.

    everywhere: run each operation on all crops and select. That is arithmetic, of which a GPU has plenty and which
    torch.compile fuses; to work on the chosen crops alone the host would have to wait until it knows which they are.
    """
    def where(chosen: torch.Tensor, operation: Callable, images: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
        if everywhere:
            return torch.where(column(chosen), operation(images, *factors), images)
        index = chosen.nonzero()[:, 0]
        return images.index_copy_(0, index, operation(images[index], *(f[index] for f in factors)))

    images = where(draws.flip, lambda crops: crops.flip(-1), images.float())
    for place in draws.order:
        for number, adjust in enumerate(ADJUSTMENTS):
            images = where(place == number, adjust, images, draws.factors[number])
    images = where(draws.grey, to_grey, images)
    # float16 holds 0 … 255 exactly, and a GPU's matrix units take it at many times float32's rate
    blur = partial(gaussian_blur, dtype=torch.float16 if images.is_cuda else torch.float32)
    images = where(draws.sigma > 0, blur, images, draws.sigma)
    return where(draws.solarize, solarize, images)


class DeviceAugmentation(nn.Module):
    """Batches of RandomCrops on a device -> V normalised crops, float32 [B, 3, H, W]: 2 global, then the local ones.

    Nothing in it waits for a GPU. The odds of blur and solarisation are DINO's: 1 and 0 for the first global crop, 0.1
    and 0.2 for the second, 0.5 and 0 for local ones.

    Args:
        compiled: fuse the operations with torch.compile (once for each size of crops).
    """

    def __init__(self, local_crops_number: int, compiled: bool = False):
        super().__init__()
        mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)
        self.register_buffer("blur", torch.tensor([1.0, 0.1] + [0.5] * local_crops_number))
        self.register_buffer("solarize", torch.tensor([0.0, 0.2] + [0.0] * local_crops_number))
        self.compiled = compiled
        self.finish = torch.compile(self.finish, dynamic=False, fullgraph=True) if compiled else self.finish

    def finish(self, images: torch.Tensor, draws: Draws) -> torch.Tensor:
        return apply(images, draws, everywhere=self.compiled or images.is_cuda) * self.scale + self.shift

    @torch.no_grad()
    def forward(self, kinds: list[torch.Tensor]) -> list[torch.Tensor]:
        views, done = [], 0
        for crops in kinds:
            batch, count = crops.shape[:2]
            blur, solarization = (odds[done:done + count, None].expand(-1, batch).flatten()
                              for odds in (self.blur, self.solarize))
            # view by view, so that the crops of one size lie one after another
            images = self.finish(crops.transpose(0, 1).flatten(0, 1), draw(blur, solarization))
            views += images.unflatten(0, (count, batch)).unbind()
            done += count
        return views
