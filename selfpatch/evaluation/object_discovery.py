"""An image's main object by the similarity of its patches: LOST and TokenCut; CorLoc scores their boxes.

Both take an attention layer's keys [N, D], not normalised, of a grid of h × w patches, row by row, and return a mask
of patches; box_of converts it to pixels. Data sets of images with boxes are given by one option:

    voc:VOCdevkit/VOC2007             Pascal VOC 2007 or 2012: ImageSets/Main/trainval.txt, boxes of Annotations/*.xml
    coco:instances.json,IMAGES        COCO's annotations, without crowds, and the folder of their images
    folders:IMAGES,MASKS              masks of object ids, each with the box around its pixels; DAVIS is
                                      folders:JPEGImages/480p,Annotations/480p
    hf:NAME,COLUMN                    a Hugging Face data set with a column of such masks
    images:FOLDER                     images alone, without scores; also images:hf:NAME

In the place of a folder there may be an archive or a list, see image_trees.py. Boxes are xmin, ymin, xmax, ymax in
pixels from 0, the last two exclusive.
"""
import json
import math
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

from selfpatch.data.files import IMAGE_SUFFIXES
from selfpatch.errors import ConfigError, user_path, warn
from selfpatch.evaluation.image_trees import Item, Pair, Tree, find_pairs
from selfpatch.evaluation.segmentation import (
    check_sizes,
    check_source_options,
    hub_pairs,
    image_and_mask_trees,
    read_list,
    split_column,
)
from selfpatch.evaluation.tables import unique_names
from selfpatch.video.davis import VOID, read_mask
from selfpatch.whole_files import regular

HELP = ("voc:PLACE, coco:JSON,IMAGES, folders:IMAGES,MASKS or hf:NAME,COLUMN (boxes around the masks), or images:PLACE "
        "(no boxes); each a folder, archive or list")
EXPANSION = 100  # LOST compares its seed with so many patches of least degree
TAU, EPSILON = 0.2, 1e-5  # TokenCut connects patches whose cosine exceeds TAU; other edges have the weight EPSILON

Grid = tuple[int, int]  # rows and columns of patches


def lost_degrees(correlations: torch.Tensor) -> torch.Tensor:
    """Number of other patches with a positive correlation to each patch, [N], from keys @ keys.T."""
    positive = correlations > 0
    return positive.sum(1) - positive.diagonal().long()


def lost(keys: torch.Tensor, grid: Grid, expansion: int = EXPANSION) -> tuple[np.ndarray, int]:
    """Localising objects with self-supervised transformers (Siméoni et al. 2021, Sec. 3).

    The seed is the patch with the fewest positive correlations: objects cover less of an image than its background.
    Patches that correlate positively with the seed, of the `expansion` patches of least degree, vote for the object.

    Degrees are small integers, so several patches often have the least; of these, the seed is the one with the largest
    sum of positive correlations.

    Returns:
        The object, bool [h, w], and the seed's index.
    """
    correlations = keys.float() @ keys.float().T
    order = correlations.clamp(min=0).sum(1).argsort(descending=True, stable=True)
    order = order[lost_degrees(correlations)[order].argsort(stable=True)]
    seed, similar = int(order[0]), order[:expansion]
    similar = similar[correlations[seed, similar] > 0]
    foreground = (correlations[similar].sum(0) > 0).reshape(grid).cpu().numpy()
    foreground.flat[seed] = True
    labels = components(foreground)
    return labels == labels.flat[seed], seed


def cut_vector(keys: torch.Tensor, tau: float = TAU, epsilon: float = EPSILON) -> torch.Tensor:
    """Second smallest generalised eigenvector of (D − A) v = λ D v, float64 [N]; its sign is arbitrary.

    A joins patches whose cosine is above tau with weight 1, all others with epsilon. With v = D^−½ u, u is the second
    largest eigenvector of the symmetric matrix D^−½ A D^−½, whose largest is D^½ 1.
    """
    if len(keys) == 1:
        return torch.ones(1, dtype=torch.float64)
    keys = F.normalize((keys.cpu() if keys.device.type == "mps" else keys).float(), dim=-1)
    edges = torch.where(keys @ keys.T > tau, 1.0, epsilon).double()
    scale = edges.sum(1).rsqrt()
    return second_eigenvector(edges.mul_(scale[:, None]).mul_(scale), F.normalize(1 / scale, dim=0)) * scale


