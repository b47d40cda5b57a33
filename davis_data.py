"""DAVIS on disk: which sequences there are, their frames, and indexed PNG masks.

    DAVIS/ImageSets/2017/val.txt                     one sequence per line
    DAVIS/JPEGImages/480p/<sequence>/00000.jpg …     frames, named by number
    DAVIS/Annotations/480p/<sequence>/00000.png …    masks: 0 background, 1 … n objects, 255 void

Frames and masks are read as stored: an EXIF orientation tag is ignored, since nothing would turn the mask with it.
"""
import codecs
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from errors import ConfigError
from image_files import UnreadableImage, is_hidden, load_ids, open_image, orientation, read_bytes

VOID = 255
SCALE_SIZE = 480  # short side of the frames that a backbone sees
MIN_SIDE, MAX_ASPECT = 16, 16  # of a frame: smaller or longer ones leave nothing to segment, or no memory


class DataError(ConfigError):
    """Something in the user's files cannot be used; the message names the file and says why."""


def davis_palette() -> bytes:
    """256 RGB colours: bits 0, 3, 6 of the id become the highest bits of red, bits 1, 4, 7 of green, 2, 5 of blue."""
    ids = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for channel in range(3):
        for bit in range(3):
            colours[:, channel] |= ((ids >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return colours.tobytes()


DAVIS_PALETTE = davis_palette()


@dataclass(frozen=True)
class Sequence:
    """A video: its name, its frames in order, and the annotation of its first frame."""
    name: str
    frames: tuple[Path, ...]
    annotation: Path

    def annotations(self) -> list[Path] | None:
        """The annotation of every frame, or None if some frames have none."""
        paths = [self.annotation.with_name(f"{frame.stem}.png") for frame in self.frames]
        return paths if all(path.is_file() for path in paths) else None


# ---------------------------------------------------------------- sequences

def read_set(davis_path: str | Path, name: str = "val") -> list[str]:
    """Sequence names of ImageSets/2017/<name>.txt, in the file's order.

    A byte order mark and lines that begin with # are skipped. Lines of DAVIS 2016, a frame and its mask, stand for
    their sequence.

    Raises:
        DataError: no such file, an encoding other than UTF-8, no name, or a name that occurs twice.
    """
    path = Path(davis_path) / "ImageSets" / "2017" / f"{name}.txt"
    if not path.is_file():
        raise DataError(f"{path}: no such file; give the folder that holds ImageSets, JPEGImages and Annotations")
    data = path.read_bytes()
    try:
        if b"\0" in data or data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise UnicodeError
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeError:
        raise DataError(f"{path}: not UTF-8 text; save it in that encoding") from None
    names = []
    for line in (line.strip() for line in lines):
        if line.endswith(".png") and ".jpg " in line:  # /JPEGImages/480p/x/00000.jpg /Annotations/480p/x/00000.png
            frame_folder = line.split(".jpg ")[0].rsplit("/", 2)[-2]
            if frame_folder not in names:
                names.append(frame_folder)
        elif line and not line.startswith("#"):
            names.append(line)
    if not names:
        raise DataError(f"{path}: lists no sequence")
    repeated = {n for n in names if names.count(n) > 1}
    if repeated:
        raise DataError(f"{path}: lists {', '.join(sorted(repeated))} more than once")
    return names


def numbered_files(folder: Path, suffixes: tuple[str, ...], content: str) -> list[Path]:
    """The files of a folder with one of the suffixes, sorted by the number that each is named after.

    Raises:
        DataError: there are none, a name is not a number, or two have the same number.
    """
    paths = [p for p in folder.glob("*") if p.suffix.lower() in suffixes and not is_hidden(p.name)]
    if not paths:
        raise DataError(f"{folder}: no {content} ({', '.join('*' + s for s in suffixes)})")
    for path in paths:
        if not (path.stem.isascii() and path.stem.isdigit()):
            raise DataError(f"{path}: the name is not a number, so its place in the video is unknown")
    paths.sort(key=lambda path: int(path.stem))
    for one, other in zip(paths, paths[1:], strict=False):
        if int(one.stem) == int(other.stem):
            raise DataError(f"{other}: {one.name} has the same number")
    return paths


def check_no_gaps(frames: list[Path], masks: list[Path]) -> None:
    """Raise DataError if the numbers of frames skip one, or if a mask between the first and last has no frame."""
    numbers = [int(path.stem) for path in frames]
    step = min((b - a for a, b in zip(numbers, numbers[1:], strict=False)), default=1)
    expected = set(range(numbers[0], numbers[-1], step)) | {int(path.stem) for path in masks}
    missing = sorted(number for number in expected - set(numbers) if number < numbers[-1])
    if missing:
        digits = len(frames[0].stem)
        listed = ", ".join(f"{number:0{digits}}" for number in missing[:5]) + (", …" if missing[5:] else "")
        raise DataError(f"{frames[0].parent}: lacks frame {listed} ({len(missing)} of {len(frames) + len(missing)}); "
                        "--allow_gaps treats the others as consecutive")


def check_name(name: str) -> None:
    """Refuse a sequence name that is more than the name of a folder, such as ../x."""
    if "/" in name or "\\" in name or is_hidden(name):
        raise DataError(f"ImageSets/2017 lists {name!r}, which is not the name of a folder of JPEGImages/480p")


def find_sequence(davis_path: str | Path, name: str, allow_gaps: bool = False) -> Sequence:
    """The frames and first annotation of a sequence, of which only the first frame and mask are read.

    Args:
        allow_gaps: accept numbers that skip frames.

    Raises:
        DataError: bad name, no frames, frames not named by numbers or with gaps, no first annotation, one that is not
            indexed or of another size than its frame, or a frame too small or too long to segment.
    """
    check_name(name)
    frames = numbered_files(Path(davis_path) / "JPEGImages" / "480p" / name, (".jpg", ".jpeg"), "frames")
    annotation = Path(davis_path) / "Annotations" / "480p" / name / f"{frames[0].stem}.png"
    if not annotation.is_file():
        raise DataError(f"{annotation}: the first frame's annotation is missing")
    if not allow_gaps:
        masks = [p for p in annotation.parent.glob("*.png") if p.stem.isascii() and p.stem.isdigit()]
        check_no_gaps(frames, masks)
    width, height = image_size(frames[0])
    mask_height, mask_width = read_mask(annotation)[0].shape
    if (mask_width, mask_height) != (width, height):
        raise DataError(f"{annotation}: is {mask_width}×{mask_height}, its frame {width}×{height}")
    if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
        raise DataError(f"{frames[0]}: is {width}×{height}, but a side must have {MIN_SIDE} pixels or more, and at "
                        f"most {MAX_ASPECT} times those of the other")
    return Sequence(name, tuple(frames), annotation)


# ---------------------------------------------------------------- frames

def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height."""
    return open_image(path).size


def orientation_note(path: str | Path) -> str:
    """What to say about a frame's EXIF orientation tag; empty if it has none."""
    tag = orientation(open_image(path))
    return "" if tag == 1 else f"{path}: EXIF orientation {tag} is ignored, as masks are of the pixels as stored"


def resized_shape(height: int, width: int, scale_size: int = SCALE_SIZE) -> tuple[int, int]:
    """The short side becomes scale_size; the long one keeps the aspect ratio, rounded down to a multiple of 64."""
    if height > width:
        return scale_size * height // width // 64 * 64, scale_size
    return scale_size, scale_size * width // height // 64 * 64


def load_frame(path: str | Path, scale_size: int = SCALE_SIZE) -> tuple[np.ndarray, int, int]:
    """A frame as resized RGB, uint8 [H, W, 3], and its original height and width.

    Raises:
        UnreadableImage: the file is missing, damaged or not an image.
    """
    data = read_bytes(path)
    open_image(path, data)  # refuses damaged files, of which OpenCV would decode the readable part
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        raise UnreadableImage(f"cannot read the image {path} (OpenCV cannot decode it): convert it")
    height, width = image.shape[:2]
    image = cv2.resize(image, resized_shape(height, width, scale_size)[::-1])  # bilinear, on uint8 as published
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB), height, width


# ---------------------------------------------------------------- masks

def read_mask(path: str | Path) -> tuple[np.ndarray, bytes]:
    """A PNG of ids -> ids, uint8 [H, W], and its palette (DAVIS's if it has none).

    A grey PNG of 0 and 255 alone is a mask of DAVIS 2016: one object, not void.

    Raises:
        UnreadableImage: the file is missing or damaged, or has another mode.
    """
    mask, palette = load_ids(path)
    if palette is None and is_binary(mask):
        mask = np.where(mask == VOID, 1, 0).astype(np.uint8)
    return mask, palette or DAVIS_PALETTE


def is_binary(mask: np.ndarray) -> bool:
    """Whether grey values [H, W] are 0 and 255 alone, as in DAVIS 2016, with at least one 255."""
    return bool(((mask == 0) | (mask == VOID)).all() and mask.any())


def binary_note(path: str | Path) -> str:
    """What to say about an annotation of DAVIS 2016; empty if it is none."""
    image = open_image(path)
    if image.mode == "L" and is_binary(np.array(image)):
        return f"{path}: a grey mask of 0 and 255 is read as one object, as in DAVIS 2016"
    return ""


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
    image.save(filename, "PNG", compress_level=3)  # half the time of the default 6, for slightly larger files


def write_text(path: str | Path, text: str) -> None:
    """Write a small file whole or not at all, and print whether it replaced one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    replaced = path.exists()
    temporary.write_text(text)
    os.replace(temporary, path)
    print(f"{path} {'replaced' if replaced else 'written'}")


@contextmanager
def whole_folder(folder: Path):
    """A temporary folder to write to, which replaces folder at the end and is removed if anything fails."""
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
