"""Data sets of images with boxes around their objects, given by one option:

    voc:VOCdevkit/VOC2007             Pascal VOC 2007 or 2012: ImageSets/Main/trainval.txt, boxes of Annotations/*.xml
    coco:instances.json,IMAGES        COCO's annotations, without crowds, and the folder of their images
    folders:IMAGES,MASKS              masks of object ids, each with the box around its pixels; DAVIS is
                                      folders:JPEGImages/480p,Annotations/480p
    images:FOLDER                     images alone, without scores

Boxes are xmin, ymin, xmax, ymax in pixels from 0, the last two exclusive.
"""
import json
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from selfpatch.data.files import IMAGE_SUFFIXES, is_image_name, walk
from selfpatch.errors import ConfigError, user_path
from selfpatch.evaluation.segmentation import (
    check_sizes,
    existing_folder,
    find_pairs,
    image_and_mask_folders,
    read_list,
)
from selfpatch.evaluation.tables import tell_apart
from selfpatch.video.davis import VOID, read_mask
from selfpatch.whole_files import regular

HELP = "voc:FOLDER, coco:JSON,IMAGES, folders:IMAGES,MASKS (boxes around the masks) or images:FOLDER (no boxes)"


class BoxImage(NamedTuple):
    """An image, its name in results (see unique_names), and its boxes [B, 4] or the mask to read them from."""
    name: str
    path: Path
    boxes: np.ndarray | Path | None

    def read_boxes(self) -> np.ndarray | None:
        """Boxes, float64 [B, 4]; None if they are unknown."""
        return boxes_of_mask(read_mask(self.boxes)[0]) if isinstance(self.boxes, Path) else self.boxes


def boxes_of_mask(mask: np.ndarray) -> np.ndarray:
    """The box around the pixels of every id [H, W] but 0 and 255, float64 [B, 4]."""
    boxes = []
    for number in sorted(set(np.unique(mask).tolist()) - {0, VOID}):
        rows, columns = (mask == number).any(1).nonzero()[0], (mask == number).any(0).nonzero()[0]
        boxes.append((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    return np.array(boxes, np.float64).reshape(-1, 4)


def find_box_data(text: str) -> list[BoxImage]:
    """The images of an option --data, see the top of this file.

    Raises:
        ConfigError: unknown kind of data set, a folder of another kind, a missing file, or no box in a data set that
            should have some.
    """
    kind, _, place = text.partition(":")
    finders: dict[str, Callable] = {"voc": _voc, "coco": _coco, "folders": _folders, "images": _images}
    if kind not in finders or not place:
        raise ConfigError(f"--data {text}: give {HELP}")
    images = finders[kind](place)
    if missing := [image.path for image in images if not image.path.is_file()]:
        raise ConfigError(f"--data {text}: {len(missing)} of {len(images)} images are missing, such as {missing[0]}")
    if kind != "images" and not any(len(image.read_boxes()) for image in images):  # reading one image is usually enough
        masks = f"; {VOID} is no object, beside other ids" if kind == "folders" else ""
        raise ConfigError(f"--data {text}: has no boxes{masks}; images:FOLDER works without them")
    return images


def unique_names(paths: Sequence[str | Path]) -> list[str]:
    """A name for each image: its relative path without the suffix, or with it if another image differs only there.

    Names that are still equal get numbers (see tables.tell_apart). Leading / and .. are removed, so that no name
    points outside its folder.
    """
    plain = [PurePosixPath(*(part for part in PurePosixPath(path).parts if part not in ("/", ".."))) for path in paths]
    names = [str(path.with_suffix("")) for path in plain]
    count = Counter(names)
    return tell_apart([name if count[name] == 1 else str(path) for name, path in zip(names, plain, strict=True)])


def _voc(place: str) -> list[BoxImage]:
    root = existing_folder(place)
    names = read_list(root, "ImageSets/Main/trainval.txt", "a VOC folder, such as VOCdevkit/VOC2007")
    return [BoxImage(name, root / "JPEGImages" / f"{name}.jpg", voc_boxes(root / "Annotations" / f"{name}.xml"))
            for name in names]


def voc_boxes(path: Path) -> np.ndarray:
    """The boxes of VOC's annotation of an image, float64 [B, 4]; VOC counts pixels from 1, up to the last inside.

    Raises:
        ConfigError: the file is missing, or not VOC's.
    """
    try:
        boxes = [[float(found.findtext(side)) for side in ("xmin", "ymin", "xmax", "ymax")]
                 for found in ElementTree.parse(path).getroot().iterfind("object/bndbox")]
    except OSError as error:
        raise ConfigError(f"cannot read the boxes {path} ({error.strerror})") from None
    except (ElementTree.ParseError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is not VOC's annotation of an image ({error})") from None
    return np.array(boxes, np.float64).reshape(-1, 4) - (1, 1, 0, 0)


def _coco(place: str) -> list[BoxImage]:
    file, _, folder = place.rpartition(",")
    if not file:
        raise ConfigError(f"--data coco:{place}: give a file and a folder, coco:JSON,IMAGES")
    root, boxes = existing_folder(folder), defaultdict(list)
    try:
        content = json.loads(Path(regular(user_path(file))).read_text())
        for found in content["annotations"]:
            if not found.get("iscrowd"):
                x, y, width, height = found["bbox"]
                boxes[found["image_id"]].append((x, y, x + width, y + height))
        files = [image["file_name"] for image in content["images"]]
        return [BoxImage(name, root / file, np.array(boxes[image["id"]], np.float64).reshape(-1, 4))
                for name, file, image in zip(unique_names(files), files, content["images"], strict=True)]
    except OSError as error:
        raise ConfigError(f"--data coco: cannot read {file} ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"--data coco: {file} has no instances in COCO's format ({error!r})") from None


def _folders(place: str) -> list[BoxImage]:
    images, masks = image_and_mask_folders(place)
    pairs = find_pairs(images, masks)
    check_sizes(pairs)
    names = unique_names([pair.image.relative_to(images) for pair in pairs])
    return [BoxImage(name, *pair) for name, pair in zip(names, pairs, strict=True)]


def _images(place: str) -> list[BoxImage]:
    root = existing_folder(place)
    paths = [path for path in map(Path, walk(root)) if is_image_name(path)]
    if not paths:
        raise ConfigError(f"--data: there are no images in {root} ({' '.join(IMAGE_SUFFIXES)})")
    names = unique_names([path.relative_to(root) for path in paths])
    return [BoxImage(name, path, None) for name, path in zip(names, paths, strict=True)]
