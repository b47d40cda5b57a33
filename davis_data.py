"""DAVIS 2017 on disk: which sequences there are, their frames, and indexed PNG masks.

    DAVIS/ImageSets/2017/val.txt                     one sequence a line
    DAVIS/JPEGImages/480p/<sequence>/00000.jpg …     frames, named by number
    DAVIS/Annotations/480p/<sequence>/00000.png …    masks: 0 background, 1 … n objects, 255 void
"""
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from errors import ConfigError

VOID = 255
SCALE_SIZE = 480  # short side of the frames that a backbone sees


class DataError(ConfigError):
    """Something in the user's files cannot be used; the message names the file and says why."""


def davis_palette() -> bytes:
    """256 RGB colours: bits 0, 3, 6 … of the id make red, from the highest bit down; 1, 4, … green; 2, 5, … blue."""
    ids = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for channel in range(3):
        for bit in range(3):
            colours[:, channel] |= ((ids >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return colours.tobytes()


DAVIS_PALETTE = davis_palette()


@dataclass(frozen=True)
class Sequence:
    """One video: its name, its frames in order, and the annotation of its first frame."""
    name: str
    frames: tuple[Path, ...]
    annotation: Path

    def annotations(self) -> list[Path] | None:
        """The annotation of every frame, or None where some frames have none."""
        paths = [self.annotation.with_name(f"{frame.stem}.png") for frame in self.frames]
        return paths if all(path.is_file() for path in paths) else None


def read_set(davis_path: str | Path, name: str = "val") -> list[str]:
    """Sequence names of ImageSets/2017/<name>.txt, in the file's order.

    Raises:
        DataError: no such file, no name in it, or one name twice.
    """
    path = Path(davis_path) / "ImageSets" / "2017" / f"{name}.txt"
    if not path.is_file():
        raise DataError(f"{path}: no such file; give the folder that holds ImageSets, JPEGImages and Annotations")
    names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not names:
        raise DataError(f"{path}: lists no sequence")
    repeated = {n for n in names if names.count(n) > 1}
    if repeated:
        raise DataError(f"{path}: lists {', '.join(sorted(repeated))} more than once")
    return names


def numbered_files(folder: Path, suffixes: tuple[str, ...], what: str) -> list[Path]:
    """The files of a folder with one of the suffixes, by the number that each is named after."""
    paths = [p for p in folder.glob("*") if p.suffix.lower() in suffixes and not p.name.startswith(".")]
    if not paths:
        raise DataError(f"{folder}: no {what} ({', '.join('*' + s for s in suffixes)})")
    for path in paths:
        if not (path.stem.isascii() and path.stem.isdigit()):
            raise DataError(f"{path}: the name is no number, so its place in the video is unknown")
    paths.sort(key=lambda path: int(path.stem))
    for one, other in zip(paths, paths[1:], strict=False):
        if int(one.stem) == int(other.stem):
            raise DataError(f"{other}: {one.name} has the same number")
    return paths


def check_name(name: str) -> None:
    """Refuse a sequence name that is more than the name of a folder, such as ../x."""
    if "/" in name or "\\" in name or name.startswith("."):
        raise DataError(f"ImageSets/2017 lists {name!r}, which is not the name of a folder of JPEGImages/480p")


def find_sequence(davis_path: str | Path, name: str) -> Sequence:
    """The frames and first annotation of a sequence, without reading more than two headers.

    Raises:
        DataError: bad name, no frames, frames not named by numbers, no first annotation, one that is not indexed
            or of another size than its frame.
    """
    check_name(name)
    frames = numbered_files(Path(davis_path) / "JPEGImages" / "480p" / name, (".jpg", ".jpeg"), "frames")
    annotation = Path(davis_path) / "Annotations" / "480p" / name / f"{frames[0].stem}.png"
    if not annotation.is_file():
        raise DataError(f"{annotation}: the first frame's annotation is missing")
    size, frame_size = open_mask(annotation).size, image_size(frames[0])
    if size != frame_size:
        raise DataError(f"{annotation}: is {size[0]}×{size[1]}, its frame {frame_size[0]}×{frame_size[1]}")
    return Sequence(name, tuple(frames), annotation)


@contextmanager
def readable(path: str | Path):
    """Turn what PIL raises about a file into a DataError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path}: damaged, or no image ({error})") from None


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height by the file's header."""
    with readable(path), Image.open(path) as image:
        return image.size


def resized_shape(height: int, width: int, scale_size: int = SCALE_SIZE) -> tuple[int, int]:
    """The short side becomes scale_size, the long one keeps the proportion, cut to a multiple of 64."""
    if height > width:
        return scale_size * height // width // 64 * 64, scale_size
    return scale_size, scale_size * width // height // 64 * 64


def load_frame(path: str | Path, scale_size: int = SCALE_SIZE) -> tuple[np.ndarray, int, int]:
    """A frame as resized RGB, uint8 [H, W, 3], and its own height and width.

    Raises:
        DataError: the file is missing, damaged or no image.
    """
    with readable(path), Image.open(path) as check:
        check.load()  # refuses damaged files of which OpenCV would return the readable part
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise DataError(f"{path}: damaged, or no image")
    height, width = image.shape[:2]
    image = cv2.resize(image, resized_shape(height, width, scale_size)[::-1])  # bilinear, on uint8 as published
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB), height, width


def open_mask(path: str | Path) -> Image.Image:
    with readable(path), Image.open(path) as image:
        image.load()
    if image.mode not in ("P", "L"):
        raise DataError(f"{path}: is {image.mode}, not an indexed PNG with one object id a pixel")
    return image


def read_mask(path: str | Path) -> tuple[np.ndarray, bytes]:
    """An indexed PNG -> ids, uint8 [H, W], and its palette (DAVIS's where it has none)."""
    image = open_mask(path)
    palette = bytes(image.getpalette("RGB") or ()) if image.mode == "P" else b""
    return np.array(image), palette or DAVIS_PALETTE


def read_masks(paths: list[Path]) -> np.ndarray:
    """Masks of one size -> uint8 [T, H, W]."""
    masks = [read_mask(path)[0] for path in paths]
    for path, mask in zip(paths, masks, strict=True):
        if mask.shape != masks[0].shape:
            raise DataError(f"{path}: is {mask.shape[1]}×{mask.shape[0]}, "
                            f"{paths[0]} {masks[0].shape[1]}×{masks[0].shape[0]}")
    return np.stack(masks)


def imwrite_indexed(filename: str | Path, array: np.ndarray, color_palette: bytes = DAVIS_PALETTE) -> None:
    """Write ids, uint8 [H, W], as an indexed PNG."""
    if array.ndim != 2 or array.dtype != np.uint8:
        raise ValueError(f"a mask is uint8 [H, W], not {array.dtype} {list(array.shape)}")
    image = Image.fromarray(array)
    image.putpalette(bytes(color_palette))
    image.save(filename, "PNG", compress_level=3)  # half the time of the usual 6, for files a little larger


def write_text(path: str | Path, text: str) -> None:
    """Write a small file whole or not at all, and say so when it replaces one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    replaced = path.exists()
    temporary.write_text(text)
    os.replace(temporary, path)
    print(f"{path} {'replaced' if replaced else 'written'}")


@contextmanager
def whole_folder(folder: Path):
    """A new folder to write to, which takes the place of folder when all is done and is removed if anything fails."""
    temporary, replaced = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder.exists():
            folder.rename(replaced)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
