"""Lists of sequences and masks of ids, as their makers write them."""
import numpy as np
import pytest
from image_cases import png
from PIL import Image

from selfpatch.data.files import UnreadableImage
from selfpatch.video.davis import DataError, binary_note, read_mask, read_set


@pytest.mark.parametrize("content, names", [
    (b"\xef\xbb\xbfbear\ncamel\r\n", ["bear", "camel"]),
    (b"# my list\n\nbear\n  # another\ncamel\n", ["bear", "camel"]),
    (b"/JPEGImages/480p/bear/00000.jpg /Annotations/480p/bear/00000.png\n"
     b"/JPEGImages/480p/bear/00001.jpg /Annotations/480p/bear/00001.png\n"
     b"/JPEGImages/480p/camel/00000.jpg /Annotations/480p/camel/00000.png\n", ["bear", "camel"]),
    (b"JPEGImages/480p/bear/00000.jpg\tAnnotations/480p/bear/00000.png\n", ["bear"]),
    (b"/JPEGImages/480p/bear/00000.JPG /Annotations/480p/bear/00000.PNG 1\n", ["bear"]),
    (b"/JPEGImages/480p/my bear/00000.jpeg\n", ["my bear"]),
    (b"bear/\ncamel  # walks\nmy camel\n", ["bear", "camel", "my camel"])])
def test_lists_of_sequences(tmp_path, content, names):
    (tmp_path / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "ImageSets" / "2017" / "val.txt").write_bytes(content)
    assert read_set(tmp_path) == names


@pytest.mark.parametrize("line", ["00000.jpg 00000.png", "/00000.jpg", "/"])
def test_a_line_without_a_sequence_is_named(tmp_path, line):
    (tmp_path / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "ImageSets" / "2017" / "val.txt").write_text(f"bear\n{line}\n")
    with pytest.raises(DataError, match=f"val.txt: line 2 names no sequence .{line}"):
        read_set(tmp_path)


def test_a_list_that_cannot_be_read(tmp_path):
    (tmp_path / "ImageSets" / "2017" / "val.txt").mkdir(parents=True)
    with pytest.raises(DataError, match="val.txt: cannot be read .Is a directory"):
        read_set(tmp_path)
    with pytest.raises(DataError, match="train.txt: no such file"):
        read_set(tmp_path, "train")


@pytest.mark.parametrize("content", ["bear\n".encode("utf-16"), "bear\n".encode("utf-16-le"), b"b\xe4r\n"])
def test_lists_in_other_encodings_are_refused_by_name(tmp_path, content):
    (tmp_path / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "ImageSets" / "2017" / "val.txt").write_bytes(content)
    with pytest.raises(DataError, match="val.txt: not UTF-8"):
        read_set(tmp_path)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_grey_masks_have_their_samples_as_ids(tmp_path, depth):
    """PIL scales grey PNGs of less than 8 bits to 255; the highest id is no void, and nothing is said of it."""
    ids = (np.arange(8 * 16).reshape(8, 16) % min(2**depth, 5)).astype(np.uint8)
    path = tmp_path / "mask.png"
    for values in (ids, np.where(ids > 0, 2**depth - 1, 0)) if depth < 8 else (ids,):
        path.write_bytes(png(values, depth))
        assert np.array_equal(read_mask(path).ids, values) and binary_note(path, read_mask(path)) == ""


@pytest.mark.parametrize("kind", ["JPEG", "JPEG2000"])
def test_lossy_masks_are_refused(tmp_path, kind):
    mask = np.zeros((60, 80), np.uint8)
    mask[10:30, 10:40] = 3
    Image.fromarray(mask).save(tmp_path / "mask.png", kind)
    with pytest.raises(UnreadableImage, match=f"mask.png: is a {kind}, whose compression changes ids"):
        read_mask(tmp_path / "mask.png")
