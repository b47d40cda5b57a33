"""Images that come through other code: rows of a Hugging Face data set, and what a function of the user's opens.

    hf:NAME, hf:FOLDER                  through the package `datasets`; the split train, or the only one
    hf:NAME:SPLIT, hf:NAME:CONFIG:SPLIT
    mine.py:ARGUMENT                    the function open_images(ARGUMENT) of that file
"""
import contextlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Hashable
from pathlib import Path

import torch

from selfpatch.data.files import UnreadableImage, read_bytes
from selfpatch.data.names import NamedImages, common_top, in_order, number_classes
from selfpatch.errors import ConfigError, require_packages

SYNTAX = "hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT, where NAME may be a folder"


class HubImages(NamedImages):
    """The rows of a data set that has a column of images, by class and name where they have names, else in its order.

    Only that column is read, from memory-mapped files that workers share. Images stay as they were encoded.

    Args:
        column: of the images; "" for the first one.
        dataset: what load_split makes of the path, if it is there already.
    """

    expects = "its split has no rows"

    def __init__(self, path: str, column: str = "", dataset=None):
        dataset = load_split(*parts_of(path)) if dataset is None else dataset
        column, label = image_column(dataset, path, column), label_column(dataset)
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
        others = [name for name in image_columns(dataset) if name != column]
        self.remarks = [f"{path}: images of the column {column}"
                        + f" (there are also {', '.join(others)}: --image_column)" * bool(others)
                        + (f", classes of the column {label}" if label else ", no column of classes")]
        self.images, self.column, self.rows = images, column, torch.tensor(order)

    def location(self, index: int) -> str:
        return f"{self.root} row {int(self.rows[index])} ({self.names[index]})"

    def places(self) -> list[Hashable]:
        return [(self.root, row) for row in self.rows.tolist()]  # several rows may have one name

    def read(self, index: int) -> bytes:
        image = self.images[int(self.rows[index])][self.column] or {}
        if image.get("bytes"):
            return image["bytes"]
        if image.get("path"):
            return read_bytes(image["path"])
        raise UnreadableImage(f"cannot read the image {self.location(index)} (the row has none)")


def parts_of(path: str) -> tuple[str, str, str]:
    """(name or folder, configuration, split) of hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT; "" where not given.

    Raises:
        ConfigError: there is no name, or the package is not installed.
    """
    require_packages(path, "datasets")
    text = os.path.expanduser(path.removeprefix("hf:"))
    name, *rest = [text] if os.path.exists(text) else text.split(":")
    if not name or len(rest) > 2:
        raise ConfigError(f"{path}: give the name of a data set, {SYNTAX}")
    return name, *([""] * (2 - len(rest))), *rest


def load_split(name: str, config: str, split: str):
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
        else:
            found = [] if split else datasets.get_dataset_split_names(name, config or None)
            return datasets.load_dataset(name, config or None, split=found[0] if len(found) == 1 else split or "train")
    except Exception as error:  # of many packages: about the network, the files, or the name
        reason = "has a split without rows" if saved and isinstance(error, IndexError) else \
            what_is_missing(name, config, split)
        raise ConfigError(f"hf:{name} {reason}" if reason else
                          f"hf:{name} cannot be loaded ({' '.join(str(error).split())[:300]}): check the network and "
                          f"the name, {SYNTAX}") from None
    if config:
        raise ConfigError(f"hf:{name} is a folder of save_to_disk, without configurations: give hf:{name}:{split}")
    chosen = split or ("train" if "train" in splits or len(splits) > 1 else next(iter(splits)))
    if chosen not in splits:
        raise ConfigError(f"hf:{name} has no split {chosen}, but {', '.join(splits)}: give hf:{name}:{min(splits)}")
    return splits[chosen]


def what_is_missing(name: str, config: str, split: str) -> str:
    """Say that a data set has no such configuration or split, and which it has; empty if that is not the reason."""
    import datasets

    with contextlib.suppress(Exception):
        configs = datasets.get_dataset_config_names(name)
        if config and config not in configs:
            return f"has no configuration {config}, but {', '.join(configs)}: give hf:{name}:{configs[0]}:SPLIT"
        try:
            splits = datasets.get_dataset_split_names(name, config or None)
        except ValueError:  # there is no default one
            return f"has the configurations {', '.join(configs)}: give one with its split, hf:{name}:{configs[0]}:SPLIT"
        if (split or "train") not in splits:
            start = f"hf:{name}:{config}" if config else f"hf:{name}"
            return f"has no split {split or 'train'}, but {', '.join(splits)}: give {start}:{splits[0]}"
    return ""


