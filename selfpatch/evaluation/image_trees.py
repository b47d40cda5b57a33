"""Where the images, masks and annotations of a data set are: a folder, archives read in place, or a list.

    tree = Tree("VOCtrainval_11-May-2012.tar")          # or VOCdevkit/VOC2012, unpacked
    image, = tree.find(["JPEGImages/2007_000027.jpg"])
    load_rgb(str(image), image.read())
    tree.text("Annotations/2007_000027.xml")
"""
import io
import os
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from selfpatch.data.archive_index import make_index
from selfpatch.data.archives import READ_ERRORS, ArchiveImages, read_member
from selfpatch.data.files import UnreadableImage, is_chosen, open_image, walk
from selfpatch.data.names import NamedImages, in_order
from selfpatch.data.sources import check_paths, open_images
from selfpatch.errors import ConfigError, warn
from selfpatch.whole_files import regular


def open_reported(paths: str | Path | list[str], option: str, suffixes: Sequence[str] = (),
                  column: str = "", beside: bool = False) -> NamedImages:
    """sources.open_images, with lines about what is left out and which column is read."""
    images = open_images(paths, option, suffixes, column, beside)
    for note in images.notes():
        warn(f"{option} {images.source}: {note.removeprefix(f'{images.source}: ')}")
    return images


real_path = lru_cache(os.path.realpath)


class Item(NamedTuple):
    """One of some images: a file of a folder, a member of an archive, a row of a data set."""
    images: NamedImages
    index: int

    def __str__(self) -> str:
        return self.images.location(self.index)

    def real(self) -> str:
        """Where it is, after links in its root, to find it in two sets."""
        return os.path.join(real_path(self.images.root), self.images.name(self.index))

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
