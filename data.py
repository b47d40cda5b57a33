"""The training images: files in class folders, each as random crops. loader.py makes batches of them."""
import os
from collections import Counter
from pathlib import Path

import torch
from torchvision.datasets import ImageFolder

from augmentations import DataAugmentationDINO
from device_augmentations import RandomCrops
from errors import ConfigError
from image_files import (
    IMAGE_SUFFIXES,
    UnreadableImage,
    is_hidden,
    is_image_name,
    load_rgb,
    load_uint8,
    refuse_folder,
    unread_formats,
    walk,
)

MAX_REPLACEMENTS = 100  # images in a row that cannot be read, before a sample is given up


class ClassFolders(ImageFolder):
    """torchvision's ImageFolder without hidden files and folders, each folder once, replacing what cannot be read.

    Of links to one folder, or to a class folder, one counts; a link to a file is a file of its own.

    A sample is (crops, what is wrong with the image that they replace, or ""). The replacement is the next readable
    image of the data set, and the order of all others stays the same.
    """

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        try:
            with os.scandir(directory) as entries:
                folders = [entry for entry in entries if entry.is_dir() and not is_hidden(entry.name)]
        except OSError as error:
            refuse_folder(error)
        classes, walked = [], {os.path.realpath(directory)}
        for folder in sorted(folders, key=lambda entry: (entry.is_symlink(), entry.name)):  # not a link, if possible
            if (real := os.path.realpath(folder)) not in walked:
                walked.add(real)
                classes.append(folder.name)
        if not classes:
            raise FileNotFoundError(f"no class folders in {directory}")
        return sorted(classes), {name: i for i, name in enumerate(sorted(classes))}

    def make_dataset(self, directory: str, class_to_idx: dict[str, int], *_, **__) -> list[tuple[str, int]]:
        """(path, class) of every image, in torchvision's order; counts the images that are not among them."""
        folders = [os.path.join(directory, name) for name in class_to_idx]
        # a link below one class that leads to another, or back to the top, adds nothing to it
        visited = {os.path.realpath(folder) for folder in (directory, *folders)}
        samples, self.unread = [], Counter()
        self.outside = sum(is_image_name(name) and not is_hidden(name) for name in os.listdir(directory))
        for folder, label in zip(folders, class_to_idx.values(), strict=True):
            paths = list(walk(folder, visited))
            self.unread.update(unread_formats(paths))
            samples += [(path, label) for path in sorted(filter(is_image_name, paths), key=os.path.split)]
        return samples

    def unread_summary(self) -> str:
        """The files that look like images but are not used, in words; empty if there are none."""
        counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(self.unread.items()))
        parts = [f"{counts} (only {' '.join(IMAGE_SUFFIXES)} are)"] * bool(counts)
        if self.outside:
            parts.append(f"{self.outside} beside the class folders (move them into one)")
        return f"not read: {'; '.join(parts)}" if parts else ""

    def __getitem__(self, index: int) -> tuple[list[torch.Tensor], str]:
        error = ""
        for i in range(index, index + min(MAX_REPLACEMENTS, len(self))):
            try:
                return self.transform(self.loader(self.samples[i % len(self)][0])), error
            except UnreadableImage as unreadable:
                error = error or str(unreadable)
        raise UnreadableImage(f"{error}; and neither can the {i - index} images after it")


def build_dataset(data_path: str | Path, global_crops_scale: tuple[float, float] = (0.25, 1.0),
                  local_crops_scale: tuple[float, float] = (0.05, 0.25), local_crops_number: int = 8,
                  global_crops_size: int = 224, local_crops_size: int = 96, augment: str = "device") -> ClassFolders:
    """The images of a folder of class folders, each as 2 global crops and local_crops_number local ones.

    Args:
        global_crops_scale, local_crops_scale: (least, most) share of the image's area that a crop covers.
        augment: device, where images become uint8 crops that CropLoader augments in batches; pil, where they become
            normalised crops, augmented one by one.

    Raises:
        ConfigError: there are no class folders, or no images in them.
    """
    if augment not in ("device", "pil"):
        raise ConfigError(f"augment is {augment!r}: it must be device or pil")
    if not os.path.isdir(data_path):
        raise ConfigError(f"there is no folder {data_path}: give --data_path, a folder of class folders of images")
    transform, loader = (RandomCrops, load_uint8) if augment == "device" else (DataAugmentationDINO, load_rgb)
    transform = transform(global_crops_scale, local_crops_scale, local_crops_number, global_crops_size,
                          local_crops_size)
    try:
        dataset = ClassFolders(str(data_path), transform, loader=loader, allow_empty=True)
    except FileNotFoundError:
        raise ConfigError(f"--data_path {data_path} has no folders in it: images go into one folder for each class, "
                          f"such as {str(data_path).rstrip('/')}/all/0001.jpg") from None
    if not len(dataset):
        raise ConfigError(f"--data_path {data_path} has class folders, but no images in them: "
                          + (dataset.unread_summary() or f"files ending in {' '.join(IMAGE_SUFFIXES)}"))
    return dataset
