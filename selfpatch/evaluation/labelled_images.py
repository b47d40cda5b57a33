"""Images with classes, from every form of data that training reads (data/sources.py), for k-NN and linear probes.

    images = open_labelled("/path/to/imagenet/val", "--data_path")
    train, val = open_pair(Places("/path/to/imagenet"))                       # train/ and val/ in it
    train, val = open_pair(Places(train="train.zip", val="ILSVRC2012_img_val.tar", val_labels="labels.txt"))
"""
import contextlib
import copy
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from selfpatch.data.archives import ArchiveImages
from selfpatch.data.files import UnreadableImage, load_rgb
from selfpatch.data.hub import OwnImages
from selfpatch.data.names import NamedImages, class_folder, number_classes
from selfpatch.data.sources import as_list, check_paths
from selfpatch.distributed.processes import get_rank, get_world_size
from selfpatch.distributed.workers import worker_options
from selfpatch.errors import ConfigError, warn
from selfpatch.evaluation.image_trees import NamedPart, open_reported, read_labels

Paths = str | Path | list[str]
PARTS = ("train", "val")
HUB_SPLITS = ("train", "validation")
SPLITS = {"train", "training", "val", "valid", "validation", "test"}
COMPARED = 8  # images of equal names, to tell copies


def eval_transform(size: int = 224) -> v2.Transform:
    """PIL image -> uint8 [3, size, size]: short side 256/224 of size, bicubic, then the centre (DINO's evaluation)."""
    return v2.Compose([v2.Resize(round(size * 256 / 224), v2.InterpolationMode.BICUBIC), v2.CenterCrop(size),
                       v2.PILToTensor()])


class LabelledImages(Dataset):
    """Images with classes: (uint8 [3, H, W], class, error or "").

    An unreadable file is a black image of class -1.

    Args:
        images: all of the source.
        transform: PIL image -> uint8 [3, H, W].
        indices: the images of this data set.
        labels: the class of each of them.
        classes: names of the classes.
    """

    def __init__(self, images: NamedImages, transform: Callable, indices: torch.Tensor, labels: torch.Tensor,
                 classes: list[str]):
        self.images, self.transform, self.classes = images, transform, classes
        self.indices, self.labels = indices, labels.to(torch.int32)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def source(self) -> str:
        return self.images.source

    def read(self, index: int) -> bytes:
        return self.images.read(int(self.indices[index]))

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, str]:
        try:
            image = load_rgb(self.images.location(int(self.indices[index])), self.read(index))
        except UnreadableImage as error:
            return torch.zeros_like(self.transform(v2.functional.to_pil_image(torch.zeros(3, 8, 8)))), -1, str(error)
        return self.transform(image), int(self.labels[index]), ""

    def subset(self, indices: Sequence[int] | torch.Tensor) -> "LabelledImages":
        """These images alone; the classes stay."""
        part, chosen = copy.copy(self), torch.as_tensor(indices, dtype=torch.int64)
        part.indices, part.labels = self.indices[chosen], self.labels[chosen]
        return part


def share_loader(images: LabelledImages, batch_size: int, num_workers: int = 0, on_gpu: bool = False) -> DataLoader:
    """Batches of this process's share of the images: r, r + world size, …"""
    share = images.subset(torch.arange(get_rank(), len(images), get_world_size()))
    return DataLoader(share, batch_size, pin_memory=on_gpu, **worker_options(num_workers))


# ---------------------------------------------------------------- one set

def open_labelled(paths: Paths, option: str, transform: Callable | None = None) -> LabelledImages:
    """The images of a folder, list, archives or data set; transform None is eval_transform().

    Raises:
        ConfigError: there are none, or they have no classes; the message names the option.
    """
    return with_classes(NamedPart(open_reported(paths, option)), option, transform)


def with_classes(part: NamedPart, option: str, transform: Callable | None = None,
                 labels_option: str = "") -> LabelledImages:
    """The images of a part that have a class. A line reports images without class, and classes without images.

    Args:
        option, labels_option: for messages; the second would give classes to images without.

    Raises:
        ConfigError: no image has a class.
    """
    images, classes = part.images, part.images.classes
    indices, labels = torch.arange(len(images)), images.labels
    if part.top:
        indices, names = part.numbered()
        classes, labels = (classes, labels[indices]) if has_given_classes(images) else number_classes(names)
        labels = torch.as_tensor(labels)
    known, found = labels >= 0, sorted(set(labels.tolist()) - {-1})
    if not found:
        raise ConfigError(f"{option}: {images.source} has no folders in it that could be classes: images go into one "
                          "folder for each, such as dog/0001.jpg; in a list a class may follow each path, and an hf: "
                          "data set needs a column of them" + f"; or give {labels_option}" * bool(labels_option))
    empty = [classes[i] for i in sorted(set(range(len(classes))) - set(found))]
    for text in [f"{int((~known).sum())} images without a class are left out"] * (not known.all()) + [
            f"no images of {shortened(empty)}: {len(found)} classes count"] * bool(empty):
        warn(f"{option} {images.source}: {text}")
    labels = torch.searchsorted(torch.tensor(found), labels[known].long())
    return LabelledImages(images, transform or eval_transform(), indices[known], labels, [classes[i] for i in found])