def image_columns(dataset) -> list[str]:
    return [name for name, feature in dataset.features.items() if type(feature).__name__ == "Image"]


def image_column(dataset, path: str, column: str = "") -> str:
    """The column asked for, which may also hold the bytes of image files, or else the first one of images.

    Raises:
        ConfigError: there is none.
    """
    columns = image_columns(dataset)
    if column in columns or getattr(dataset.features.get(column), "dtype", "") in ("binary", "large_binary"):
        return column
    if column:
        raise ConfigError(f"{path} has no column of images {column}, but {', '.join(columns) or 'none at all'}: give "
                          "one of its columns with --image_column")
    if not columns:
        raise ConfigError(f"{path} has no column of images, but {', '.join(dataset.column_names) or 'none at all'}: "
                          "give a data set with one of type Image, or --image_column with one of bytes")
    return columns[0]


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


# ----------------------------------------------------------------------------------------------------------------------
# Anything else


class OwnImages(NamedImages):
    """Images that a function of the user's opens: FILE.py:ARGUMENT calls open_images(ARGUMENT) of that file.

    The function returns the names of the images and a function from a name to the bytes of an image file. It is called
    again in worker processes that are started anew instead of forked. Nothing is read in the process that starts them,
    since what it had opened, such as a database, could not be used by those that are forked.
    """

    expects = "its open_images returned no names"

    def __init__(self, path: str):
        file, argument = path.split(".py:", 1)
        self.file, self.argument = f"{file}.py", argument
        names, self.read_name = self.call()
        order = in_order(names)
        names = [names[i] for i in order]
        super().__init__(path, names, *number_classes(names))

    def call(self) -> tuple[list[str], Callable[[str], bytes]]:
        """What open_images returns.

        Raises:
            ConfigError: there is no such function, it raises, or it returns something else.
        """
        if not os.path.isfile(self.file):
            raise ConfigError(f"there is no file {self.file}, which should have a function open_images")
        try:
            returned = self.call_in_its_folder()
            names, read = returned if isinstance(returned, tuple | list) and len(returned) == 2 else (None, None)
            if callable(read) and not (names is None or callable(names) or isinstance(names, str | bytes)):
                names = list(names)
                if wrong := next((f"{name!r} is {kind(name)}" for name in names if not isinstance(name, str)), ""):
                    raise ConfigError(f"{self.file}: the names that open_images returns must be text, and {wrong}")
                return names, read
        except ConfigError:
            raise
        except (Exception, SystemExit) as error:
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                     if frame.filename == os.path.abspath(self.file)]
            line = f", line {lines[-1]}" if lines else ""
            raise ConfigError(f"{self.file}{line}: {type(error).__name__}: {' '.join(str(error).split())}") from None
        several = ", ".join(map(kind, returned)) if isinstance(returned, tuple | list) and len(returned) < 10 else ""
        raise ConfigError(f"{self.file}: open_images returned {several or kind(returned)}, and should return two "
                          "values: a list of names, and a function from a name to bytes")

    def call_in_its_folder(self) -> object:
        """Run the file, whose folder comes first on the path meanwhile and last from then on, and call open_images."""
        path = os.path.abspath(self.file)
        folder, name = os.path.dirname(path), f"own_images_{Path(path).stem}"
        specification = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(specification)
        sys.modules[name] = module  # where a dataclass looks for its own
        sys.path.insert(0, folder)
        try:
            specification.loader.exec_module(module)
            if not callable(function := getattr(module, "open_images", None)):
                raise ConfigError(f"{self.file} has no function open_images(argument) that returns names, and a "
                                  "function from a name to bytes")
            return function(self.argument)
        finally:
            sys.path.remove(folder)
            if folder not in sys.path:
                sys.path.append(folder)

    def location(self, index: int) -> str:
        return f"{self.root}: {self.names[index]}"

    def read(self, index: int) -> bytes:
        self.read_name = self.read_name or self.call()[1]
        try:
            data = self.read_name(self.names[index])
        except (Exception, SystemExit) as error:  # whatever the function raises is about this image
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UnreadableImage(f"cannot read the image {self.location(index)} ({reason})") from None
        if data is None:
            raise UnreadableImage(f"cannot read the image {self.location(index)} (the function for it returned None)")
        if not isinstance(data, bytes | bytearray):
            raise ConfigError(f"{self.location(index)}: the function that open_images returns gave {kind(data)}, and "
                              "should give the bytes of an image file, such as open(path, 'rb').read()")
        if not data:
            raise UnreadableImage(f"cannot read the image {self.location(index)} (0 bytes)")
        return data

    def __getstate__(self) -> dict:
        return self.__dict__ | {"read_name": None}


def kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