def second_eigenvector(matrix: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """Second largest eigenvector of a symmetric float64 matrix [N, N], N ≥ 2, whose largest eigenvalue is 1.

    Args:
        first: the eigenvector of that eigenvalue, of unit length [N].
    """
    def multiply(vector: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(vector.ravel()).to(matrix.device)
        return (matrix @ x - first * (first @ x)).cpu().numpy()  # the first's eigenvalue becomes 0

    start = np.random.default_rng(0).standard_normal(len(matrix))  # ARPACK's own is drawn anew for each call
    # Lanczos iterations take a tenth of the time of scipy.linalg.eigh(subset_by_index=…) at N = 1620
    operator = LinearOperator(tuple(matrix.shape), multiply, dtype=np.float64)
    try:
        vectors = eigsh(operator, 1, which="LA", v0=start)[1]
    except ArpackError:  # all patches are alike, which leaves a matrix of zeros, or no convergence
        return torch.linalg.eigh(matrix).eigenvectors[:, -2]
    return torch.from_numpy(vectors[:, 0]).to(matrix.device)


def tokencut(keys: torch.Tensor, grid: Grid, tau: float = TAU, epsilon: float = EPSILON) -> np.ndarray:
    """Normalised cut of an image's patches (Wang et al. 2022, Sec. 3.2); the object, bool [h, w].

    The object is the connected part with the patch of largest |v|, on that patch's side of the mean. Patches with the
    same edges have the same value up to rounding: of several parts with the largest |v|, the one with most such
    patches counts.
    """
    vector = cut_vector(keys, tau, epsilon)
    largest = vector.abs() >= vector.abs().max() * (1 - 1e-7)
    high = vector > vector.mean()
    foreground = high if high[largest].double().mean() > 0.5 else ~high
    labels, largest = components(foreground.reshape(grid).cpu().numpy()), largest.reshape(grid).cpu().numpy()
    return labels == np.bincount(labels[largest & (labels > 0)]).argmax()


def components(mask: np.ndarray) -> np.ndarray:
    """The 4-connected components of a mask [h, w], numbered from 1; 0 outside the mask."""
    return cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)[1]


def box_of(mask: np.ndarray, patch_size: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """xmin, ymin, xmax, ymax in pixels around a mask of patches [h, w], clipped to an image of size (height, width)."""
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    return (int(columns[0]) * patch_size, int(rows[0]) * patch_size,
            min((int(columns[-1]) + 1) * patch_size, size[1]), min((int(rows[-1]) + 1) * patch_size, size[0]))


def box_iou(box: tuple[int, int, int, int], boxes: np.ndarray) -> np.ndarray:
    """IoU of a box with each of boxes [B, 4], float64 [B]; xmax and ymax are exclusive."""
    box, boxes = np.asarray(box, np.float64), np.asarray(boxes, np.float64).reshape(-1, 4)
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    overlap = sides.clip(0).prod(1)
    return overlap / ((box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(1) - overlap)


def is_found(box: tuple[int, int, int, int], boxes: np.ndarray) -> bool:
    """Whether a box counts for CorLoc: IoU 0.5 or more with any of the true boxes [B, 4]."""
    return bool((box_iou(box, boxes) >= 0.5).any())


# ---------------------------------------------------------------- data sets with boxes

class BoxImage(NamedTuple):
    """An image, its name in results (see tables.unique_names), and its boxes [B, 4] or the mask to read them from."""
    name: str
    image: Item
    boxes: np.ndarray | Item | None

    def read_boxes(self) -> np.ndarray | None:
        """Boxes, float64 [B, 4]; None if they are unknown."""
        if isinstance(self.boxes, Item):
            return boxes_of_mask(read_mask(str(self.boxes), data=self.boxes.read())[0])
        return self.boxes


def boxes_of_mask(mask: np.ndarray) -> np.ndarray:
    """The box around the pixels of every id [H, W] but 0 and 255, float64 [B, 4]."""
    boxes = []
    for number in sorted(set(np.unique(mask).tolist()) - {0, VOID}):
        rows, columns = (mask == number).any(1).nonzero()[0], (mask == number).any(0).nonzero()[0]
        boxes.append((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    return np.array(boxes, np.float64).reshape(-1, 4)


def sound_box(numbers: object, sized: bool, size: Sequence[object]) -> tuple[float, ...] | None:
    """xmin, ymin, xmax, ymax of COCO's x, y, width, height (sized) or VOC's sides, as numbers or text.

    VOC counts pixels from 1, up to the last inside. None if they are not four finite numbers, or the image has no
    pixels within.

    Args:
        size: width and height of the image, as the file has them; None or 0 if they are not known.
    """
    if not isinstance(numbers, list) or len(numbers) != 4:
        return None
    try:
        a, b, c, d = map(float, numbers)
        width, height = (float(side or 0) or math.inf for side in size)
    except (TypeError, ValueError, OverflowError):
        return None
    box = (a, b, a + c, b + d) if sized else (a - 1, b - 1, c, d)
    inside = box[0] < box[2] > 0 and box[1] < box[3] > 0 and box[0] < width and box[1] < height
    return box if inside and all(map(math.isfinite, box)) else None


def find_box_data(text: str, suffixes: Sequence[str] = (), column: str = "") -> list[BoxImage]:
    """The images of an option --data, see the top of this file. A line reports boxes that are left out.

    Args:
        suffixes, column: --image_suffix of folders: and images:, --image_column of hf: and images:hf:.

    Raises:
        ConfigError: unknown kind of data set, a folder of another kind, a missing file, or no box in a data set that
            should have some.
    """
    kind, _, place = text.partition(":")
    finders: dict[str, Callable] = {"voc": _voc, "coco": _coco, "folders": partial(_folders, suffixes=suffixes),
                                    "hf": partial(_hub, image_column=column),
                                    "images": partial(_images, suffixes=suffixes, column=column)}
    if kind not in finders or not place:
        raise ConfigError(f"--data {text}: give {HELP}")
    check_source_options(kind, suffixes, column)
    images = finders[kind](place)
    if kind != "images" and not any(len(image.read_boxes()) for image in images):  # reading one image is usually enough
        masks = f"; {VOID} is no object, beside other ids" * (kind in ("folders", "hf"))
        raise ConfigError(f"--data {text}: has no boxes{masks}; images:FOLDER works without them")
    return images


def report_odd(odd: list[str], file: str, why: str = "they are not four numbers around pixels of their image") -> None:
    """Name the first of the boxes that are left out."""
    if odd:
        warn(f"{len(odd)} boxes of {file} are left out, since {why}: {odd[0]}" + ", …" * (len(odd) > 1))


def _voc(place: str) -> list[BoxImage]:
    tree, odd = Tree(place), []
    names = [words[0] for words in
             read_list(tree, "ImageSets/Main/trainval.txt", "a VOC folder, such as VOCdevkit/VOC2007")]
    images = tree.find([f"JPEGImages/{name}.jpg" for name in names])
    boxes = [voc_boxes(tree, f"Annotations/{name}.xml", odd) for name in names]
    report_odd(odd, place)
    return list(map(BoxImage, unique_names([f"{name}.jpg" for name in names]), images, boxes))


def voc_boxes(tree: Tree, path: str, odd: list[str]) -> np.ndarray:
    """The boxes of VOC's annotation of an image, float64 [B, 4].

    Args:
        odd: what is no box is added in words.

    Raises:
        ConfigError: the file is missing, or not VOC's.
    """
    if (content := tree.text(path)) is None:
        raise ConfigError(f"cannot read the boxes {tree.place}/{path}: there is no such file")
    try:
        annotation = ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # the last two: of another encoding, or of none
        raise ConfigError(f"{tree.place}/{path} is not VOC's annotation of an image ({error})") from None
    boxes, size = [], [annotation.findtext(f"size/{side}") for side in ("width", "height")]
    for one in annotation.iterfind("object/bndbox"):
        sides = [one.findtext(side) for side in ("xmin", "ymin", "xmax", "ymax")]
        if (box := sound_box(sides, False, size)) is None:
            odd.append(f"{path} has {sides}")
        else:
            boxes.append(box)
    return np.array(boxes, np.float64).reshape(-1, 4)


def _coco(place: str) -> list[BoxImage]:
    file, _, folder = place.rpartition(",")
    if not file:
        raise ConfigError(f"--data coco:{place}: give a file and a folder, coco:JSON,IMAGES")
    try:
        content = json.loads(Path(regular(user_path(file))).read_text(encoding="utf-8-sig"))
        images = coco_images(content["images"], file)
        boxes = coco_boxes(content["annotations"], images, file)
        names = unique_names(files := [image["file_name"] for image in images.values()])
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"--data coco: cannot read {file} ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"--data coco: {file} has no instances in COCO's format ({error!r})") from None
    return [BoxImage(name, item, np.array(boxes[number], np.float64).reshape(-1, 4))
            for name, item, number in zip(names, Tree(folder).find(files), images, strict=True)]


def id_of(value: object) -> str:
    """An id of COCO's as text: 1, 1.0 and "1" are the same, since programs write it differently in two lists."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def coco_images(listed: list[dict], file: str) -> dict[str, dict]:
    """COCO's images by id. A line reports images that are listed several times; with one id they count once.

    Raises:
        ConfigError: two images have the same id.
    """
    images = {}
    for image in listed:
        if images.setdefault(number := id_of(image["id"]), image)["file_name"] != image["file_name"]:
            raise ConfigError(f"--data coco: {file} has several images of the id {number}: their boxes are mixed up")
    files = Counter(image["file_name"] for image in listed)
    if repeated := [name for name, count in files.items() if count > 1]:
        warn(f"{len(repeated)} images of {file} are listed several times, and count once for each id: {repeated[0]}"
             + ", …" * (len(repeated) > 1))
    return images


def coco_boxes(annotations: list[dict], images: dict[str, dict], file: str) -> dict[str, list[tuple[float, ...]]]:
    """The boxes of COCO's annotations by image, see coco_images."""
    boxes, odd, unknown = defaultdict(list), [], []
    for found in annotations:
        if found.get("iscrowd") in (1, "1"):
            continue
        image, which = images.get(number := id_of(found.get("image_id"))), f"annotation {found.get('id')} of image"
        if image is None:
            unknown.append(f"{which} {found.get('image_id')}")
        elif (box := sound_box(found.get("bbox"), True, (image.get("width"), image.get("height")))) is None:
            odd.append(f"{which} {found['image_id']} has {found.get('bbox')}")
        else:
            boxes[number].append(box)
    report_odd(odd, file)
    report_odd(unknown, file, "their image is not among its images")
    return boxes


def _folders(place: str, suffixes: Sequence[str]) -> list[BoxImage]:
    images, masks = (tree.part() for tree in image_and_mask_trees(place, suffixes))
    return with_masks(images.numbered()[1], find_pairs(images, masks, suffixes))


def _hub(place: str, image_column: str) -> list[BoxImage]:
    name, column = split_column(place)
    pairs = hub_pairs(f"hf:{name}", column, image_column)
    return with_masks([pair.image.images.names[pair.image.index] for pair in pairs], pairs)


def with_masks(names: list[str], pairs: list[Pair]) -> list[BoxImage]:
    check_sizes(pairs)
    return [BoxImage(name, *pair) for name, pair in zip(unique_names(names), pairs, strict=True)]


def _images(place: str, suffixes: Sequence[str], column: str) -> list[BoxImage]:
    part = Tree(place, suffixes, column).part()
    numbers, names = part.numbered()
    if not names:
        raise ConfigError(f"--data: there are no images in {place} ({' '.join(suffixes or IMAGE_SUFFIXES)})")
    return [BoxImage(name, Item(part.images, number), None)
            for name, number in zip(unique_names(names), numbers.tolist(), strict=True)]
