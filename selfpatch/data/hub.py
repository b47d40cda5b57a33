"""Images of a Hugging Face data set, through the package `datasets`: hf:NAME, or hf:FOLDER for a local one.

hf:NAME:SPLIT is another split than train.
"""
import os
from pathlib import Path

import torch

from selfpatch.data.files import UnreadableImage, read_bytes
from selfpatch.data.names import NamedImages, common_top, in_order, number_classes
from selfpatch.errors import ConfigError


class HubImages(NamedImages):
    """The rows of a data set that has a column of images, by class and name where it has both, else in its own order.

    Only that column is read, from memory-mapped files that workers share. Images stay as they were encoded.
    """

    def __init__(self, path: str, column: str = ""):
        name, split = split_of(path)
        dataset = load_split(name, split)
        column, label = column or image_column(dataset, path), label_column(dataset)
        from datasets import Image  # which load_split has found

        classes = dataset.features[label].names if label else []
        labels = values(dataset, label) if label else None
        images = dataset.select_columns([column]).cast_column(column, Image(decode=False))
        names, order = row_names(images, column, labels, classes)
        names = [names[i] for i in order]
        if labels is None:
            classes, numbers = number_classes(names)
        else:
            numbers = [-1 if labels[i] is None else labels[i] for i in order]
        super().__init__(path, names, classes, numbers)
        self.images, self.column, self.rows = images, column, torch.tensor(order)

    def location(self, index: int) -> str:
        return f"{self.root} row {int(self.rows[index])} ({self.names[index]})"

    def read(self, index: int) -> bytes:
        image = self.images[int(self.rows[index])][self.column] or {}
        if image.get("bytes"):
            return image["bytes"]
        if image.get("path"):
            return read_bytes(image["path"])
        raise UnreadableImage(f"cannot read the image {self.location(index)} (the row has none)")


def split_of(path: str) -> tuple[str, str | None]:
    """(name or folder, split or None) of hf:NAME or hf:NAME:SPLIT.

    Raises:
        ConfigError: there is no name, or the package is not installed.
    """
    name = os.path.expanduser(path.removeprefix("hf:"))
    try:
        import datasets  # noqa: F401
    except ImportError:
        raise ConfigError(f"{path} is read by the package datasets, which is not installed: pip install datasets"
                          ) from None
    name, _, split = (name, "", "") if os.path.exists(name) else name.partition(":")
    if not name:
        raise ConfigError(f"{path}: give the name of a data set, hf:NAME, or a folder, hf:/path/to/it")
    return name, split or None


def load_split(name: str, split: str | None):
    """A datasets.Dataset: of several splits the one asked for, else train.

    Raises:
        ConfigError: there is none, or it cannot be loaded.
    """
    import datasets

    saved = any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json"))
    try:
        if saved:
            loaded = datasets.load_from_disk(name)
            splits = loaded if isinstance(loaded, dict) else {"train": loaded}
        elif split is None and len(found := datasets.get_dataset_split_names(name)) == 1:
            return datasets.load_dataset(name, split=found[0])
        else:
            return datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # of many packages: about the network, the files, or the name
        raise ConfigError(f"hf:{name} cannot be loaded ({' '.join(str(error).split())[:300]}): check the name, the "
                          "split (hf:NAME:SPLIT) and the network") from None
    chosen = split or ("train" if "train" in splits or len(splits) > 1 else next(iter(splits)))
    if chosen not in splits:
        raise ConfigError(f"hf:{name} has no split {chosen}, but {', '.join(splits)}: give hf:{name}:{min(splits)}")
    return splits[chosen]


def image_column(dataset, path: str) -> str:
    """The first column of images.

    Raises:
        ConfigError: there is none.
    """
    for name, feature in dataset.features.items():
        if type(feature).__name__ == "Image":
            return name
    raise ConfigError(f"{path} has no column of images, but {', '.join(dataset.column_names) or 'none at all'}: give a "
                      "data set with one of type Image")


def label_column(dataset) -> str | None:
    """The first column of classes, if there is one."""
    return next((name for name, feature in dataset.features.items() if type(feature).__name__ == "ClassLabel"), None)


def row_names(images, column: str, labels: list[int | None] | None, classes: list[str]) -> tuple[list[str], list[int]]:
    """The names of rows, and their order: class/file where the files' names are known, else the number of the row."""
    paths = values(images.flatten(), f"{column}.path")
    known = all(paths)
    if not known:
        paths = [f"{i:08}" for i in range(len(images))]
    if labels:
        folders = [f"{classes[label]}/" if label in range(len(classes)) else "" for label in labels]
        names = [folder + os.path.basename(path) for folder, path in zip(folders, paths, strict=True)]
    else:
        top = common_top(paths)
        names = [path[len(top):] for path in paths]
    return names, in_order(names) if known else list(range(len(images)))


def values(dataset, column: str) -> list:
    """A column without reading the others, which may be hundreds of gigabytes of images."""
    return dataset.select_columns([column]).with_format("arrow")[:][column].to_pylist()