def with_labels(part: NamedPart, path: str | Path, classes: list[str], transform: Callable | None = None,
                option: str = "--val_labels") -> LabelledImages:
    """The images of a part with the classes that a file gives them, which are among those of the training images."""
    indices, names = part.numbered()
    one_order = os.path.isdir(part.images.source) or isinstance(part.images, ArchiveImages)
    labels = read_labels(path, names, classes, one_order)
    if len(set(labels)) == 1:
        raise ConfigError(f"{option} {path} gives all images one class, {classes[labels[0]]}: there is nothing to tell "
                          "apart")
    return LabelledImages(part.images, transform or eval_transform(), indices, torch.tensor(labels), classes)


def has_given_classes(images: NamedImages) -> bool:
    """Whether classes come from a list's lines or a column, not from the folders."""
    return bool(images.classes) and not set(map(class_folder, images.names)) >= set(images.classes)


def shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + ", …" * (len(names) > 5)


def hold_out(images: LabelledImages, share: float,
             option: str = "--val_share") -> tuple[LabelledImages, LabelledImages]:
    """Split every class into training images and a share of test images, evenly spaced in the order.

    Raises:
        ConfigError: the share is not between 0 and 1, or leaves no image on one side; the message names the option.
    """
    if not 0 < share < 1:
        raise ConfigError(f"{option} {share:g}: give a share between 0 and 1, such as 0.1")
    train, val, seen, sides = [], [], {}, {}
    for i, (place, (label, _)) in enumerate(identities(images)):
        if place not in sides:  # an image that is listed twice stays on one side
            n = seen[label] = seen.get(label, 0) + 1
            sides[place] = val if int(n * share) > int((n - 1) * share) else train
        sides[place].append(i)
    if not train or not val:
        raise ConfigError(f"{option}: a share of {share:g} leaves {len(train)} images to compare with and {len(val)} "
                          "to test: give another share, or more images")
    return images.subset(train), images.subset(val)


# ---------------------------------------------------------------- training and test images

class Places(NamedTuple):
    """Where training and test images are: data alone, or train and val.

    data has train/ and val/ in it, or is a Hugging Face data set with the splits train and validation.

    val_share: the share of each class of data to test, where data is one set.
    val_labels: file of the test images' classes, see image_trees.read_labels.
    option: that gives data, for messages.
    undivided_share: val_share where data turns out to be one set; None refuses such data.
    suffixes, column: see sources.open_images.
    """
    data: Paths | None = None
    train: Paths | None = None
    val: Paths | None = None
    val_share: float | None = None
    val_labels: str | Path | None = None
    option: str = "--data_path"
    undivided_share: float | None = None
    suffixes: Sequence[str] = ()
    column: str = ""

    def open(self, paths: Paths, option: str = "") -> NamedImages:
        return open_reported(paths, option or self.option, self.suffixes, self.column)

    @property
    def labels_option(self) -> str:
        return "--val_labels" if self.option == "--data_path" else "--knn_val_labels"


