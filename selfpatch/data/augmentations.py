"""DINO's multi-crop (Caron et al. 2021, Sec. 3.2, with BYOL's colour transforms), in PIL and in two halves.

In two halves, workers crop to uint8, and the device does the photometric part in batches. It is the same augmentation,
but PIL spends nine tenths of its time on colours and blur, so a worker loads many times as many images per second.
Every operation follows PIL's, including its rounding, on values 0 … 255.
"""
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import nn
from torchvision import transforms
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resized_crop

from selfpatch.data.normalisation import IMAGENET_MEAN, IMAGENET_STD

NUMBERS = 14  # uniform ones that draw takes for each crop

# ----------------------------------------------------------------------------------------------------------------------
# In PIL


class GaussianBlur:
    """Gaussian blur with probability p; PIL's radius, the standard deviation in pixels, is uniform in 0.1 … 2."""

    def __init__(self, p: float = 0.5, radius_min: float = 0.1, radius_max: float = 2.0):
        self.p, self.radius_min, self.radius_max = p, radius_min, radius_max

    def __call__(self, image: Image.Image) -> Image.Image:
        if torch.rand(()) >= self.p:
            return image
        radius = torch.empty(()).uniform_(self.radius_min, self.radius_max).item()
        return image.filter(ImageFilter.GaussianBlur(radius))


