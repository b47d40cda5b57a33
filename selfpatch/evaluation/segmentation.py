"""Data sets of images with masks of class ids, named in one option; the confusion matrix and mean IoU.

    voc:VOCdevkit/VOC2012             Pascal VOC 2012, train (1,464 images) and val (1,449): 21 classes
    voc_aug:VOCdevkit/VOC2012         the same with SBD's trainaug list (10,582): SegmentationClassAug and
                                      ImageSets/Segmentation/trainaug.txt are needed as well
    ade20k:ADEChallengeData2016       20,210 and 2,000 images, 150 classes; id 0 is not scored
    folders:IMAGES,MASKS              any: both have folders train and val; --num_classes tells how many ids count
    hf:NAME,COLUMN                    a Hugging Face data set with train and validation, and a column of masks

In the place of a folder there may be an archive or a list, see image_trees.py. Masks are PNGs of ids, of their image's
size; 255 is not scored.
"""
import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment

from selfpatch.data.files import IMAGE_SUFFIXES, load_ids, load_rgb
from selfpatch.data.hub import HubImages, image_columns, load_split, parts_of
from selfpatch.data.sources import add_source_options
from selfpatch.errors import ConfigError, warn
from selfpatch.evaluation.image_trees import Item, NamedPart, Pair, Tree, find_pairs, places_of
from selfpatch.evaluation.labelled_images import HUB_SPLITS

IGNORE = 255  # id of pixels that are not scored
SPLITS = {"train": ("train", "training"), "val": ("val", "validation")}  # names of a split's folder
HELP = ("voc:PLACE, voc_aug:PLACE (SBD's trainaug list), ade20k:PLACE, folders:IMAGES,MASKS or hf:NAME,COLUMN (of "
        "masks), these two with --num_classes; each a folder, archive or list")


class SegmentationData(NamedTuple):
    """A data set: pairs to learn from, pairs to score, and the meaning of ids.

    shift: ids count from 1, and 0 is not scored.
    """
    name: str
    train: list[Pair]
    val: list[Pair]
    num_classes: int
    shift: bool = False

    def read(self, pair: Pair) -> tuple[Image.Image, np.ndarray]:
        """The image as RGB, and class ids uint8 [H, W], 255 where a pixel is not scored.

        Raises:
            ConfigError: a file cannot be read, or an id is not below num_classes.
        """
        return load_rgb(str(pair.image), pair.image.read()), self.read_ids(pair)

    def read_ids(self, pair: Pair) -> np.ndarray:
        """The class ids of read() alone."""
        ids = load_ids(str(pair.mask), pair.mask.read())[0]
        if self.shift:
            ids = ids - np.uint8(1)  # 0 becomes 255
        largest = int(ids[ids != IGNORE].max(initial=0))
        if largest >= self.num_classes:
            raise ConfigError(f"{pair.mask}: has the id {largest + self.shift}, but {self.name} has {self.num_classes} "
                              f"classes, {int(self.shift)} to {self.num_classes - 1 + self.shift}"
                              + f": {self.from_zero}" * self.shift)
        return ids

    @property
    def from_zero(self) -> str:
        """What to do about masks whose ids count from 0, where they should from 1."""
        return f"if the ids count from 0, give folders:IMAGES,MASKS --num_classes {self.num_classes}"

    def check_shift(self, confusion: np.ndarray) -> None:
        """Warn if the last id never occurs in the test masks [C, C], as where ids count from 0 instead of 1."""
        if self.shift and not confusion[-1].any():
            warn(f"no test mask of {self.name} has the id {self.num_classes}: {self.from_zero}, since every class is "
                 "off by one then, and the first one not scored")


# ---------------------------------------------------------------- finding pairs

def add_segmentation_data(parser: argparse.ArgumentParser) -> None:
    """Add --data, --num_classes, --image_suffix and --image_column, see find_segmentation_data."""
    parser.add_argument("--data", required=True, help=HELP)
    parser.add_argument("--num_classes", type=int, help="of --data folders and hf: ids below it count")
    add_source_options(parser)


def check_source_options(kind: str, suffixes: Sequence[str], column: str) -> None:
    """Raise ConfigError if a kind of --data has no use for --image_suffix or --image_column."""
    for option, value, kinds in (("--image_suffix", " ".join(suffixes), ("folders", "images")),
                                 ("--image_column", column, ("hf", "images"))):
        if value and kind not in kinds:
            raise ConfigError(f"{option} {value}: is for --data {kinds[0]}: and images:, not for {kind}:")


