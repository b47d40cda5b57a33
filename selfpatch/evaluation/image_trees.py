"""Where the images, masks, annotations and labels of a data set are: a folder, archives read in place, or a list.

    tree = Tree("VOCtrainval_11-May-2012.tar")          # or VOCdevkit/VOC2012, unpacked
    image, = tree.find(["JPEGImages/2007_000027.jpg"])
    load_rgb(str(image), image.read())
    tree.text("Annotations/2007_000027.xml")
"""
import io
import os
import re
from collections.abc import Hashable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from selfpatch.data.archive_index import make_index
from selfpatch.data.archives import READ_ERRORS, ArchiveImages, read_member
from selfpatch.data.files import IMAGE_SUFFIXES, UnreadableImage, is_chosen, open_image, split_name, walk
from selfpatch.data.names import NamedImages, in_order
from selfpatch.data.sources import check_paths, open_images, text_lines
from selfpatch.errors import ConfigError, warn
from selfpatch.whole_files import regular


def open_reported(paths: str | Path | list[str], option: str, suffixes: Sequence[str] = (),
                  column: str = "", beside: bool = False) -> NamedImages:
    """sources.open_images, with lines about what is left out and which column is read."""
    images = open_images(paths, option, suffixes, column, beside)
    for note in images.notes():
        warn(f"{option} {images.source}: {note.removeprefix(f'{images.source}: ')}")
    return images


class Item(NamedTuple):
    """One of some images: a file of a folder, a member of an archive, a row of a data set."""
    images: NamedImages
    index: int

    def __str__(self) -> str:
        return self.images.location(self.index)

    def read(self) -> bytes:
        """Raises UnreadableImage."""
        return self.images.read(self.index)

    def size(self) -> tuple[int, int]:
        """Width and height from the header, without reading the rest of a file.

        Raises:
            UnreadableImage: there is none.
        """
        try:
            file = regular(str(self)) if type(self.images) is NamedImages else io.BytesIO(self.read())
            with Image.open(file) as image:
                return image.size
        except Exception:
            open_image(str(self), self.read())  # says what is wrong
            raise UnreadableImage(f"cannot read the image {self}: replace it or remove it") from None


class Pair(NamedTuple):
    """An image and its mask."""
    image: Item
    mask: Item


def places_of(items: Iterable[Item]) -> list[Hashable]:
    """Where each item lies, see NamedImages.places."""
    items = list(items)
    places = {images: images.places() for images in {item.images for item in items}}
    return [places[images][index] for images, index in items]


class NamedPart(NamedTuple):
    """Those of some images whose names begin with top, such as train/; all where that is empty."""
    images: NamedImages
    top: str = ""

    @property
    def place(self) -> str:
        return os.path.join(self.images.source, self.top).rstrip("/")

    def numbered(self) -> tuple[torch.Tensor, list[str]]:
        """The images' numbers in the order of a folder, and their names below top."""
        names = [(name[len(self.top):], i) for i, name in enumerate(self.images.names) if name.startswith(self.top)]
        order = in_order([name for name, _ in names]) if self.top else range(len(names))
        return torch.tensor([names[i][1] for i in order]), [names[i][0] for i in order]


