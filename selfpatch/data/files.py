"""Image files, read by the same rules in every job.

- Pixels are used as stored: an EXIF orientation tag is not applied, to training images, photographs to draw, DAVIS
  frames and masks alike.
- JPEGs may go through a native decoder, torchcodec's (from version 0.16) or torchvision's (which announces its end in
  0.29); both give PIL's pixels. Every other format goes through PIL, which raises where torchvision's PNG decoder
  crashes on damaged data.
- Whatever is wrong with a file is an UnreadableImage that names it. Only regular files are opened: a FIFO would hang.
- Hidden files and folders (._photo.jpg, .ipynb_checkpoints) are not part of a data set.
"""
import errno
import io
import os
import re
import stat
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torchvision.transforms.v2.functional import pil_to_tensor

from selfpatch.data.depths import UnknownRange, to_8_bits
from selfpatch.errors import ConfigError, printable

T = TypeVar("T")

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
OTHER_IMAGE_SUFFIXES = (".gif", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".svg", ".psd", ".raw", ".cr2", ".nef",
                        ".dng", ".arw", ".exr", ".hdr", ".tga", ".ico")
# what a network file system may report once: the file is read again
TRANSIENT_ERRORS = {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET,
                    errno.EHOSTDOWN}
RETRY_SECONDS = (0.1, 1.0)  # before the second and the third attempt
MAX_PIXELS = 179_000_000  # PIL's own limit against decompression bombs, twice MAX_IMAGE_PIXELS
# at half of it PIL warns on stderr, also of images that are then read
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
PIXELS_PER_BYTE = 256  # of a JPEG that is not progressive: a block of 8×8 takes two bits or more
LOSSY_FORMATS = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")  # PIL's names: not for masks, whose ids they change

# the start of a segment APP1 that holds EXIF; in pixel data a byte of 0xFF is never followed by 0xE1
EXIF = re.compile(rb"\xff\xe1(..Exif\0\0)", re.DOTALL)
# told to every process that decodes, each worker among them; the tests' filters are separate
warnings.filterwarnings("ignore", "The image decoding and encoding capabilities of TorchVision", DeprecationWarning)

UNDO_ORIENTATION = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
                    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
                    7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}


class UnreadableImage(ConfigError):
    """An image file that cannot be used; the message names it and says why, in one line."""

    def __init__(self, message: str, every_rank: bool = False):
        super().__init__(message, every_rank)
        self.args = (printable(self.args[0]),)  # a file's name may hold line breaks


# ----------------------------------------------------------------------------------------------------------------------
# Finding files


def is_hidden(name: str) -> bool:
    return name.startswith(".")


def walk(folder: str | Path, visited: set[str] | None = None) -> Iterator[str]:
    """Every file below a folder once: hidden ones are left out, links followed, but not into a folder twice.

    Args:
        visited: real paths of folders not to enter again; what is walked is added.

    Raises:
        ConfigError: a folder cannot be listed, so the images in it would be missing without a word.
    """
    visited = set() if visited is None else visited
    visited.add(os.path.realpath(folder))
    for where, folders, names in os.walk(folder, onerror=refuse_folder, followlinks=True):
        fresh = []
        for name in sorted(name for name in folders if not is_hidden(name)):
            real = os.path.realpath(os.path.join(where, name))
            if real not in visited:
                visited.add(real)
                fresh.append(name)
        folders[:] = fresh
        for name in sorted(names):
            if not is_hidden(name):
                yield os.path.join(where, name)


def refuse_folder(error: OSError) -> NoReturn:
    raise ConfigError(f"cannot list the folder {error.filename} ({error.strerror}): make it readable, or move it out "
                      "of the data") from None


def is_image_name(path: str | Path) -> bool:
    return str(path).lower().endswith(IMAGE_SUFFIXES)


def split_name(path: str) -> tuple[str, str]:
    """A path up to the first dot of its name, numbers aside, and what follows: a/1.2 and .seg.png of a/1.2.seg.PNG."""
    first, *parts = os.path.basename(path).split(".")
    stem = os.path.join(os.path.dirname(path), ".".join([first, *filter(str.isdecimal, parts)]))
    return stem, "".join(f".{part.lower()}" for part in parts if not part.isdecimal())


def is_chosen(path: str, suffixes: Sequence[str] = ()) -> bool:
    """Whether a file is an image to read, with one of the long suffixes if any are given."""
    return is_image_name(path) and (not suffixes or split_name(path)[1] in suffixes)


def unread_formats(paths: Sequence[str], suffixes: Sequence[str] = ()) -> Counter:
    """How many of the files look like images and are not read, by suffix: for their format, or not being chosen."""
    found = Counter(suffix for path in paths if (suffix := os.path.splitext(path)[1].lower()) in OTHER_IMAGE_SUFFIXES)
    others = [path for path in paths if is_image_name(path) and not is_chosen(path, suffixes)]
    return found + Counter(split_name(path)[1] for path in others)


