"""Images of other depths than 8 bits: scaled by what the file says of its samples, else refused; never black."""
import struct

import numpy as np
import pytest
import torch
from image_cases import chunk, png
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from selfpatch.data.files import UnreadableImage, load_rgb, load_uint8


def colours(values):
    return np.stack([values] * 3, axis=-1)


def significant(*bits):
    return chunk(b"sBIT", bytes(bits))


def ramp(top, dtype=np.uint16):
    return np.linspace(0, top, 80 * 60).reshape(60, 80).astype(dtype)


def test_16_bit_grey_keeps_its_range(tmp_path):
    Image.fromarray(ramp(65535)).save(tmp_path / "image.png")
    assert np.abs(np.asarray(load_rgb(tmp_path / "image.png"))[..., 1] - ramp(65535) / 257).max() <= 1
    (tmp_path / "image.pgm").write_bytes(b"P5 80 60 4095\n" + ramp(4095, ">u2").tobytes())
    assert np.abs(np.asarray(load_rgb(tmp_path / "image.pgm"))[..., 1] - ramp(255)).max() <= 1


def test_12_bits_are_scaled_where_the_file_says_so(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(png(ramp(4095), 16, significant(12)))
    assert np.abs(np.asarray(load_rgb(path))[..., 0] - ramp(255)).max() <= 1
    assert torch.equal(load_uint8(path), pil_to_tensor(load_rgb(path)))


@pytest.mark.parametrize("values, suffix", [
    (ramp(4095), "png"), (ramp(4095), "tif"), (ramp(200), "png"), (ramp(4095, np.int32), "tif"),
    (ramp(4095, np.float32), "tif")])
def test_unknown_ranges_are_refused(tmp_path, values, suffix):
    """Integers and floats of which the file does not say what is white: neither black nor guessed."""
    Image.fromarray(values).save(tmp_path / f"image.{suffix}")
    with pytest.raises(UnreadableImage, match="image.*(the file does not|no known range)"):
        load_rgb(tmp_path / f"image.{suffix}")


@pytest.mark.parametrize("kind", [lambda values: values, colours], ids=["grey", "RGB"])
@pytest.mark.parametrize("scale, extra", [
    (1, significant(12, 12, 12)), (16, significant(12, 12, 12)), (16, b""), (16, significant(0, 0, 0)),
    (16, significant(40, 40, 40)), (16, chunk(b"tEXt", b"Comment\0the chunk sBIT\x05")), (0, b""),
    (0, significant(12, 12, 12))],
    ids=["12 bits", "12 bits scaled to 16", "16 bits", "0 bits", "40 bits", "in a text", "black", "12 bits, black"])
def test_16_bit_png(tmp_path, kind, scale, extra):
    """sBIT counts where it makes sense: samples of 12 bits, or such samples scaled to 16 as the specification asks."""
    path = tmp_path / "image.png"
    extra = extra if kind is colours else extra.replace(significant(12, 12, 12), significant(12))
    path.write_bytes(png(kind(ramp(4095) * scale), 16, extra))
    expected = kind(ramp(255)) if scale else 0
    for channel in range(3):
        one = expected[..., channel] if kind is colours and scale else expected
        assert np.abs(np.asarray(load_rgb(path))[..., channel] - one.astype(int) if scale else 0).max() <= 1
    assert torch.equal(load_uint8(path), pil_to_tensor(load_rgb(path)))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_colour_of_small_values_is_refused(tmp_path, suffix):
    import cv2
    for name, values in (("dark", ramp(4095)), ("full", ramp(4095) * 16), ("black", ramp(4095) * 0)):
        cv2.imwrite(str(tmp_path / f"{name}.{suffix}"), colours(values))
    with pytest.raises(UnreadableImage, match="no value above 4095"):
        load_uint8(tmp_path / f"dark.{suffix}")
    assert load_uint8(tmp_path / f"full.{suffix}").max() == 255
    assert load_uint8(tmp_path / f"black.{suffix}").max() == 0


def test_12_bit_tiff(tmp_path):
    """Two samples in three bytes, as BitsPerSample says."""
    one, other = ramp(4095).reshape(-1, 2).astype(int).T
    data = np.stack([one >> 4, (one & 15) << 4 | other >> 8, other & 255], axis=-1).astype(np.uint8).tobytes()
    tags = {256: 80, 257: 60, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 60, 279: len(data)}
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    (tmp_path / "image.tif").write_bytes(b"II*\0" + struct.pack("<I", 8 + len(data)) + data
                                         + struct.pack("<H", len(tags)) + directory + bytes(4))
    assert np.abs(np.asarray(load_rgb(tmp_path / "image.tif"))[..., 0] - ramp(255).astype(int)).max() <= 1
