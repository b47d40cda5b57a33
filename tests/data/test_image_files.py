"""One reader of images: formats, depths, orientation, damage, and what is not an image file at all."""
import os
import struct

import numpy as np
import pytest
import torch
from forked import run_program
from image_cases import picture, refuse_listing, write_damaged_png
from PIL import Image, PngImagePlugin
from torchvision.transforms.v2.functional import pil_to_tensor

from selfpatch.data import files as image_files
from selfpatch.data.files import UnreadableImage, load_rgb, load_uint8, orientation, walk
from selfpatch.errors import ConfigError

pytestmark = [pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning"),
              pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")]


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize("mode, suffix", [
    ("RGB", "jpg"), ("L", "jpg"), ("CMYK", "jpg"), ("RGB", "png"), ("L", "png"), ("LA", "png"), ("RGBA", "png"),
    ("P", "png"), ("1", "png"), ("P", "gif"), ("RGB", "webp"), ("RGB", "bmp"), ("RGB", "tif"), ("L", "pgm")])
def test_every_format_becomes_rgb_with_the_same_pixels_either_way(tmp_path, mode, suffix):
    path = tmp_path / f"image.{suffix}"
    picture().convert(mode).save(path)
    image, tensor = load_rgb(path), load_uint8(path)
    assert image.mode == "RGB" and image.size == (80, 60)
    assert tensor.shape == (3, 60, 80) and tensor.dtype == torch.uint8
    assert (tensor.int() - pil_to_tensor(image).int()).abs().max() <= 1
    expected = np.asarray(picture().convert(mode).convert("RGB")).astype(int)
    assert np.abs(np.asarray(image).astype(int) - expected).mean() < 4


def test_palette_with_transparency(tmp_path, recwarn):
    picture().convert("P").save(tmp_path / "image.png", transparency=b"\x00\x80\xff")
    assert load_rgb(tmp_path / "image.png").mode == "RGB"
    assert not recwarn.list


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_pixels_are_as_stored_whatever_the_orientation_tag(tmp_path, tag, suffix):
    plain, tagged, exif = tmp_path / f"plain.{suffix}", tmp_path / f"tagged.{suffix}", Image.Exif()
    exif[0x0112] = tag
    picture().save(plain)
    picture().save(tagged, exif=exif)
    assert torch.equal(load_uint8(tagged), load_uint8(plain))
    assert load_rgb(tagged).tobytes() == load_rgb(plain).tobytes()
    assert orientation(image_files.open_image(tagged)) == tag and orientation(image_files.open_image(plain)) == 1


def test_a_text_chunk_is_no_orientation(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("orientation", "landscape")
    picture().save(tmp_path / "image.png", pnginfo=text)
    assert orientation(image_files.open_image(tmp_path / "image.png")) == 1


def test_jfif_is_jpeg(tmp_path):
    picture().save(tmp_path / "image.jfif", "JPEG")
    assert image_files.is_image_name(tmp_path / "image.jfif") and load_uint8(tmp_path / "image.jfif").any()


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", None])
def test_unreadable_image_is_named(tmp_path, content):
    path = tmp_path / "bad.jpg"
    picture().save(path)
    path.write_bytes(path.read_bytes()[:900] if content is None else content)
    for load in (load_rgb, load_uint8):
        with pytest.raises(UnreadableImage, match="bad.jpg") as error:
            load(path)
        assert "\n" not in str(error.value)
        with pytest.raises(UnreadableImage, match="missing.jpg.*No such file"):
            load(tmp_path / "missing.jpg")


def test_a_message_is_one_line_whatever_the_name(tmp_path):
    path = tmp_path / "two\nlines.jpg"
    path.write_bytes(b"no image")
    with pytest.raises(UnreadableImage, match="two.lines.jpg") as error:
        load_rgb(path)
    assert "\n" not in str(error.value)


READ = """
import sys
from selfpatch.data.files import UnreadableImage, load_rgb, load_uint8, open_image
for load in (load_uint8, load_rgb):
    try:
        load(sys.argv[1])
    except UnreadableImage as error:
        print(error)
print(open_image(sys.argv[2]).size)
"""


def python(code, *words):
    """Run code in a process of its own, which must not crash; return what it prints on stdout and stderr."""
    (status, stdout, stderr), = run_program(code, *words)
    assert status == 0, stderr[-2000:]
    return stdout, stderr


def test_a_damaged_png_is_refused_and_a_large_one_read_without_a_warning(tmp_path):
    write_damaged_png(tmp_path / "damaged.png")  # torchvision's decoder would crash
    Image.new("1", (9500, 9500)).save(tmp_path / "large.png")  # over PIL's 89 million pixels
    stdout, stderr = python(READ, tmp_path / "damaged.png", tmp_path / "large.png")
    assert stdout.count("damaged.png (") == 2 and stdout.endswith("(9500, 9500)\n")
    assert stderr == ""


def test_what_is_not_a_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "folder.jpg").mkdir()
    for name in ("fifo.jpg", "folder.jpg"):
        with pytest.raises(UnreadableImage, match=f"{name} is not a regular file"):
            load_uint8(tmp_path / name)
    with pytest.raises(UnreadableImage):
        load_uint8("nul\0.jpg")


@pytest.mark.parametrize("height, width", [(65535, 65535), (12000, 16000), (12000, 12000)])
def test_a_header_that_asks_for_gigabytes(tmp_path, monkeypatch, height, width):
    """Or for 192 million pixels, which PIL only warns about; or for more pixels than so few bytes can hold."""
    path = tmp_path / "huge.jpg"
    picture().save(path)
    data = bytearray(path.read_bytes())
    frame = data.index(b"\xff\xc0")
    data[frame + 5:frame + 9] = struct.pack(">HH", height, width)
    path.write_bytes(data)
    monkeypatch.setattr(image_files, "decode_jpeg", lambda _: pytest.fail("the native decoder fills the memory"))
    with pytest.raises(UnreadableImage, match="huge.jpg"):
        load_uint8(path)


@pytest.mark.parametrize("options", [{"optimize": True}, {"progressive": True}])
def test_the_smallest_jpegs_are_read(tmp_path, options):
    Image.new("L", (3000, 2000), 128).save(tmp_path / "flat.jpg", **options)
    assert load_uint8(tmp_path / "flat.jpg").shape == (3, 2000, 3000)
    assert load_rgb(tmp_path / "flat.jpg").getpixel((9, 9)) == (128, 128, 128)


FUZZ = """
import io, random, sys, tempfile, warnings
warnings.simplefilter("ignore")
import numpy as np
from PIL import Image
from selfpatch.data.files import UnreadableImage, load_rgb, load_uint8
name, options, count = sys.argv[1], dict(o.split("=") for o in sys.argv[3:]), int(sys.argv[2])
rng, read, refused = random.Random(name), 0, 0
noise = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
path = tempfile.mkdtemp() + "/image"
originals = []
for mode in options["modes"].split(","):
    for variant in options.get("variants", "{}").split(";"):
        file = io.BytesIO()
        Image.fromarray(noise).convert(mode).save(file, name, **eval(variant))
        originals.append(file.getvalue())
for i in range(count):
    data = bytearray(originals[i % len(originals)])
    place = rng.randrange(len(data))
    kind = i // len(originals) % 3
    if kind == 0:
        for _ in range(rng.choice((1, 1, 4))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[place:]
    else:
        data[place:place + 8] = bytes(len(data[place:place + 8]))
    with open(path, "wb") as file:
        file.write(data)
    images = []
    for load in (load_uint8, load_rgb):
        try:
            images.append(np.asarray(load(path)))
            read += 1
        except UnreadableImage as error:
            assert chr(10) not in str(error), error
            refused += 1
    assert len(images) != 1, "one decoder reads what the other refuses"
    if images:
        tensor, image = images[0].transpose(1, 2, 0).astype(int), images[1]
        assert tensor.shape == image.shape and np.abs(tensor - image).mean() <= 1
print(read, refused)
"""


@pytest.mark.parametrize("name, modes, variants", [
    ("JPEG", "RGB,L,CMYK", '{};{"progressive":True};{"restart_marker_rows":1}'), ("PNG", "RGB,P,LA,1", "{}"),
    ("WEBP", "RGB,RGBA", "{}"), ("GIF", "P", "{}"), ("BMP", "RGB,P", "{}"),
    ("TIFF", "RGB,L", '{};{"compression":"tiff_lzw"};{"compression":"tiff_deflate"}')])
def test_2000_damaged_images_are_read_or_refused(name, modes, variants):
    """334 of each format, with flipped bits, cut off or zeroed; either decoder gives the same pixels, or none."""
    read, refused = map(int, python(FUZZ, name, 334, f"modes={modes}", f"variants={variants}")[0].split())
    assert read + refused == 2 * 334 and refused > 50


# ---------------------------------------------------------------- finding files


def test_hidden_files_and_folders_are_left_out_and_loops_end(tmp_path):
    for name in ("a/1.jpg", "a/._1.jpg", "a/.ipynb_checkpoints/1.jpg", "a/deep/2.jpg", "b/3.jpg", ".git/4.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "back").symlink_to(tmp_path)
    (tmp_path / "c").symlink_to(tmp_path / "b")
    names = [os.path.relpath(path, tmp_path) for path in walk(tmp_path)]
    assert names == ["a/1.jpg", "a/deep/2.jpg", "b/3.jpg"]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    (tmp_path / "a" / "locked").mkdir(parents=True)
    refuse_listing(monkeypatch, tmp_path / "a" / "locked")
    with pytest.raises(ConfigError, match="cannot list the folder .*a/locked .Permission denied"):
        list(walk(tmp_path))


def test_a_workers_error_is_one_line():
    """As torch's DataLoader rebuilds it, from the text of a traceback."""
    error = UnreadableImage("Caught UnreadableImage in DataLoader worker process 0.\nOriginal Traceback (most recent "
                            "call last):\n  File x\nimage_files.UnreadableImage: cannot read the image x.jpg (gone)\n")
    assert str(error) == "cannot read the image x.jpg (gone)" and isinstance(error, ConfigError)
