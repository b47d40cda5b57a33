"""Images of more or fewer than 8 bits a sample: scaled to 8 by what the file says of its samples, else refused."""
import struct
from collections.abc import Callable

import numpy as np
from PIL import Image

SMALL_VALUES = ("16 bits, but no value above 4095, and the file does not say that its samples have fewer: scale it to "
                "the full range, or save it in 8 bits")


class UnknownRange(Exception):
    """What is white in the image is not known; the message says why, and what to do."""


def to_8_bits(image: Image.Image, data: bytes, low_bytes: Callable[[], Image.Image]) -> Image.Image:
    """An image as files.open_image has it, with 8 bits a sample; most have them already.

    Args:
        data: the file's bytes.
        low_bytes: decodes the image again, for the lower bytes of 16-bit RGB samples.

    Raises:
        UnknownRange: its values have no known range.
    """
    if image.mode == "F":
        raise UnknownRange("floating point, with no known range: convert it")
    if image.mode.startswith("I"):
        return scale_integers(np.asarray(image).astype(np.int64), image, data)
    if has_cut_samples(image, data):
        try:
            low = low_bytes()
        except ValueError:  # grey with alpha, CMYK
            raise UnknownRange(SMALL_VALUES) from None
        return scale_integers(np.asarray(image)[..., :3].astype(np.int64) * 256 + np.asarray(low)[..., :3], image, data)
    return image


def has_cut_samples(image: Image.Image, data: bytes) -> bool:
    """Whether PIL has kept only the upper byte of 16-bit samples, as it does for colours, and too little is left.

    Too little are values below 4096, or ones that fit into the bits that the file says are significant.
    """
    bands = image.getbands()
    if len(bands) == 1 or 16 != (data[24] if image.format == "PNG" else bits_per_sample(image)):
        return False
    highest = max(high for band, (_, high) in zip(bands, image.getextrema(), strict=True) if band not in "Aa")
    depth = sample_depth(image, data)
    return highest < max(16, 2 ** (depth - 8) if depth < 16 else 0)


def scale_integers(values: np.ndarray, image: Image.Image, data: bytes) -> Image.Image:
    """Integers [H, W] or [H, W, 3] as an image of 8 bits, by the depth that the file gives.

    Raises:
        UnknownRange: it gives none, or one that its values contradict.
    """
    depth, highest = sample_depth(image, data), values.max()
    if image.format == "PNG" and highest >= 2**depth:
        depth = 16  # sBIT is of samples that were scaled to 16 bits, as the PNG specification asks for
    if depth is None or values.min() < 0 or highest >= 2**depth:
        raise UnknownRange(f"{image.format} with integers of {values.min()} to {highest}, whose range the file does "
                           "not give: save it in 8 or 16 bits")
    if depth == 16 and 0 < highest < 4096:
        raise UnknownRange(SMALL_VALUES)
    return Image.fromarray((values >> (depth - 8) if depth >= 8 else values * 255 // (2**depth - 1)).astype(np.uint8))


def sample_depth(image: Image.Image, data: bytes) -> int | None:
    """Bits of a sample by the file's header: TIFF's BitsPerSample, PNG's sBIT or bit depth, 16 for PGM.

    None if the header does not say.
    """
    if image.format == "TIFF":
        return bits if 0 < (bits := bits_per_sample(image)) <= 16 else None
    if image.format == "PNG":
        return significant_bits(data)
    return 16 if image.format == "PPM" else None  # PIL scales a PGM to 16 bits by its maximum value


def bits_per_sample(image: Image.Image) -> int:
    """TIFF's tag; 0 for other formats."""
    return max(image.tag_v2.get(258, (0,))) if image.format == "TIFF" else 0


def significant_bits(data: bytes) -> int:
    """Bits of a sample by a PNG's sBIT chunk, if it has one that makes sense, else by its bit depth."""
    position, depth = 8, data[24]
    while position + 8 <= len(data):
        length, name = struct.unpack(">I4s", data[position:position + 8])
        if name == b"IDAT":
            break
        if name == b"sBIT":
            bits = max(data[position + 8:position + (11 if length > 2 else 9)], default=0)  # without alpha's
            return bits if 1 <= bits <= depth else depth
        position += 12 + length
    return depth