class Tree:
    """The images and texts of a data set by their paths in it: a folder, archives read in place, a list, …

    Args:
        suffixes, column: --image_suffix and --image_column, see sources.open_images.
        report: print lines about what is left out and which column is read.

    Raises:
        ConfigError: there is no such place, or no image in it.
    """

    def __init__(self, place: str, suffixes: Sequence[str] = (), column: str = "", report: bool = True):
        self.place, self.suffixes = os.path.expanduser(place), suffixes
        self.files = None
        if os.path.isdir(self.place):
            check_paths(self.place, "--data", suffixes, column)
        else:
            read = open_reported if report else open_images
            self.files = read(self.place, "--data", suffixes, column, beside=True)

    def part(self, folder: str = "") -> NamedPart:
        """The images below a folder, "" for all; none if there is no such folder."""
        if self.files is not None:
            return NamedPart(self.files, f"{folder}/" if folder else self.top)
        root = os.path.join(self.place, folder)
        names = [path[len(os.path.join(root, "")):] for path in walk(root) if is_chosen(path, self.suffixes)
                 ] if os.path.isdir(root) else []
        return NamedPart(NamedImages(root, [names[i] for i in in_order(names)]))

    def find(self, names: list[str], what: str = "images") -> list[Item]:
        """The images of these paths.

        Raises:
            ConfigError: one of them is missing.
        """
        if self.files is None:
            files = NamedImages(self.place, names)
            found = [i if os.path.isfile(files.location(i)) else None for i in range(len(names))]
        else:
            files, found = self.files, list(map(self.number, names))
        if missing := [name for name, number in zip(names, found, strict=True) if number is None]:
            raise ConfigError(f"--data: {len(missing)} of {len(names)} {what} are missing, such as "
                              f"{os.path.join(self.place, missing[0])}")
        return [Item(files, number) for number in found]

    def number(self, name: str) -> int | None:
        """The number of an archive's or a list's image; of the folders that all share, the last ones may be given."""
        top, parts = f"/{getattr(self.files, 'top', f'{self.files.root}/')}{self.top}", name.split("/")
        for i in range(len(parts)):
            if "/".join(parts[i:]) in self.numbers and top.endswith("/".join(["", *parts[:i], ""])):
                return self.numbers["/".join(parts[i:])]
        return None

    @cached_property
    def numbers(self) -> dict[str, int]:
        return {name[len(self.top):]: i for i, name in enumerate(self.files.names)}

    @cached_property
    def top(self) -> str:
        """The folders in which all images lie, with a / at the end."""
        shared = os.path.commonprefix([min(self.files.names), max(self.files.names)])
        return shared[:shared.rfind("/") + 1]

    def text(self, path: str) -> bytes | None:
        """The bytes of a .txt or .xml file; None if there is none.

        Raises:
            ConfigError: it cannot be read.
        """
        where = os.path.join(self.place, path)
        try:
            if self.files is None:
                return Path(where).read_bytes() if os.path.isfile(where) else None
            archive, position = self.texts.get(path, ("", ()))
            return read_member(archive, *position) if archive else None
        except READ_ERRORS as error:
            raise ConfigError(f"cannot read {where} ({getattr(error, 'strerror', None) or error})") from None

    @cached_property
    def texts(self) -> dict[str, tuple[str, list[int]]]:
        """The archive of each .txt and .xml file, and its position there."""
        found = {}
        for path in self.files.paths if isinstance(self.files, ArchiveImages) else ():
            index = make_index(path, lambda name: name.endswith((".txt", ".xml")))
            names = [name.removeprefix(self.files.top) for name in index.names]
            found |= {name: (path, position) for name, position in zip(names, index.positions.tolist(), strict=True)}
        return found


# ---------------------------------------------------------------- files of labels

def read_labels(path: str | Path, names: list[str], classes: list[str], one_order: bool = True) -> list[int]:
    """The class of each image, by a file with a line "name label" for each, or a label alone for each in their order.

    A name may lack its suffix and its folders, and may come last; separators are tabs, commas and spaces. A label is
    the name of a class, or its number, 0 being the first in sorted order, unless names of classes are numbers. Lines
    about other images are skipped, hence a header, too.

    Args:
        one_order: the images have no order but that of their names, such as that of the lines of a list.

    Raises:
        ConfigError: an image has no label or two, a label is no class, or labels alone may be in another order.
    """
    lines = [line.strip() for line in text_lines(str(path)) if line.strip()]
    labels = named_labels(lines, names)
    if alone := not labels and len(lines) == len(names):
        padded = [re.sub("[0-9]+", lambda number: number[0].zfill(20), name) for name in names]
        if not one_order or in_order(padded) != list(range(len(names))):
            raise ConfigError(f"the labels {path} are without names, and the images have more than one order (that of "
                              "a list or data set, or 2.jpg before 10.jpg): give a line \"name label\" for each")
        labels = list(enumerate(lines))
    if missing := sorted(set(range(len(names))) - {image for image, _ in labels}):
        raise ConfigError(f"the labels {path} have {len(lines)} lines, and no label for {len(missing)} of {len(names)} "
                          f"images, such as {names[missing[0]]}: give a line \"name label\" for each, or a label for "
                          "each in the order of their names")
    known, found = class_numbers(path, {label for _, label in labels}, classes, alone), {}
    for image, label in labels:
        if label not in known:
            raise ConfigError(f"the labels {path} give {names[image]} the class {label}, which is neither one of the "
                              f"{len(classes)} classes of the training images nor a number from 0 to {len(classes) - 1}"
                              ", its place among them where their names are no numbers (ILSVRC's own numbers are in "
                              "another order)")
        if found.setdefault(image, known[label]) != known[label]:
            raise ConfigError(f"the labels {path} give {names[image]} two classes, {classes[found[image]]} and "
                              f"{classes[known[label]]}: remove one of the lines")
    return [found[image] for image in range(len(names))]