def find_segmentation_data(text: str, num_classes: int | None = None, suffixes: Sequence[str] = (),
                           column: str = "") -> SegmentationData:
    """The data set of an option --data, see the top of this file.

    All headers are read, so that pairs that do not fit end a job before its work begins.

    Args:
        num_classes: of folders: and hf:, which need it; None for the others.
        suffixes: --image_suffix of folders:, which chooses the photographs where masks lie beside them.
        column: --image_column of hf:, that of the photographs; "" for the first other one than that of the masks.

    Raises:
        ConfigError: no such kind of data set, a folder of another kind, an image without mask, a mask of another size
            than its image, masks with less than two classes, or images in both training and test.
    """
    kind, _, place = text.partition(":")
    if kind not in ("voc", "voc_aug", "ade20k", "folders", "hf") or not place:
        raise ConfigError(f"--data {text}: give {HELP}")
    own = kind in ("folders", "hf")
    if not own and num_classes is not None:
        raise ConfigError(f"--num_classes {num_classes}: is for folders: and hf: only, --data {kind}: has its own")
    if own and not (num_classes and 2 <= num_classes <= IGNORE):
        raise ConfigError(f"--data {kind}: needs --num_classes, from 2 to {IGNORE}: ids below it count")
    check_source_options(kind, suffixes, column)
    if kind == "folders":
        data = _folders(place, num_classes, suffixes)
    elif kind == "hf":
        data = _hub(place, num_classes, column)
    else:
        data = _ade20k(Tree(place)) if kind == "ade20k" else _voc(Tree(place), kind == "voc_aug")
    check_sizes(data.train + data.val)
    for split, pairs in (("train", data.train), ("val", data.val)):
        check_classes(data, pairs, split)
    train, val = ([pair.image for pair in pairs] for pairs in (data.train, data.val))
    known = set(places_of(train))
    if shared := [image for image, place in zip(val, places_of(val), strict=True) if place in known]:
        raise ConfigError(f"--data: {len(shared)} of {len(data.val)} test images are training images too, such as "
                          f"{shared[0]}: give other images to test")
    return data


def read_list(tree: Tree, path: str, what: str) -> list[list[str]]:
    """The words of every line of a text file of a data set.

    Raises:
        ConfigError: there is no such file, or no word in it.
    """
    if (content := tree.text(path)) is None:
        raise ConfigError(f"--data: {tree.place} is not {what}: there is no {path} in it")
    lines = [words for line in content.decode("utf-8-sig", errors="replace").splitlines() if (words := line.split())]
    if not lines:
        raise ConfigError(f"--data: {tree.place}/{path} lists nothing")
    return lines


def _voc(tree: Tree, augmented: bool) -> SegmentationData:
    train = _voc_pairs(tree, "trainaug", "SegmentationClassAug") if augmented else _voc_pairs(tree, "train")
    return SegmentationData("VOC 2012" + " trainaug" * augmented, train, _voc_pairs(tree, "val"), 21)


def _voc_pairs(tree: Tree, split: str, masks: str = "SegmentationClass") -> list[Pair]:
    """The pairs of a list of names, or of paths as SBD has them: /JPEGImages/x.jpg /SegmentationClassAug/x.png"""
    lines = read_list(tree, f"ImageSets/Segmentation/{split}.txt", "a VOC folder, such as VOCdevkit/VOC2012")
    paths = [(first, *more) if "/" in first else (f"JPEGImages/{first}.jpg", f"{masks}/{first}.png")
             for first, *more in lines]
    if wrong := [i for i, path in enumerate(paths) if len(path) != 2]:
        raise ConfigError(f"--data: {tree.place}/ImageSets/Segmentation/{split}.txt: {' '.join(lines[wrong[0]])}: give "
                          "a name, or the paths of an image and of its mask, on every line")
    images, found = (tree.find([path[i].lstrip("/") for path in paths], f"{what} of {split}.txt")
                     for i, what in enumerate(("images", "masks")))
    return list(map(Pair, images, found))


def _ade20k(tree: Tree) -> SegmentationData:
    if missing := [name for name in ("images", "annotations") if not len(tree.part(name).numbered()[1])]:
        raise ConfigError(f"--data: {tree.place} is not ADEChallengeData2016: there is no folder {missing[0]} in it")
    train, val = (find_pairs(split_part(tree, split, "images/"), split_part(tree, split, "annotations/"))
                  for split in SPLITS)
    return SegmentationData("ADE20K", train, val, 150, shift=True)


def _folders(place: str, num_classes: int, suffixes: Sequence[str]) -> SegmentationData:
    images, masks = image_and_mask_trees(place, suffixes)
    train, val = (find_pairs(split_part(images, split), split_part(masks, split), suffixes) for split in SPLITS)
    return SegmentationData(PurePosixPath(images.place).name, train, val, num_classes)


def _hub(place: str, num_classes: int, image_column: str) -> SegmentationData:
    name, column = split_column(place)
    train, val = (hub_pairs(f"hf:{name}:{split}", column, image_column) for split in HUB_SPLITS)
    return SegmentationData(name, train, val, num_classes)


def split_column(place: str) -> tuple[str, str]:
    """The two names of --data hf:NAME,COLUMN."""
    name, _, column = place.rpartition(",")
    if not name or not column:
        raise ConfigError(f"--data hf:{place}: name the column of masks too, hf:NAME,COLUMN; object discovery without "
                          "boxes takes images:hf:NAME")
    return name, column