# ----------------------------------------------------------------------------------------------------------------------
# Reading one


def read_bytes(path: str | Path) -> bytes:
    """The bytes of a regular file.

    Raises:
        UnreadableImage: there is none, it is empty, or it is a folder, a FIFO or a device.
    """
    try:
        if not stat.S_ISREG(with_retries(lambda: os.stat(path)).st_mode):
            raise UnreadableImage(f"{path} is not a regular file")
        data = with_retries(Path(path).read_bytes)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path, and what is raised above
        if isinstance(error, UnreadableImage):
            raise
        raise UnreadableImage(f"cannot read the image {path} ({getattr(error, 'strerror', None) or error})") from None
    if not data:
        raise UnreadableImage(f"cannot read the image {path} (0 bytes): replace it or remove it")
    return data


def with_retries(read: Callable[[], T]) -> T:
    """What read returns; its first two transient errors are ignored."""
    for seconds in RETRY_SECONDS:
        try:
            return read()
        except OSError as error:
            if error.errno not in TRANSIENT_ERRORS:
                raise
            time.sleep(seconds)
    return read()


def open_image(path: str | Path, data: bytes | None = None, low_bytes: bool = False) -> Image.Image:
    """The decoded image as PIL has it, in the mode it is stored in.

    Args:
        low_bytes: decode the lower byte of 16-bit RGB samples; PIL itself keeps the upper one alone.

    Raises:
        UnreadableImage: whatever PIL raises about the file; one of more than 179 million pixels.
    """
    data = read_bytes(path) if data is None else data
    try:
        with Image.open(io.BytesIO(data)) as image:
            check_pixels(image, len(data))
            return decode(image, low_bytes)
    except MemoryError:
        raise
    except Exception as error:  # PIL's plugins raise nearly anything about damaged data: struct.error, TypeError, …
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
        reason = reason or type(error).__name__
        raise UnreadableImage(f"cannot read the image {path} ({reason}): replace it or remove it") from None


def check_pixels(image: Image.Image, size: int) -> None:
    """Raise ValueError if the header asks for more pixels than are read, or than a JPEG of `size` bytes can hold."""
    pixels, asked = image.width * image.height, f"{image.width}×{image.height} pixels"
    if pixels > MAX_PIXELS:
        raise ValueError(f"{asked}, more than {MAX_PIXELS // 10**6} million")
    if image.format == "JPEG" and not image.info.get("progressive") and pixels > PIXELS_PER_BYTE * size:
        raise ValueError(f"{asked}, more than {size} bytes can hold")


def decode(image: Image.Image, low_bytes: bool = False) -> Image.Image:
    """An image whose header PIL has read, with its pixels as stored and its orientation tag as an attribute."""
    if low_bytes:
        image.tile = [swap_bytes(tile) for tile in image.tile]
    # a TIFF's tag is gone after load, which applies it, as for no other format; a PNG's comes with load, whose error
    # must not be lost among those of damaged EXIF
    tag = orientation(image) if image.format == "TIFF" else None
    image.load()
    tag = tag or orientation(image)
    if image.format == "TIFF" and tag in UNDO_ORIENTATION:
        stored = image.transpose(UNDO_ORIENTATION[tag])
        stored.format, stored.tag_v2 = image.format, image.tag_v2
        image = stored
    image.stored_orientation = tag
    return image


def swap_bytes(tile: tuple) -> tuple:
    """PIL's description of where pixels are in a file, for the other byte order: RGB;16B becomes RGB;16L."""
    *place, args = tile
    layout, *rest = (args,) if isinstance(args, str) else args
    order = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}[layout[-1]]  # N: the machine's own
    layout = layout[:-1] + order
    make = getattr(type(tile), "_make", tuple)  # a plain tuple before Pillow 11, then a named one
    return make((*place, layout if isinstance(args, str) else (layout, *rest)))


def orientation(image: Image.Image) -> int:
    """The EXIF orientation tag of an image from open_image, 1 (upright) if there is none; nothing here applies it."""
    if hasattr(image, "stored_orientation"):
        return image.stored_orientation
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF of a sound image
        return 1
    return value if value in range(1, 9) else 1


def load_rgb(path: str | Path, data: bytes | None = None) -> Image.Image:
    """The image at path as RGB, however it is stored (grey, CMYK, palette, alpha, 12 or 16 bits).

    Args:
        data: the file's bytes, if they are there already; path is then for messages alone.

    Raises:
        UnreadableImage: the file cannot be decoded, or its values have no known range.
    """
    data = read_bytes(path) if data is None else data
    image = open_image(path, data)
    try:
        image = to_8_bits(image, data, lambda: open_image(path, data, low_bytes=True))
    except UnknownRange as error:
        raise UnreadableImage(f"cannot read the image {path} ({error})") from None
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # keeps the palette's colours; PIL would warn of transparency in bytes
    return image.convert("RGB")


