"""DAVIS on disk: lists of sequences, frames, and masks as indexed PNGs.

    DAVIS/ImageSets/2017/val.txt                     one sequence per line
    DAVIS/JPEGImages/480p/<sequence>/00000.jpg …     frames, named by number
    DAVIS/Annotations/480p/<sequence>/00000.png …    masks: 0 background, 1 … n objects, 255 void

Frames and masks are read as stored. EXIF orientation tags are ignored: one on a frame would not rotate its mask.
"""
import codecs
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from selfpatch.data.files import UnreadableImage, is_hidden, load_ids, load_rgb, open_image, orientation, read_bytes
from selfpatch.errors import ConfigError
from selfpatch.whole_files import regular, whole_file

VOID = 255
SCALE_SIZE = 480  # short side in pixels of the backbone's input
MIN_SIDE, MAX_ASPECT = 16, 16  # limits of a frame; beyond them there is nothing to segment, or no memory


class DataError(ConfigError):
    """A file of the user's cannot be used; the message names it and says why."""


# 256 RGB colours: bits 0, 3, 6 of an id are the highest bits of red, bits 1, 4, 7 of green, 2, 5 of blue
ID_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, count=9, bitorder="little").reshape(256, 3, 3)
DAVIS_PALETTE = np.packbits(ID_BITS.transpose(0, 2, 1), axis=-1).tobytes()


class Mask(NamedTuple):
    """A mask, ids as uint8 [H, W]; its palette, whether 255 was read as object 1, and its EXIF orientation tag."""
    ids: np.ndarray
    palette: bytes = DAVIS_PALETTE
    binary: bool = False
    orientation: int = 1


@dataclass(frozen=True)
class Sequence:
    """A video: its name, frames in order, and the annotation of the first frame, as a file and as a mask."""
    name: str
    frames: tuple[Path, ...]
    annotation: Path
    mask: Mask = field(repr=False, compare=False)

    def annotations(self) -> list[Path] | None:
        """Annotation files of all frames; None if one is missing."""
        paths = [self.annotation.with_name(f"{frame.stem}.png") for frame in self.frames]
        return paths if all(path.is_file() for path in paths) else None

    def lacks_end(self) -> bool:
        """Whether frames are missing after the last one, by the annotations."""
        return max(mask_numbers(self.annotation.parent)) > int(self.frames[-1].stem)


# ---------------------------------------------------------------- sequences

def read_set(davis_path: str | Path, name: str = "val") -> list[str]:
    """Read the sequence names of ImageSets/2017/<name>.txt, in the file's order.

    Comments after # are skipped. A line of DAVIS 2016, a frame and its mask, stands for its sequence.

    Raises:
        DataError: no such file, not UTF-8, no sequence, a sequence listed twice, or a line without a name.
    """
    path = Path(davis_path) / "ImageSets" / "2017" / f"{name}.txt"
    names, repeated = [], set()
    for number, line in enumerate(read_lines(path), 1):
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        # /JPEGImages/480p/bear/00000.jpg /Annotations/480p/bear/00000.png, perhaps with columns after them
        frame = re.match(r"(.+?)\.jpe?g(\s|$)", line, re.IGNORECASE)
        sequence = frame[1].rpartition("/")[0].rpartition("/")[2] if frame else line.rstrip("/")
        if line and not sequence:
            raise DataError(f"{path}: line {number} names no sequence ({line}): give a name, such as bear, or "
                            "/JPEGImages/480p/bear/00000.jpg")
        if sequence in names and not frame:
            repeated.add(sequence)
        elif line and sequence not in names:
            names.append(sequence)
    if not names:
        raise DataError(f"{path}: lists no sequence")
    if repeated:
        raise DataError(f"{path}: lists {', '.join(sorted(repeated))} more than once")
    return names


def read_lines(path: Path) -> list[str]:
    """Read the lines of a UTF-8 text, with or without a byte order mark."""
    try:
        data = Path(regular(path)).read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give the folder that has ImageSets and JPEGImages in it") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        if b"\0" in data or data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise UnicodeError
        return data.decode("utf-8-sig").splitlines()
    except UnicodeError:
        raise DataError(f"{path}: not UTF-8 text; save it in that encoding") from None


