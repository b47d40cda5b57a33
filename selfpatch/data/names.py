"""The images of a data set by name: what all kinds of data have in common, and those that are files.

A worker of the data loader that reads a Python list gets a copy of it bit by bit, since counting references writes to
every object that is looked at. Names are therefore kept in two tensors, whose memory workers share.
"""
import os
import time
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import pairwise

import torch

from selfpatch.data.files import IMAGE_SUFFIXES, read_bytes, split_name
from selfpatch.errors import is_first_of_machine, try_print

PROGRESS_SECONDS = 5.0  # between two lines about a long scan
SHOWN = 8  # suffixes in a line


class PackedNames(Sequence):
    """Names as one uint8 tensor of their bytes and an int64 tensor of where each ends."""

    def __init__(self, names: Iterable[str]):
        text, ends = bytearray(), []
        for name in names:
            text += name.encode(errors="surrogatepass")  # keeps what Python could not decode
            ends.append(len(text))
        self.text = torch.frombuffer(text, dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
        self.ends = torch.tensor(ends, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        end = int(self.ends[index])
        start = int(self.ends[index - 1]) if index % len(self.ends) else 0
        return self.text[start:end].numpy().tobytes().decode(errors="surrogatepass")

    def __iter__(self) -> Iterator[str]:
        start = 0
        for end in self.ends.tolist():
            yield self.text[start:end].numpy().tobytes().decode(errors="surrogatepass")
            start = end


class NamedImages:
    """Images in order. These are files below a folder; other kinds say themselves where an image is and how to read it.

    Args:
        root: what the names lie below: a folder, an archive, a data set.
        names: of the images, with / between folders.
        classes: names of the classes, empty if none are known.
        labels: the class of each image; None where none are known.

    Attributes:
        unread: how many files look like images but are of formats that are not read, or of no suffix asked for.
        outside: number of images left out because they lie beside class folders.
        suffixes: ends of the names of images.
        remarks: lines for the user about what was found.
        expects: what a source without images should have.
    """

    expects = f"files ending in {' '.join(IMAGE_SUFFIXES)}"

    def __init__(self, root: str, names: Iterable[str], classes: Iterable[str] = (),
                 labels: Sequence[int] | torch.Tensor | None = None):
        names = list(names)
        self.root, self.names, self.classes, self.remarks = root, PackedNames(names), list(classes), remarks_on(names)
        self.source = root  # for messages
        self.labels = torch.full((len(self),), -1) if labels is None else torch.as_tensor(labels)
        self.labels = self.labels.to(torch.int32)
        self.unread, self.outside, self.suffixes = Counter(), 0, IMAGE_SUFFIXES

    def __len__(self) -> int:
        return len(self.names)

    def location(self, index: int) -> str:
        """Where the image is, for messages."""
        return os.path.join(self.root, self.names[index])

    def places(self) -> list[Hashable]:
        """Where each image lies, the same in all data that it is in, after links in its folders."""
        names = [os.path.split(name) for name in self.names]
        folders = {folder: os.path.realpath(os.path.join(self.root, folder)) for folder in {name[0] for name in names}}
        return [os.path.join(folders[folder], name) for folder, name in names]

    def read(self, index: int) -> bytes:
        """The bytes of the image's file.

        Raises:
            UnreadableImage: they cannot be had.
        """
        return read_bytes(self.location(index))

    def sizes(self) -> torch.Tensor | None:
        """The size of each image in bytes, int64 [n], where it is known without looking at each."""
        return None

    def notes(self) -> list[str]:
        """Lines for the user: what was found, and what is left out."""
        return [*self.remarks, *filter(None, [self.unread_summary()])]

    def unread_summary(self) -> str:
        """The files that look like images but are not used, in words; empty if there are none."""
        parts = [f"{in_words(self.unread)} (only {' '.join(self.suffixes)} are)"] * bool(self.unread)
        if self.outside:
            parts.append(f"{self.outside} beside the class folders (move them into one)")
        return f"not read: {'; '.join(parts)}" if parts else ""


def remarks_on(names: list[str]) -> list[str]:
    """Lines about names, in order, that occur twice, or that look like photographs with their masks."""
    remarks, repeated = [], sum(one == other for one, other in pairwise(names))
    if repeated:
        remarks.append(f"{repeated} images have the same name as another one, and count as images of their own")
    end = os.path.splitext(names[0])[1] if names else ""
    if all(name.endswith(end) and name.count(".") == 1 for name in names):  # nearly always, and soon known
        return remarks
    if (alike := len(names) - repeated - len({split_name(name)[0] for name in names})) > 0:
        suffixes = in_words(Counter(split_name(name)[1] for name in names))
        remarks.append(f"{alike} images differ from another one only behind the first dot of the name ({suffixes}): if "
                       "some are masks, --image_suffix chooses")
    return remarks


def in_words(counts: Counter) -> str:
    """4 .jpg, 2 .seg.png"""
    words = ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.most_common(SHOWN)))
    return words + f" and {len(counts) - SHOWN} other kinds" * (len(counts) > SHOWN)


# ----------------------------------------------------------------------------------------------------------------------
# The order of images, and their classes


def class_folder(name: str) -> str:
    """The first folder of a name, "" if there is none."""
    return name[:max(name.find("/"), 0)]


def in_order(names: Sequence[str]) -> list[int]:
    """Indices that sort names as torchvision's ImageFolder does: by class folder, then by folder, then by file.

    Images have the same order in a folder, a list and an archive, and so give the same batches.
    """
    return sorted(range(len(names)), key=lambda i: (class_folder(names[i]), os.path.split(names[i])))


def number_classes(names: Iterable[str]) -> tuple[list[str], list[int]]:
    """The class folders of names, sorted, and the number of each name's; ([], all -1) where no name has a folder."""
    folders = [class_folder(name) for name in names]
    classes = sorted(set(folders) - {""})
    numbers = {name: i for i, name in enumerate(classes)}
    return classes, [numbers.get(folder, -1) for folder in folders]


def common_top(names: Sequence[str]) -> str:
    """The folders that all names share, with a / at the end: those above the class folders, so at least one is left."""
    if not names:
        return ""
    first, last = min(names), max(names)
    top = os.path.commonprefix([first, last])
    top = top[:top.rfind("/") + 1]
    while top and any("/" not in name[len(top):] for name in names):
        top = top[:top.rstrip("/").rfind("/") + 1]
    return top


# ----------------------------------------------------------------------------------------------------------------------


class Progress:
    """Counts what a scan has seen, and prints a line about it every few seconds, from one process of a machine."""

    def __init__(self, what: str, unit: str = "files"):
        self.what, self.unit, self.count = what, unit, 0
        self.next = time.monotonic() + PROGRESS_SECONDS

    def __call__(self, items: Iterable) -> Iterator:
        for item in items:
            self.count += 1
            if self.count % 256 == 0 and time.monotonic() >= self.next:  # a look at the clock costs as much as an item
                self.next = time.monotonic() + PROGRESS_SECONDS
                if is_first_of_machine():
                    try_print(f"{self.what}: {self.count:,} {self.unit} so far")
            yield item