class DataAugmentationDINO:
    """PIL image -> list of normalised crops: 2 of global_crops_size, then local_crops_number of local_crops_size.

    Args:
        global_crops_scale, local_crops_scale: (least, most) share of the image's area that a crop covers.
    """

    def __init__(self, global_crops_scale: tuple[float, float], local_crops_scale: tuple[float, float],
                 local_crops_number: int, global_crops_size: int = 224, local_crops_size: int = 96):
        self.local_crops_number = local_crops_number
        self.global_transfo1 = self._pipeline(global_crops_size, global_crops_scale, blur=1.0)
        self.global_transfo2 = self._pipeline(global_crops_size, global_crops_scale, blur=0.1, solarize=0.2)
        self.local_transfo = self._pipeline(local_crops_size, local_crops_scale, blur=0.5)

    @staticmethod
    def _pipeline(size: int, scale: tuple[float, float], blur: float, solarize: float = 0.0) -> transforms.Compose:
        return transforms.Compose([
            transforms.RandomResizedCrop(size, tuple(scale), interpolation=InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(0.5),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            transforms.RandomGrayscale(0.2),
            GaussianBlur(blur),
            *([transforms.RandomSolarize(128, solarize)] if solarize else []),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])

    def __call__(self, image: Image.Image) -> list[torch.Tensor]:
        crops = [self.global_transfo1(image), self.global_transfo2(image)]
        return crops + [self.local_transfo(image) for _ in range(self.local_crops_number)]


# ----------------------------------------------------------------------------------------------------------------------
# In the workers: an image becomes uint8 crops


def draw_boxes(count: int, height: int, width: int, scale: tuple[float, float]) -> list[tuple[int, int, int, int]]:
    """Boxes (top, left, height, width) with RandomResizedCrop's distribution, from a single call of the generator.

    The area is uniform between the two shares of the image's, and the logarithm of the aspect ratio between those of
    3/4 and 4/3; after ten boxes that do not fit, the largest one in the centre.
    """
    min_area, max_area, log_ratio = scale[0] * height * width, scale[1] * height * width, math.log(4 / 3)

    def box(tries: list[list[float]]) -> tuple[int, int, int, int]:
        for area, ratio, top, left in tries:
            area, ratio = min_area + (max_area - min_area) * area, math.exp(log_ratio * (2 * ratio - 1))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        return (height - h) // 2, (width - w) // 2, h, w

    return [box(tries) for tries in torch.rand(count, 10, 4, dtype=torch.float64).tolist()]


class RandomCrops:
    """uint8 [3, H, W] -> [global crops uint8 [2, 3, G, G], local crops uint8 [n, 3, L, L], numbers [2 + n, 14]].

    The crops are neither flipped nor coloured yet: the numbers, uniform in 0 … 1, decide what the device does to each.

    Args:
        global_crops_scale, local_crops_scale: (least, most) share of the image's area that a crop covers.
    """

    def __init__(self, global_crops_scale: tuple[float, float], local_crops_scale: tuple[float, float],
                 local_crops_number: int, global_crops_size: int = 224, local_crops_size: int = 96):
        self.local_crops_number = local_crops_number
        self.groups = [(2, global_crops_scale, global_crops_size)]
        if local_crops_number:
            self.groups.append((local_crops_number, local_crops_scale, local_crops_size))

    def __call__(self, image: torch.Tensor) -> list[torch.Tensor]:
        crops = []
        for count, scale, size in self.groups:
            crops.append(torch.empty(count, 3, size, size, dtype=torch.uint8))
            for crop, box in zip(crops[-1], draw_boxes(count, *image.shape[1:], scale), strict=True):
                crop.copy_(resized_crop(image, *box, [size, size], InterpolationMode.BICUBIC, antialias=True))
        return [*crops, torch.rand(sum(map(len, crops)), NUMBERS)]


# ----------------------------------------------------------------------------------------------------------------------
# On the device: PIL's operations on batches, float32 [N, 3, H, W] of integers 0 … 255, with one factor per crop, [N]


def column(values: torch.Tensor) -> torch.Tensor:
    """[N] -> [N, 1, 1, 1], to broadcast over crops."""
    return values[:, None, None, None]


def grey(images: torch.Tensor) -> torch.Tensor:
    """[N, 3, H, W] -> luma [N, 1, H, W] (ITU-R 601).

    PIL uses 16-bit fixed point; its sums stay below 2²⁴, so float32 has them exactly.
    """
    r, g, b = images.split(1, dim=1)
    return ((r * 19595 + g * 38470 + b * 7471 + 32768) / 65536).floor()


def blend(base: torch.Tensor | float, images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """base + factor · (images − base), clipped to 0 … 255 and truncated to integers as PIL does."""
    return (images - base).mul_(column(factor)).add_(base).clamp_(0, 255).floor_()


def adjust_brightness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return blend(0.0, images, factor)


def adjust_contrast(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return blend((grey(images).mean((1, 2, 3), keepdim=True) + 0.5).floor(), images, factor)


def adjust_saturation(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return blend(grey(images), images, factor)


def adjust_hue(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Rotate the hue by the factor, in turns, through HSV in bytes as PIL and torchvision do."""
    r, g, b = images.split(1, dim=1)
    top = images.amax(1, keepdim=True)
    spread = top - images.amin(1, keepdim=True)
    sixth = torch.where(r == top, g - b, torch.where(g == top, b - r, r - g)) / spread.clamp(min=1)
    sixth = sixth + torch.where(r == top, 0.0, torch.where(g == top, 2.0, 4.0))
    hue = ((sixth / 6 + 1).frac() * 255).floor()
    saturation = (spread * 255 / top.clamp(min=1)).floor() / 255
    sixth = (hue + column((factor * 255).trunc())).remainder(256) * (6 / 255)
    # back to RGB without branches: a channel is the value minus chroma times a ramp of its distance in hue
    steps = (sixth + torch.arange(5, 0, -2, device=images.device)[:, None, None]).remainder(6)
    return (top - top * saturation * torch.minimum(steps, 4 - steps).clamp(0, 1)).round()


def to_grey(images: torch.Tensor) -> torch.Tensor:
    return grey(images).repeat(1, 3, 1, 1)


def blur_matrices(sigma: torch.Tensor, size: int) -> torch.Tensor:
    """PIL's Gaussian blur of a row of pixels as a matrix for each sigma, [N] -> [N, size, size]; 0 is the identity.

    PIL approximates the Gaussian by three box filters whose outermost taps are fractional (Gwosdek et al. 2011), and
    repeats the row's end pixels before each. As matrices the three are one product, and different sigmas one batch.
    """
    variance = sigma * sigma / 3
    whole = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    rest = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    radius = (whole + rest)[:, None]
    reach = 2  # a sigma of 2, the largest, has boxes of radius 1.5
    taps = (radius + 1 - torch.arange(-reach, reach + 1, device=sigma.device).abs()).clamp(0, 1) / (2 * radius + 1)
    taps = F.pad(taps, (size - 1, size - 1))  # the tap at offset i has index i + size + 1
    offset = torch.arange(-reach, size + reach, device=sigma.device) - torch.arange(size, device=sigma.device)[:, None]
    box = taps[:, offset + size + 1]  # [N, size, reach + size + reach]
    before, box, after = box.split((reach, size, reach), dim=2)
    box = torch.cat((box[..., :1] + before.sum(2, keepdim=True), box[..., 1:-1],
                     box[..., -1:] + after.sum(2, keepdim=True)), dim=2)
    return box @ box @ box


def gaussian_blur(images: torch.Tensor, sigma: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Blur by sigma [N] pixels, rows and then columns; dtype is that of the matrix products."""
    matrices = blur_matrices(sigma, images.shape[-1]).to(dtype)
    rows = (images.to(dtype).flatten(1, 2) @ matrices.mT).round().view_as(images)
    return (matrices[:, None] @ rows).round().to(images.dtype)


def solarize(images: torch.Tensor) -> torch.Tensor:
    return torch.where(images < 128, images, 255 - images)


class Draws(NamedTuple):
    """The random parameters of N crops."""

    flip: torch.Tensor  # [N] bool
    order: torch.Tensor  # [4, N]: index in ADJUSTMENTS of the first, second, … to apply; -1 for none
    factors: torch.Tensor  # [4, N]: of brightness, contrast, saturation and hue
    grey: torch.Tensor  # [N] bool
    sigma: torch.Tensor  # [N]: blur in pixels, 0 for none
    solarize: torch.Tensor  # [N] bool


def draw(numbers: torch.Tensor, blur: torch.Tensor, solarization: torch.Tensor) -> Draws:
    """The parameters of N crops, from uniform numbers [NUMBERS, N] and the probabilities blur and solarization [N]."""
    flip, jitter, colour, rank, greyed, blurred, radius, solarized = numbers.split((1, 1, 4, 4, 1, 1, 1, 1))
    brightness, contrast, saturation, hue = 2 * colour - 1
    return Draws(flip=flip[0] < 0.5, order=torch.where(jitter < 0.8, rank.argsort(0), -1),
                 factors=torch.stack((1 + 0.4 * brightness, 1 + 0.4 * contrast, 1 + 0.2 * saturation, 0.1 * hue)),
                 grey=greyed[0] < 0.2, sigma=torch.where(blurred[0] < blur, 0.1 + 1.9 * radius[0], 0.0),
                 solarize=solarized[0] < solarization)


ADJUSTMENTS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def apply(images: torch.Tensor, draws: Draws, select_by_mask: bool) -> torch.Tensor:
    """uint8 [N, 3, H, W] -> float32 [N, 3, H, W], 0 … 255: flipped, coloured, blurred and solarised as drawn.

    Args:
        select_by_mask: run each operation on all crops and keep the result where it was drawn. That costs arithmetic,
            which a GPU has to spare and torch.compile fuses; indexing the drawn crops would make the host wait for
            their indices. On a CPU, which waits for nothing, indexing is faster.
    """
    def where(chosen: torch.Tensor, operation: Callable, images: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
        if select_by_mask:
            return torch.where(column(chosen), operation(images, *factors), images)
        index = chosen.nonzero()[:, 0]
        return images.index_copy_(0, index, operation(images[index], *(f[index] for f in factors)))

    images = where(draws.flip, lambda crops: crops.flip(-1), images.float())
    for place in draws.order:
        for number, adjust in enumerate(ADJUSTMENTS):
            images = where(place == number, adjust, images, draws.factors[number])
    images = where(draws.grey, to_grey, images)
    # float16 represents 0 … 255 exactly, and a GPU multiplies matrices of it at many times float32's rate
    blur = partial(gaussian_blur, dtype=torch.float16 if images.is_cuda else torch.float32)
    images = where(draws.sigma > 0, blur, images, draws.sigma)
    return where(draws.solarize, solarize, images)


class DeviceAugmentation(nn.Module):
    """Batches of RandomCrops on a device -> V normalised crops, float32 [B, 3, H, W]: 2 global, then the local ones.

    No operation waits for a GPU. The probabilities of blur and solarisation are DINO's: 1 and 0 for the first global
    crop, 0.1 and 0.2 for the second, 0.5 and 0 for local ones.
    """

    def __init__(self, local_crops_number: int):
        super().__init__()
        mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)
        self.register_buffer("blur", torch.tensor([1.0, 0.1] + [0.5] * local_crops_number))
        self.register_buffer("solarize", torch.tensor([0.0, 0.2] + [0.0] * local_crops_number))
        self.fused = False

    def fuse(self) -> None:
        """Fuse the operations with torch.compile, once for each crop size."""
        self.fused, self.finish = True, torch.compile(self.finish, dynamic=False, fullgraph=True)

    def finish(self, images: torch.Tensor, draws: Draws) -> torch.Tensor:
        return apply(images, draws, select_by_mask=self.fused or images.is_cuda) * self.scale + self.shift

    @torch.no_grad()
    def forward(self, batch: list[torch.Tensor]) -> list[torch.Tensor]:
        *groups, numbers = batch
        size = len(numbers)
        # view by view, the order in which the networks take them
        draws = draw(numbers.transpose(0, 1).flatten(0, 1).T,
                     *(odds[:, None].expand(-1, size).flatten() for odds in (self.blur, self.solarize)))
        views, start = [], 0
        for crops in groups:
            end = start + crops.shape[1] * size
            own = Draws(*(values[..., start:end] for values in draws))
            images = self.finish(crops.transpose(0, 1).flatten(0, 1), own)
            views += images.unflatten(0, (-1, size)).unbind()
            start = end
        return views
