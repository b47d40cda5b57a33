"""Small data sets of images with masks or boxes, made here."""
from pathlib import Path

import numpy as np
from PIL import Image

CLASS_COLOURS = ((40, 60, 200), (220, 60, 40), (60, 200, 60))  # of the classes 0, 1, 2
UNTRAINED = ("--random_weights", "--arch", "vit_tiny", "--num_workers", 0, "--device", "cpu")
TRUE_BOXES = [[8, 8, 40, 40], [56, 32, 88, 56]]  # of picture(0)


def picture(number: int, width: int = 96, height: int = 64) -> tuple[Image.Image, np.ndarray]:
    """Two rectangles, of the classes 1 and 2, on class 0, each class in its colour with noise; ids [H, W]."""
    rng = np.random.default_rng(number)
    ids = np.zeros((height, width), np.uint8)
    ids[8:40, 8 + number:40 + number] = 1
    ids[32:56, 56:88] = 2
    pixels = np.asarray(CLASS_COLOURS)[ids] + rng.integers(-30, 31, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), ids


def write_pair(image: Path, mask: Path, number: int, change=lambda ids: ids, **size: int) -> None:
    for path in (image, mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    photo, ids = picture(number, **size)
    photo.save(image, quality=95)
    Image.fromarray(change(ids)).save(mask)


def make_folders(root: Path, count: int = 4) -> str:
    """IMAGES,MASKS with train and val, 3 classes."""
    for split in ("train", "val"):
        for i in range(count):
            write_pair(root / "images" / split / f"{i}.jpg", root / "masks" / split / f"{i}.png", i)
    return f"{root / 'images'},{root / 'masks'}"


def make_voc(root: Path, count: int = 3) -> Path:
    """A VOC folder with train, val, trainaug and boxes; trainaug has one image more than train, of SBD's masks only."""
    lists = {"Segmentation/train": range(count), "Segmentation/trainaug": range(count + 1),
             "Segmentation/val": range(10, 10 + count), "Main/trainval": range(count)}
    for name, numbers in lists.items():
        path = root / "ImageSets" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{i:06}\n" for i in numbers))
    for i in [*range(count + 1), *range(10, 10 + count)]:
        for masks in ["SegmentationClassAug"] * (i <= count) + ["SegmentationClass"] * (i != count):
            write_pair(root / "JPEGImages" / f"{i:06}.jpg", root / masks / f"{i:06}.png", i)
        boxes = "".join("<object><name>x</name><bndbox>" + "".join(
            f"<{side}>{value}</{side}>" for side, value in zip(("xmax", "xmin", "ymin", "ymax"), box, strict=True))
            + "</bndbox></object>" for box in [(40 + i, 9 + i, 9, 40), (88, 57, 33, 56)])
        (root / "Annotations").mkdir(exist_ok=True)
        (root / "Annotations" / f"{i:06}.xml").write_text(f"<annotation>{boxes}</annotation>")
    return root


def make_ade20k(root: Path, count: int = 3) -> Path:
    for split in ("training", "validation"):
        for i in range(count):
            write_pair(root / "images" / split / f"{i}.jpg", root / "annotations" / split / f"{i}.png", i)
    return root
