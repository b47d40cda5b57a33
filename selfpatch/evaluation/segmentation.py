"""Data sets of images with masks of class ids, named in one option; the confusion matrix and mean IoU.


    voc:VOCdevkit/VOC2012             Pascal VOC 2012, train (1,464 images) and val (1,449): 21 classes
    voc_aug:VOCdevkit/VOC2012         the same with SBD's trainaug list (10,582): SegmentationClassAug and
                                      ImageSets/Segmentation/trainaug.txt are needed as well
    ade20k:ADEChallengeData2016       20,210 and 2,000 images, 150 classes; id 0 is not scored
    folders:IMAGES,MASKS              any: both have folders train and val; --num_classes tells how many ids count

Masks are PNGs of ids, of their image's size; 255 is not scored.
"""
import argparse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment

from selfpatch.data.files import IMAGE_SUFFIXES, UnreadableImage, is_image_name, load_ids, load_rgb, open_image, walk
from selfpatch.errors import ConfigError, user_path

IGNORE = 255  # id of pixels that are not scored
SPLITS = {"train": ("train", "training"), "val": ("val", "validation")}  # names of a split's folder
HELP = "voc:FOLDER, voc_aug:FOLDER (SBD's trainaug list), ade20k:FOLDER or folders:IMAGES,MASKS (see --num_classes)"


class Pair(NamedTuple):
    """An image file and its mask file."""
    image: Path
    mask: Path


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
        return load_rgb(pair.image), self.read_ids(pair)

    def read_ids(self, pair: Pair) -> np.ndarray:
        """The class ids of read() alone."""
        ids = load_ids(pair.mask)[0]
        if self.shift:
            ids = ids - np.uint8(1)  # 0 becomes 255
        largest = int(ids[ids != IGNORE].max(initial=0))
        if largest >= self.num_classes:
            raise ConfigError(f"{pair.mask}: has the id {largest + self.shift}, but {self.name} has {self.num_classes} "
                              f"classes, {int(self.shift)} to {self.num_classes - 1 + self.shift}")
        return ids


# ---------------------------------------------------------------- finding pairs

def add_segmentation_data(parser: argparse.ArgumentParser) -> None:
    """Add --data and --num_classes, see find_segmentation_data."""
    parser.add_argument("--data", required=True, help=HELP)
    parser.add_argument("--num_classes", type=int, help="of --data folders: ids below it count")


def find_segmentation_data(text: str, num_classes: int | None = None) -> SegmentationData:
    """The data set of an option --data, see the top of this file.

    All headers are read, so that pairs that do not fit end a job before its work begins.

    Args:
        num_classes: of folders:, which needs it; None for the others.

    Raises:
        ConfigError: no such kind of data set, a folder of another kind, an image without mask, a mask of another size
            than its image, or masks with less than two classes.
    """
    kind, _, place = text.partition(":")
    finders: dict[str, Callable] = {"voc": _voc, "voc_aug": _voc_aug, "ade20k": _ade20k, "folders": _folders}
    if kind not in finders or not place:
        raise ConfigError(f"--data {text}: give {HELP}")
    if kind != "folders" and num_classes is not None:
        raise ConfigError(f"--num_classes {num_classes}: is for folders: only, --data {kind}: has its own")
    if kind == "folders" and not (num_classes and 2 <= num_classes <= IGNORE):
        raise ConfigError(f"--data folders: needs --num_classes, from 2 to {IGNORE}: ids below it count")
    data = finders[kind](place) if kind != "folders" else _folders(place, num_classes)
    check_sizes(data.train + data.val)
    for split, pairs in (("train", data.train), ("val", data.val)):
        check_classes(data, pairs, split)
    return data


def existing_folder(text: str) -> Path:
    """The folder of an option --data; ~ is the home folder.

    Raises:
        ConfigError: there is none.
    """
    folder = user_path(text)
    if not folder.is_dir():
        raise ConfigError(f"--data: there is no folder {folder}")
    return folder


def _voc(place: str) -> SegmentationData:
    root = existing_folder(place)
    return SegmentationData("VOC 2012", _voc_pairs(root, "train", "SegmentationClass"),
                            _voc_pairs(root, "val", "SegmentationClass"), 21)


def _voc_aug(place: str) -> SegmentationData:
    root = existing_folder(place)
    return SegmentationData("VOC 2012 trainaug", _voc_pairs(root, "trainaug", "SegmentationClassAug"),
                            _voc_pairs(root, "val", "SegmentationClass"), 21)