def open_pair(places: Places, train_transform: Callable | None = None,
              transform: Callable | None = None) -> tuple[LabelledImages, LabelledImages]:
    """Training and test images.

    Raises:
        ConfigError: there are none, the two have different classes or images in common, there is one class only, or
            options contradict.
    """
    data, option = places.data, places.option
    if bool(data) == bool(places.train or places.val) or bool(places.train) != bool(places.val):
        raise ConfigError("give either --data_path, with train/ and val/ in it, or both --train_path and --val_path")
    if places.val_share is not None and (not data or places.val_labels):
        raise ConfigError("--val_share divides the images of --data_path: give that alone")
    if places.val_labels and not os.path.isfile(places.val_labels):
        raise ConfigError(f"{places.labels_option} {places.val_labels}: there is no regular file of that name")
    if not data:
        options = "--train_path", "--val_path"
        pair = [NamedPart(places.open(*one)) for one in zip((places.train, places.val), options, strict=True)]
    else:
        pair = find_parts(places) if places.val_share is None else [NamedPart(places.open(data))]
        options = option, option
    share = places.undivided_share if places.val_share is None else places.val_share
    if len(pair) == 2:
        train = with_classes(pair[0], options[0], train_transform or transform)
        val = (with_labels(pair[1], places.val_labels, train.classes, transform, places.labels_option)
               if places.val_labels else with_classes(pair[1], options[1], transform, places.labels_option))
        check_apart(train, val)
    elif share is None or places.val_labels:
        advice = ": give --train_path and --val_path, or --val_share 0.1 to test a share of it"
        raise ConfigError(f"{option} {pair[0].images.source} has no train/ and val/ in it"
                          + advice * (option == "--data_path"))
    else:
        every = with_classes(pair[0], option, transform)
        train, val = hold_out(every, share, "--val_share" if places.val_share is not None else option)
        train.transform = train_transform or train.transform
    check_classes(train, val, places.val_share is not None)
    return train, val


def find_parts(places: Places) -> list[NamedPart]:
    """Training and test images of places.data, or all images where it is not divided."""
    check_paths(places.data, places.option, places.suffixes, places.column)
    first, *more = as_list(places.data)
    name = os.path.expanduser(first.removeprefix("hf:"))
    if first.startswith("hf:") and (":" not in name or os.path.exists(name)):  # without a split
        return [NamedPart(places.open(f"{first}:{split}")) for split in HUB_SPLITS]
    if not more and all(os.path.isdir(os.path.join(first, part)) for part in PARTS):
        return [NamedPart(places.open(os.path.join(first, part))) for part in PARTS]
    images = places.open(places.data)
    divided = set(map(class_folder, images.names)) >= set(PARTS)
    return [NamedPart(images, f"{part}/") for part in PARTS] if divided else [NamedPart(images)]


def check_classes(train: LabelledImages, val: LabelledImages, divided: bool) -> None:
    """Raise ConfigError unless both have the same classes, two at least, which are no names of splits."""
    for images in (train, val):
        if SPLITS.issuperset(map(str.lower, images.classes)):
            advice = ("leave --val_share out" if divided and {*PARTS} <= {*images.classes} else
                      "name them train and val, or give one of them")
            raise ConfigError(f"{images.source} has the folders {', '.join(images.classes)}, which are no classes: "
                              + advice)
    if train.classes != val.classes:
        only = sorted(set(train.classes) ^ set(val.classes))
        raise ConfigError(f"{train.source} and {val.source} differ in class folders: {shortened(only)} "
                          f"{'is' if len(only) == 1 else 'are'} in one of them only")
    for images in (train, val):
        if len(found := images.labels.unique()) < 2:
            raise ConfigError(f"{images.source} has images of one class only, {images.classes[int(found[0])]}: there "
                              "is nothing to tell apart. If the class folders are one level deeper, give the folder "
                              "that they are in")


def check_apart(train: LabelledImages, val: LabelledImages) -> None:
    """Raise ConfigError if test images are training images too, or copies: of one class, name and, in some, bytes."""
    places, names, same, alike = {}, {}, [], []
    for i, (place, name) in enumerate(identities(val)):
        places[place] = names[name] = i
    for i, (place, name) in enumerate(identities(train)):  # 1.3 million
        if place in places:
            same.append(places[place])
        elif name in names:
            alike.append((i, names[name]))
    what, copied = "training images too", alike[::-(-len(alike) // COMPARED) or 1]
    if not same and copied and OwnImages not in (type(train.images), type(val.images)):  # which reads in workers alone
        with contextlib.suppress(UnreadableImage):
            if all(train.read(i) == val.read(j) for i, j in copied):
                what, same = "copies of training images, by their names and the bytes of some", [j for _, j in alike]
    if same:
        raise ConfigError(f"{len(same)} of {len(val)} test images are {what}, such as "
                          f"{val.images.location(int(val.indices[min(same)]))}: their classes would be known. Give "
                          "other images to test")


def identities(images: LabelledImages) -> Iterator[tuple[Hashable, tuple[int, str]]]:
    """Where each image lies (see NamedImages.places), and its class with the name of its file."""
    places, names = images.images.places(), list(images.images.names)
    for i, label in zip(images.indices.tolist(), images.labels.tolist(), strict=True):
        yield places[i], (label, names[i].rpartition("/")[2])
