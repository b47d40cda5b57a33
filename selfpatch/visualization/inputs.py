"""Images for the pictures of a backbone: read, cut to whole patches, and as tensors.

    images, inputs = cut_images(["dog.jpg"], [read_image("dog.jpg")], 480, backbone)
"""
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from selfpatch.checkpoints.backbones import Backbone, image_statistics
from selfpatch.data.files import load_rgb, open_image, orientation
from selfpatch.data.normalisation import IMAGENET_MEAN, IMAGENET_STD, normalise
from selfpatch.errors import ConfigError
from selfpatch.visualization.features import fit_patches


def read_image(path: str) -> Image.Image:
    """Read an image as RGB, its pixels as stored; print that an EXIF orientation tag is ignored, if it has one."""
    if (tag := orientation(open_image(path))) != 1:
        print(f"{path}: EXIF orientation {tag} is ignored, as in training: pixels are used as stored")
    return load_rgb(path)


def to_tensor(image: Image.Image, statistics: tuple = (IMAGENET_MEAN, IMAGENET_STD)) -> torch.Tensor:
    """PIL image -> [1, 3, H, W], normalised with the mean and standard deviation of each channel."""
    return normalise(pil_to_tensor(image)[None], statistics)


def cut_images(paths: list[str], images: list[Image.Image], short_side: int,
               backbone: Backbone) -> tuple[list[Image.Image], list[torch.Tensor]]:
    """Images scaled to a short side and cut to whole patches, and as tensors [1, 3, H, W] on the backbone's device.

    Raises:
        ConfigError: one has too few or too many patches; the message has its path.
    """
    cut, device = [], next(backbone.parameters()).device
    for path, image in zip(paths, images, strict=True):
        try:
            cut.append(fit_patches(image, short_side, backbone.patch_size))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    return cut, [to_tensor(image, image_statistics(backbone)).to(device) for image in cut]


def check_patches(patches: list[tuple[int, int]], grid: tuple[int, int], option: str) -> list[int]:
    """Row-major indices of (row, column) patches; raise ConfigError if one is outside the grid."""
    for row, column in patches:
        if not (0 <= row < grid[0] and 0 <= column < grid[1]):
            raise ConfigError(f"{option} {row},{column} is outside the image, whose patches are 0,0 to "
                              f"{grid[0] - 1},{grid[1] - 1}")
    return [row * grid[1] + column for row, column in patches]