def numbered_files(folder: Path, suffixes: tuple[str, ...], content: str) -> list[Path]:
    """Files of a folder with one of the suffixes, sorted by number.

    Args:
        content: what the files are, for the message.

    Raises:
        DataError: no such files, they cannot be listed, a name is not a number, or two have the same number.
    """
    try:
        paths = [folder / name for name in os.listdir(folder)] if folder.is_dir() else []
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror})") from None
    paths = [path for path in paths if path.suffix.lower() in suffixes and not is_hidden(path.name)]
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


def mask_numbers(folder: Path) -> set[int]:
    return {int(path.stem) for path in folder.glob("*.png") if path.stem.isascii() and path.stem.isdigit()}


def check_no_gaps(frames: list[Path], masks: set[int]) -> None:
    """Raise DataError if the frames' numbers skip one, or a mask has no frame, also after the last frame."""
    numbers = [int(path.stem) for path in frames]
    step = min((b - a for a, b in zip(numbers, numbers[1:], strict=False)), default=1)
    expected = set(range(numbers[0], numbers[-1], step)) | masks
    missing = sorted(expected - set(numbers))
    if missing:
        digits = len(frames[0].stem)
        listed = ", ".join(f"{number:0{digits}}" for number in missing[:5]) + (", …" if missing[5:] else "")
        raise DataError(f"{frames[0].parent}: lacks frame {listed} ({len(missing)} of {len(frames) + len(missing)}); "
                        "--allow_gaps treats the others as consecutive")


def check_name(name: str) -> None:
    """Raise DataError unless a sequence's name is the plain name of a folder (not ../x)."""
    if "/" in name or "\\" in name or is_hidden(name):
        raise DataError(f"ImageSets/2017 lists {name!r}, which is not the name of a folder of JPEGImages/480p")


def find_frames(davis_path: str | Path, name: str) -> list[Path]:
    """Frames of a sequence in order. Raise DataError if a name is wrong, or there are none."""
    check_name(name)
    return numbered_files(Path(davis_path) / "JPEGImages" / "480p" / name, (".jpg", ".jpeg"), "frames")


def find_sequence(davis_path: str | Path, name: str, allow_gaps: bool = False) -> Sequence:
    """Find the frames and first annotation of a sequence; only the first frame and mask are opened.

    Args:
        allow_gaps: accept missing frames.

    Raises:
        DataError: bad name, no frames, frames without numbers or with gaps, no first annotation or one of another size
            than its frame, or a frame too small or too long to segment.
        UnreadableImage: the first frame or its annotation cannot be read.
    """
    frames = find_frames(davis_path, name)
    annotation = Path(davis_path) / "Annotations" / "480p" / name / f"{frames[0].stem}.png"
    if not annotation.is_file():
        raise DataError(f"{annotation}: the first frame's annotation is missing")
    if not allow_gaps:
        check_no_gaps(frames, mask_numbers(annotation.parent))
    (width, height), mask = open_image(frames[0]).size, read_mask(annotation)
    if mask.ids.shape != (height, width):
        raise DataError(f"{annotation}: is {mask.ids.shape[1]}×{mask.ids.shape[0]}, its frame {width}×{height}")
    check_sides(frames[0], width, height)
    return Sequence(name, tuple(frames), annotation, mask)


# ---------------------------------------------------------------- frames

def check_sides(path: str | Path, width: int, height: int) -> None:
    if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
        raise DataError(f"{path}: is {width}×{height}, but a side must have {MIN_SIDE} pixels or more, and at most "
                        f"{MAX_ASPECT} times those of the other")


def orientation_note(path: str | Path, tag: int) -> str:
    """A note for the user on the EXIF orientation tag of a frame or mask; empty for 1, upright."""
    return "" if tag == 1 else f"{path}: EXIF orientation {tag} is ignored, as masks are of the pixels as stored"


def resized_shape(height: int, width: int, scale_size: int = SCALE_SIZE) -> tuple[int, int]:
    """Height and width with a short side of scale_size; the long side is rounded down to a multiple of 64."""
    if height > width:
        return scale_size * height // width // 64 * 64, scale_size
    return scale_size, scale_size * width // height // 64 * 64


class Frame(NamedTuple):
    """A frame as resized RGB, uint8 [H, W, 3], its original height and width, and its EXIF orientation tag."""
    image: np.ndarray
    height: int
    width: int
    orientation: int = 1