def load_ids(path: str | Path, data: bytes | None = None,
             image: Image.Image | None = None) -> tuple[np.ndarray, bytes | None]:
    """The ids of an indexed or grey image, uint8 [H, W], and its palette, None for a grey one.

    Grey PNGs of less than 8 bits have their samples as ids, which PIL scales to 255.

    Args:
        data, image: the file's bytes and what open_image makes of them, if they are there already.

    Raises:
        UnreadableImage: the file is missing or damaged, has colours or more than 8 bits, or a lossy format.
    """
    data = read_bytes(path) if data is None else data
    image = open_image(path, data) if image is None else image
    if image.format in LOSSY_FORMATS:
        raise UnreadableImage(f"{path}: is a {image.format}, whose compression changes ids: give an indexed PNG")
    if image.mode not in ("P", "L", "1"):
        raise UnreadableImage(f"{path}: is {image.mode}, not an indexed PNG with one object id per pixel")
    if image.mode == "P":
        return np.array(image), bytes(image.getpalette("RGB") or ())
    ids = np.array(image.convert("L"))
    depth = data[24] if image.format == "PNG" else 8  # in the PNG header
    return (ids // (255 // (2**depth - 1)) if depth < 8 else ids), None


# ----------------------------------------------------------------------------------------------------------------------
# Native decoders of JPEGs


def torchcodec_decoder() -> Callable[[bytes], torch.Tensor]:
    """Raises ImportError, OSError or RuntimeError if torchcodec cannot be loaded, or is too old."""
    from torchcodec.decoders import decode_jpeg

    def decode(data: bytes) -> torch.Tensor:
        # it turns images as their EXIF says, and has no option against it: call the segment APP15, which nobody reads
        return decode_jpeg(EXIF.sub(b"\xff\xef\\1", data), mode="UNCHANGED")

    return decode


def torchvision_decoder() -> Callable[[bytes], torch.Tensor]:
    """Raises ImportError if torchvision has no decoder any more."""
    from torchvision.io import decode_jpeg

    return lambda data: decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))


def installed_decoders() -> dict[str, Callable[[bytes], torch.Tensor]]:
    """The decoders that can be loaded here, the one to use first: bytes of a JPEG -> uint8 [C, H, W].

    They raise RuntimeError about data that they cannot decode.
    """
    found = {}
    for name, load in (("torchcodec", torchcodec_decoder), ("torchvision", torchvision_decoder)):
        try:
            found[name] = load()
        except (ImportError, OSError, RuntimeError):  # not installed, or built for another torch
            continue
    return found


decode_jpeg = next(iter(installed_decoders().values()), None)  # None: PIL decodes everything


def decoder_note() -> str:
    """What to install where PIL has to decode JPEGs; otherwise empty."""
    return "" if decode_jpeg else "PIL decodes JPEGs here, slower than torchcodec: pip install 'torchcodec>=0.16'"


def jpeg_pixels(data: bytes) -> int:
    """Pixels of a JPEG by its frame header; 0 for anything else."""
    position = 2 if data.startswith(b"\xff\xd8\xff") else len(data)
    while position + 9 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a start of frame; those three are tables
            height, width = (int.from_bytes(data[position + i:position + i + 2], "big") for i in (5, 7))
            return height * width
        length = 0 if marker == 0xFF else int.from_bytes(data[position + 2:position + 4], "big")
        position += 1 if marker == 0xFF else 2 + length  # 0xFF: a fill byte
    return 0


def load_uint8(path: str | Path, data: bytes | None = None) -> torch.Tensor:
    """The image at path as RGB, uint8 [3, H, W], with the same pixels as load_rgb.

    Args:
        data: the file's bytes, if they are there already; path is then for messages alone.

    Raises:
        UnreadableImage: see load_rgb.
    """
    data = read_bytes(path) if data is None else data
    # a damaged header can ask for gigabytes, which the native decoder would fill
    if decode_jpeg is not None and 0 < jpeg_pixels(data) <= min(MAX_PIXELS, PIXELS_PER_BYTE * len(data)):
        try:
            image = decode_jpeg(data)
            if image.ndim == 3 and len(image) == 3:
                return image
        except RuntimeError:
            pass  # PIL reads it, or says what is wrong with it
    # grey, CMYK, palettes, alpha, 16 bits and animations go through PIL as well: they are rare, with many special cases
    return pil_to_tensor(load_rgb(path, data))
