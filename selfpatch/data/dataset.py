"""The training images, each as random crops. sources.py finds them, loader.py makes batches of them."""
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import Dataset

from selfpatch.data.augmentations import DataAugmentationDINO, RandomCrops
from selfpatch.data.files import UnreadableImage, load_rgb, load_uint8
from selfpatch.data.names import NamedImages
from selfpatch.data.sources import open_images
from selfpatch.errors import ConfigError

MAX_REPLACEMENTS = 100  # images in a row that cannot be read, before a sample is given up


class TrainingImages(Dataset):
    """Images as crops; the next readable image replaces an unreadable one, and all others keep their place.

    A sample is (crops, error): error says what is wrong with the image that was replaced, "" for none.

    Args:
        images: names, and how to read them.
        transform: decoded image -> crops.
        loader: (where the image is, its bytes) -> decoded image.
    """

    def __init__(self, images: NamedImages, transform: Callable, loader: Callable):
        self.images, self.transform, self.loader = images, transform, loader

    def __len__(self) -> int:
        return len(self.images)

    @property
    def classes(self) -> list[str]:
        """Names of the class folders; empty if there are none."""
        return self.images.classes

    def __getitem__(self, index: int) -> tuple[list[torch.Tensor], str]:
        return self.load(index)

    def load(self, index: int, begin: Callable[[int], None] | None = None) -> tuple[list[torch.Tensor], str]:
        """The sample of an index.

        Args:
            begin: called with the index of each image before it is read.

        Raises:
            UnreadableImage: the image and the next 99 are unreadable.
        """
        error = ""
        for i in range(index, index + min(MAX_REPLACEMENTS, len(self))):
            i %= len(self)
            if begin:
                begin(i)
            try:
                return self.transform(self.loader(self.images.location(i), self.images.read(i))), error
            except UnreadableImage as unreadable:
                error = error or str(unreadable)
        others = min(MAX_REPLACEMENTS, len(self)) - 1
        raise UnreadableImage(f"{error}; and neither can the {others} images after it")


def build_dataset(data_path: str | Path | list[str] | NamedImages,
                  global_crops_scale: tuple[float, float] = (0.25, 1.0),
                  local_crops_scale: tuple[float, float] = (0.05, 0.25), local_crops_number: int = 8,
                  global_crops_size: int = 224, local_crops_size: int = 96, augment: str = "device") -> TrainingImages:
    """Images, each as 2 global crops and local_crops_number local ones.

    Args:
        data_path: a folder, list or data set of images, or one or several archives, see sources.py; or the images
            that open_images has found there.
        global_crops_scale, local_crops_scale: (least, most) share of the image's area that a crop covers.
        augment: device, where images become uint8 crops that CropLoader augments in batches; pil, where they become
            normalised crops, augmented one by one.

    Raises:
        ConfigError: there are no images, or they cannot be listed.
    """
    if augment not in ("device", "pil"):
        raise ConfigError(f"augment is {augment!r}: it must be device or pil")
    transform, loader = (RandomCrops, load_uint8) if augment == "device" else (DataAugmentationDINO, load_rgb)
    transform = transform(global_crops_scale, local_crops_scale, local_crops_number, global_crops_size,
                          local_crops_size)
    images = data_path if isinstance(data_path, NamedImages) else open_images(data_path)
    return TrainingImages(images, transform, loader)