def load_frame(path: str | Path, scale_size: int = SCALE_SIZE, shape: tuple[int, int] | None = None) -> Frame:
    """Read a frame.

    Args:
        shape: required (height, width), those of the first frame.

    Raises:
        UnreadableImage: the file is missing, damaged or not an image.
        DataError: the frame has another shape, or is too small or too long to segment.
    """
    data = read_bytes(path)
    stored = open_image(path, data)  # refuses damaged files, which OpenCV would decode in part
    width, height = stored.size
    if shape not in (None, (height, width)):
        raise DataError(f"{path}: is {width}×{height}, the first frame {shape[1]}×{shape[0]}")
    check_sides(path, width, height)
    try:
        if stored.format == "JPEG" and stored.mode in ("RGB", "L"):  # by OpenCV, as published
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
            image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        else:
            image = np.asarray(load_rgb(path, data))
        image = cv2.resize(image, resized_shape(height, width, scale_size)[::-1])  # bilinear, on uint8 as published
    except cv2.error:
        raise UnreadableImage(f"cannot read the image {path} (OpenCV cannot decode it): convert it") from None
    return Frame(image, height, width, orientation(stored))


# ---------------------------------------------------------------- masks

def read_mask(path: str | Path, binary: bool | None = None, data: bytes | None = None) -> Mask:
    """Read a PNG of ids; one without a palette gets DAVIS's.

    Args:
        data: the file's bytes, if they are there already; path is then for messages alone.
        binary: read 255 in a grey PNG as object 1, as in DAVIS 2016, rather than as void. None: do so if 0 and 255 are
            the only values. One mask of a video must decide for all.

    Raises:
        UnreadableImage: the file is missing or damaged, or has another mode or a lossy format.
        DataError: binary, and there are ids beside 255.
    """
    data = read_bytes(path) if data is None else data
    image = open_image(path, data)
    ids, palette = load_ids(path, data, image)
    if palette is None:
        values = set(np.flatnonzero(np.bincount(ids.ravel(), minlength=256)).tolist())
        binary = values <= {0, VOID} and VOID in values if binary is None else binary
        if binary and VOID in values:
            if not values <= {0, VOID}:
                raise DataError(f"{path}: has 255 beside other ids, but 255 is the object of this video's first mask")
            ids = np.where(ids == VOID, 1, 0).astype(np.uint8)
    return Mask(ids, palette or DAVIS_PALETTE, bool(binary), orientation(image))


def binary_note(path: str | Path, mask: Mask) -> str:
    """A note for the user on a first annotation in the format of DAVIS 2016; empty for others."""
    return f"{path}: a grey mask of 0 and 255 is read as one object, as in DAVIS 2016" if mask.binary else ""


def read_masks(paths: list[Path], first: Mask | None = None) -> np.ndarray:
    """Read the masks of one video, uint8 [T, H, W]; the first decides what 255 means.

    Args:
        first: the mask of paths[0], if it has been read already.

    Raises:
        DataError: the masks differ in size.
        UnreadableImage: a mask cannot be read.
    """
    first = read_mask(paths[0]) if first is None else first
    masks = [first.ids]
    for path in paths[1:]:
        masks.append(read_mask(path, first.binary).ids)
        if masks[-1].shape != first.ids.shape:
            height, width = first.ids.shape
            raise DataError(f"{path}: is {masks[-1].shape[1]}×{masks[-1].shape[0]}, {paths[0]} {width}×{height}")
    return np.stack(masks)


def imwrite_indexed(filename: str | Path, array: np.ndarray, color_palette: bytes = DAVIS_PALETTE) -> None:
    """Write ids, uint8 [H, W], as an indexed PNG."""
    if array.ndim != 2 or array.dtype != np.uint8:
        raise ValueError(f"a mask is uint8 [H, W], not {array.dtype} {list(array.shape)}")
    image = Image.fromarray(array)
    image.putpalette(bytes(color_palette))
    image.save(filename, "PNG", compress_level=3)  # half the time of the default 6, for slightly larger files


def write_text(path: str | Path, text: str) -> None:
    """Write a small file whole or not at all, and print whether it replaced one.

    Raises:
        WriteError: the disk is full, or a folder is in the way.
    """
    path = Path(path)
    replaced = path.exists()
    with whole_file(path) as temporary:
        temporary.write_text(text)
    print(f"{path} {'replaced' if replaced else 'written'}")