def hub_pairs(path: str, column: str, image_column: str = "") -> list[Pair]:
    """The images of a Hugging Face data set, each with the mask that a column of the same row has. A line names both.

    Args:
        column: of the masks.
        image_column: of the images; "" for the first other one.

    Raises:
        ConfigError: there is no such column, or both are the same.
    """
    if not len(dataset := load_split(*parts_of(path))):
        raise ConfigError(f"--data {path} has no rows")
    others = [name for name in image_columns(dataset) if name != column]
    if image_column == column or not (image_column or others):
        raise ConfigError(f"--data {path},{column}: the images are in {column} too: give another column for the masks, "
                          "or --image_column" if image_column else
                          f"--data {path},{column}: there is no column of images beside {column}: give --image_column")
    images, masks = HubImages(path, image_column or others[0], dataset), HubImages(path, column, dataset)
    also = [name for name in others if name != images.column]
    warn(f"--data {path}: images of the column {images.column}, masks of {column}"
         + f" (there are also {', '.join(also)}: --image_column)" * bool(also))
    numbers = masks.rows.argsort()  # of masks, by row
    return [Pair(Item(images, i), Item(masks, int(numbers[row]))) for i, row in enumerate(images.rows.tolist())]


def image_and_mask_trees(place: str, suffixes: Sequence[str] = ()) -> list[Tree]:
    """The two places of --data folders:IMAGES,MASKS.

    Args:
        suffixes: of the images.

    Raises:
        ConfigError: there are not two names, or one of them is no place of images.
    """
    if place.count(",") != 1:
        raise ConfigError(f"--data folders:{place}: give two folders, folders:IMAGES,MASKS")
    images, masks = place.split(",")
    return [Tree(images, suffixes), Tree(masks, report=masks != images)]


def split_part(tree: Tree, split: str, top: str = "") -> NamedPart:
    """The images of a split in a folder."""
    for name in SPLITS[split]:
        if len((part := tree.part(top + name)).numbered()[1]):
            return part
    raise ConfigError(f"--data: there is no folder {' or '.join(SPLITS[split])} with images "
                      f"({' '.join(tree.suffixes or IMAGE_SUFFIXES)}) in {os.path.join(tree.place, top)}")


def check_classes(data: SegmentationData, pairs: list[Pair], split: str) -> None:
    """Raise ConfigError unless a split's masks contain at least two classes.

    Reading one or two masks is usually enough.
    """
    found = set()
    for pair in pairs:
        found |= set(np.unique(data.read_ids(pair)).tolist()) - {IGNORE}
        if len(found) > 1:
            return
    has = f"only the class {min(found) + data.shift}" if found else "no pixel that counts"
    zero = f"0 and {IGNORE} are" if data.shift else f"{IGNORE} is"
    raise ConfigError(f"--data: the {len(pairs)} masks of {split} have {has} ({zero} not scored), such as "
                      f"{pairs[0].mask}: there is nothing to tell apart")


def check_sizes(pairs: list[Pair]) -> None:
    """Raise ConfigError if a mask is not of its image's size, or one of the two is no image."""
    with ThreadPoolExecutor(8) as executor:
        sizes = executor.map(lambda pair: (pair.image.size(), pair.mask.size()), pairs)
        for pair, (image, mask) in zip(pairs, sizes, strict=True):
            if image != mask:
                raise ConfigError(f"{pair.mask}: is {mask[0]}×{mask[1]}, its image {pair.image} {image[0]}×{image[1]}")


# ---------------------------------------------------------------- scores

def confusion_matrix(truth: torch.Tensor, prediction: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Pixels by true class (rows) and predicted class (columns), int64 [C, C].

    Args:
        truth, prediction: ids of one shape; pixels whose truth is IGNORE are left out.
    """
    counted = truth != IGNORE
    pairs = truth[counted].long() * num_classes + prediction[counted].long()
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_iou(confusion: np.ndarray) -> np.ndarray:
    """Intersection over union of every class, float64 [C]; NaN for a class without a true pixel."""
    hits, true = np.diag(confusion).astype(np.float64), confusion.sum(1)
    return np.divide(hits, confusion.sum(0) + true - hits, out=np.full(len(hits), np.nan), where=true > 0)


def mean_iou(confusion: np.ndarray, present_only: bool = False) -> float:
    """Mean of class_iou from 0 to 1.

    Args:
        confusion: [C, C], see confusion_matrix.
        present_only: leave out classes without a true pixel, which count as 0 otherwise.
    """
    iou = class_iou(confusion)
    return float(np.nanmean(iou) if present_only else np.nan_to_num(iou).mean())


def pixel_accuracy(confusion: np.ndarray) -> float:
    """Share of the scored pixels whose class is predicted, from 0 to 1."""
    return float(np.trace(confusion) / max(confusion.sum(), 1))


def match_predictions(confusion: np.ndarray) -> np.ndarray:
    """The confusion matrix after renaming predicted classes, one to one, for the largest sum of IoUs."""
    hits = confusion.astype(np.float64)
    union = confusion.sum(1, keepdims=True) + confusion.sum(0, keepdims=True) - hits
    return confusion[:, linear_sum_assignment(-hits / np.maximum(union, 1))[1]]
