"""Native decoders of JPEGs. All that are installed give PIL's pixels, as stored: EXIF orientation is not applied.

torchcodec comes first, from its version 0.16 on; torchvision.io announces the end of its decoders in 0.29.
"""
import re
import warnings
from collections.abc import Callable

import torch

# the start of a segment APP1 that holds EXIF; in pixel data a byte of 0xFF is never followed by 0xE1
EXIF = re.compile(rb"\xff\xe1(..Exif\0\0)", re.DOTALL)
# told to every process that decodes, each worker among them; the tests' filters are separate
warnings.filterwarnings("ignore", "The image decoding and encoding capabilities of TorchVision", DeprecationWarning)


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
