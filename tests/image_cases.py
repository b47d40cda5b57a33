"""Images as other programs write them, made here: noise, PNGs of any depth, damage; and folders without permission."""
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def picture(seed: int = 0, width: int = 80, height: int = 60) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(values: np.ndarray, depth: int, extra: bytes = b"") -> bytes:
    """A PNG of `depth` bits a sample: values [H, W] are grey, [H, W, 3] RGB; extra chunks come before the data."""
    height, width, *channels = values.shape
    if depth == 16:
        rows = values.astype(">u2")
    else:
        samples = np.unpackbits(values.astype(np.uint8).reshape(height, -1, 1), axis=-1)[..., -depth:]
        rows = np.packbits(samples.reshape(height, -1), axis=1)
    header = struct.pack(">IIBBBBB", width, height, depth, 2 if channels else 0, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra
            + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))) + chunk(b"IEND", b""))


def write_damaged_png(path: Path) -> None:
    """A PNG with eight bytes of its data zeroed, on which torchvision.io.decode_image crashes."""
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    data = bytearray(file.getvalue())
    start = data.index(b"IDAT") + 10
    data[start:start + 8] = bytes(8)
    path.write_bytes(data)


def refuse_listing(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Make a folder one without permission, which root would not notice otherwise."""
    def refuse(function):
        def refusing(path="."):
            if os.fspath(path) == str(folder):
                raise PermissionError(13, "Permission denied", str(folder))
            return function(path)
        return refusing

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, refuse(getattr(os, name)))