def read_list(root: Path, path: str, what: str) -> list[str]:
    """The names in a text file of a data set, the first word of every line.

    Raises:
        ConfigError: there is no such file, or no name in it.
    """
    if not (root / path).is_file():
        raise ConfigError(f"--data: {root} is not {what}: there is no {path} in it")
    names = [line.split()[0] for line in (root / path).read_text().splitlines() if line.strip()]
    if not names:
        raise ConfigError(f"--data: {root / path} lists nothing")
    return names


def _voc_pairs(root: Path, split: str, masks: str) -> list[Pair]:
    names = read_list(root, f"ImageSets/Segmentation/{split}.txt", "a VOC folder, such as VOCdevkit/VOC2012")
    pairs = [Pair(root / "JPEGImages" / f"{name}.jpg", root / masks / f"{name}.png") for name in names]
    for what in ("image", "mask"):
        if missing := [path for path in (getattr(pair, what) for pair in pairs) if not path.is_file()]:
            raise ConfigError(f"--data: {len(missing)} of {len(pairs)} {what}s of {split}.txt are missing, such as "
                              f"{missing[0]}")
    return pairs


def _ade20k(place: str) -> SegmentationData:
    root = existing_folder(place)
    if missing := [name for name in ("images", "annotations") if not (root / name).is_dir()]:
        raise ConfigError(f"--data: {root} is not ADEChallengeData2016: there is no folder {missing[0]} in it")
    train, val = (find_pairs(*split_folders(root / "images", root / "annotations", split)) for split in SPLITS)
    return SegmentationData("ADE20K", train, val, 150, shift=True)


def _folders(place: str, num_classes: int) -> SegmentationData:
    images, masks = image_and_mask_folders(place)
    train, val = (find_pairs(*split_folders(images, masks, split)) for split in SPLITS)
    return SegmentationData(images.name, train, val, num_classes)


def image_and_mask_folders(place: str) -> tuple[Path, Path]:
    """The two folders of --data folders:IMAGES,MASKS.

    Raises:
        ConfigError: there are not two names, or one of them is no folder.
    """
    parts = place.split(",")
    if len(parts) != 2:
        raise ConfigError(f"--data folders:{place}: give two folders, folders:IMAGES,MASKS")
    images, masks = map(existing_folder, parts)
    return images, masks


def split_folders(images: Path, masks: Path, split: str) -> list[Path]:
    """The folders of a split in a folder of images and one of masks."""
    found = []
    for folder in (images, masks):
        names = [name for name in SPLITS[split] if (folder / name).is_dir()]
        if not names:
            raise ConfigError(f"--data: there is no folder {' or '.join(SPLITS[split])} in {folder}")
        found.append(folder / names[0])
    return found


def find_pairs(images: Path, masks: Path) -> list[Pair]:
    """Every image below a folder with the mask of the same relative name, without regard to suffixes.

    Raises:
        ConfigError: there are no images, or one has no mask, or there are two masks of one name.
    """
    found = {}
    for path in filter(is_image_name, map(Path, walk(masks))):
        other = found.setdefault(path.relative_to(masks).with_suffix(""), path)
        if other != path:
            raise ConfigError(f"--data: {other} and {path.name} are masks of the same name: which one is meant is not "
                              "known, so move one of them out of the folder")
    paths = [path for path in map(Path, walk(images)) if is_image_name(path)]
    if not paths:
        raise ConfigError(f"--data: there are no images in {images} ({' '.join(IMAGE_SUFFIXES)})")
    missing = [path for path in paths if path.relative_to(images).with_suffix("") not in found]
    if missing:
        raise ConfigError(f"--data: {len(missing)} of {len(paths)} images in {images} have no mask in {masks}, such "
                          f"as {missing[0].relative_to(images)}")
    return [Pair(path, found[path.relative_to(images).with_suffix("")]) for path in paths]


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


def header_size(path: Path) -> tuple[int, int]:
    """Width and height from an image file's header.

    Raises:
        UnreadableImage: it has none.
    """
    try:
        with Image.open(path) as image:
            return image.size
    except Exception:
        open_image(path)  # says what is wrong
        raise UnreadableImage(f"cannot read the image {path}: replace it or remove it") from None


def check_sizes(pairs: list[Pair]) -> None:
    """Raise ConfigError if a mask is not of its image's size, or one of the two is no image."""
    with ThreadPoolExecutor(8) as executor:
        sizes = executor.map(lambda pair: (header_size(pair.image), header_size(pair.mask)), pairs)
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