def named_labels(lines: list[str], names: list[str]) -> list[tuple[int, str]]:
    """(image, label) of lines "name label", or "label name" where that fits more lines; other lines are skipped."""
    bases, numbers = [os.path.basename(name) for name in names], {}
    for cut in (lambda name: os.path.splitext(name)[0], str):
        for way in (names, bases) if len(set(bases)) == len(names) else (names,):
            numbers |= {cut(name): i for i, name in enumerate(way)}

    def pair(line: str, first: bool) -> tuple[int, str] | None:
        parts = [cut(separator)[::1 if first else -1] for cut in (line.partition, line.rpartition)
                 for separator in "\t, "]
        fits = [(name.strip(), label.strip()) for name, _, label in parts if label and name.strip() in numbers]
        name, label = max(fits, key=lambda one: len(one[0]), default=("", ""))  # a name may have spaces in it
        return (numbers[name], label) if fits else None

    return max(([found for line in lines if (found := pair(line, first))] for first in (True, False)), key=len)


def without_boxes(label: str) -> str:
    """The class of "class x y x y …", as in Kaggle's LOC_val_solution.csv; any other label as it is."""
    first, *rest = label.split()
    return first if all(word == first or re.fullmatch(r"-?\d+(\.\d*)?", word) for word in rest) else label


def class_numbers(path: str | Path, labels: set[str], classes: list[str], alone: bool) -> dict[str, int]:
    """The classes of labels, by their names, or by numbers where all labels are; labels of no class are left out."""
    known = {name: i for i, name in enumerate(classes)}
    words = {label: label if alone or label in known else without_boxes(label) for label in labels}
    if all(map(str.isdecimal, words.values())) and not any(map(str.isdecimal, classes)):
        known = {str(i): i for i in range(len(classes))}
        if "0" not in words.values():
            warn(f"the labels {path} have no 0, which is the first class, {classes[0]}: if they count from 1, all "
                 "classes are wrong")
    return {label: known[word] for label, word in words.items() if word in known}


def find_pairs(images: NamedPart, masks: NamedPart, suffixes: Sequence[str] = ()) -> list[Pair]:
    """Every image of a part with the mask of the same name, without regard to suffixes.

    Args:
        suffixes: --image_suffix; if given, names count up to the first dot, and no image is a mask.

    Raises:
        ConfigError: an image has no mask, or there are two masks of one name.
    """
    split = split_name if suffixes else os.path.splitext
    numbers, names = images.numbered()
    items = [Item(images.images, number) for number in numbers.tolist()]
    mask_numbers, mask_names = masks.numbered()
    candidates = [(Item(masks.images, number), name)
                  for number, name in zip(mask_numbers.tolist(), mask_names, strict=True)]
    if suffixes:
        own, places = set(places_of(items)), places_of(item for item, _ in candidates)
        candidates = [one for one, place in zip(candidates, places, strict=True) if place not in own]
    found = {}
    for item, name in candidates:
        other = found.setdefault(split(name)[0], item)
        if other != item:
            raise ConfigError(f"--data: {other} and {os.path.basename(name)} are masks of the same name: which one is "
                              "meant is not known, so move one of them out of the folder")
    if not names:
        raise ConfigError(f"--data: there are no images in {images.place} ({' '.join(suffixes or IMAGE_SUFFIXES)})")
    stems = [split(name)[0] for name in names]
    if missing := [name for name, stem in zip(names, stems, strict=True) if stem not in found]:
        raise ConfigError(f"--data: {len(missing)} of {len(names)} images in {images.place} have no mask in "
                          f"{masks.place}, such as {missing[0]}")
    return [Pair(item, found[stem]) for item, stem in zip(items, stems, strict=True)]
