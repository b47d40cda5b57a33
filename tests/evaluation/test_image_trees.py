"""Data sets of masks and boxes in archives, lists and data sets: the same as in a folder."""
import io
import shutil
import tarfile
import zipfile

import pytest
from dense_data import make_folders, make_voc

from selfpatch.errors import ConfigError
from selfpatch.evaluation.object_discovery import find_box_data
from selfpatch.evaluation.segmentation import find_segmentation_data, hub_pairs


def write_odd_tar(root, path):
    """A .tar whose annotations are links, and which ends with a small zip."""
    with tarfile.open(path, "w") as archive:
        for file in sorted(root.rglob("*.*")):
            name = file.relative_to(root.parent)
            if file.suffix == ".xml":
                link = tarfile.TarInfo(str(name))
                link.type, link.linkname = tarfile.SYMTYPE, f"../boxes/{file.name}"
                archive.addfile(link)
                name = name.parent.parent / "boxes" / file.name
            archive.add(file, name)
        small, member = io.BytesIO(), tarfile.TarInfo("voc/extras.zip")
        with zipfile.ZipFile(small, "w") as zipped:
            zipped.writestr("a.txt", "x")
        member.size = len(small.getvalue())
        archive.addfile(member, io.BytesIO(small.getvalue()))


def write_odd_zip(root, path):
    """A .zip with backslashes and a text that is encrypted, in a folder of another kind."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(root.rglob("*.*")):
            archive.writestr(str(file.relative_to(root.parent)).replace("/", "\\"), file.read_bytes())
        archive.writestr("voc\\secret.txt", "x" * 30)
    data = bytearray(path.read_bytes())
    at = data.rfind(b"PK\1\2")  # the last member's entry in the directory
    data[at + 8] |= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name, write", [("voc.tar", write_odd_tar), ("voc.zip", write_odd_zip)])
def test_texts_in_archives_of_other_programs(tmp_path, name, write):
    root = make_voc(tmp_path / "voc")
    write(root, tmp_path / name)
    ours, expected = (find_box_data(f"voc:{place}") for place in (tmp_path / name, root))
    assert [one.boxes.tolist() for one in ours] == [one.boxes.tolist() for one in expected]


def test_a_damaged_text_in_an_archive_is_one_line(tmp_path):
    root = make_voc(tmp_path / "voc")
    with zipfile.ZipFile(tmp_path / "voc.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(root.rglob("*.*")):
            archive.write(file, file.relative_to(root))
        start = archive.getinfo("Annotations/000001.xml").header_offset
    data = bytearray((tmp_path / "voc.zip").read_bytes())
    start += 30 + len("Annotations/000001.xml")
    data[start:start + 4] = b"\xff" * 4
    (tmp_path / "voc.zip").write_bytes(data)
    with pytest.raises(ConfigError, match="cannot read .*voc.zip/Annotations/000001.xml .Error -3"):
        find_box_data(f"voc:{tmp_path / 'voc.zip'}")


def boxes(data, **options):
    return [(one.name, one.image.read(), one.read_boxes().tolist()) for one in find_box_data(data, **options)]


def contents(pairs):
    return [(pair.image.read(), pair.mask.read()) for pair in pairs]


@pytest.mark.parametrize("form", ["", ".tar", ".zip"])
def test_photographs_and_masks_in_one_place(tmp_path, capsys, form):
    """0.jpg and 0.seg.png, chosen by --image_suffix: the same as in two folders."""
    folders, both = make_folders(tmp_path), tmp_path / "both"
    for split in ("train", "val"):
        (both / split).mkdir(parents=True)
        for i in range(4):
            shutil.copy(tmp_path / f"images/{split}/{i}.jpg", both / split)
            shutil.copy(tmp_path / f"masks/{split}/{i}.png", both / split / f"{i}.seg.png")
    place = shutil.make_archive(str(both), form[1:], both) if form else both
    ours = find_segmentation_data(f"folders:{place},{place}", 3, [".jpg"])
    expected = find_segmentation_data(f"folders:{folders}", 3)
    assert contents(ours.train + ours.val) == contents(expected.train + expected.val)
    assert boxes(f"folders:{place},{place}", suffixes=[".jpg"]) == boxes(f"folders:{folders}")
    assert [one.name for one in find_box_data(f"images:{place}", [".jpg"])] == [
        one.name for one in find_box_data(f"images:{tmp_path / 'images'}")]
    assert "chooses" not in capsys.readouterr().err
    with pytest.raises(ConfigError, match="masks of the same name|is a JPEG"):
        find_segmentation_data(f"folders:{place},{place}", 3)
    for data, words, says in (("voc:x", ([".jpg"],), "--image_suffix .jpg: is for --data folders: and images:, not"),
                              ("coco:x", ([], "a"), "--image_column a: is for --data hf: and images:, not for coco:"),
                              (f"images:{place}", ([], "a"), "--image_column a: is for hf:NAME only")):
        with pytest.raises(ConfigError, match=says):
            find_box_data(data, *words)


def test_images_beside_folders_count_in_every_form(tmp_path):
    make_folders(tmp_path, 1)
    shutil.copy(tmp_path / "images/val/0.jpg", tmp_path / "images/top.jpg")
    (tmp_path / "images.txt").write_text("".join(f"images/{name}.jpg\n" for name in ("train/0", "top", "val/0")))
    places = [tmp_path / "images", tmp_path / "images.txt", *(
        shutil.make_archive(str(tmp_path / form), form, tmp_path / "images") for form in ("zip", "tar"))]
    for place in places:
        assert [one.name for one in find_box_data(f"images:{place}")] == ["top", "train/0", "val/0"]


def test_the_image_is_another_column_than_the_masks(tmp_path, capsys):
    """Whichever comes first in the data set."""
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    make_folders(tmp_path)
    files = {"mask": "masks/train/{}.png", "photo": "images/train/{}.jpg", "other": "images/val/{}.jpg"}
    rows = [{name: {"bytes": (tmp_path / path.format(i)).read_bytes(), "path": None} for name, path in files.items()}
            for i in range(4)]
    features = datasets.Features({name: datasets.Image() for name in files})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    place = f"hf:{tmp_path / 'saved'}"
    pairs = hub_pairs(place, "mask")
    assert contents(pairs) == [(row["photo"]["bytes"], row["mask"]["bytes"]) for row in rows]
    assert "images of the column photo, masks of mask (there are also other: --image_column)" in capsys.readouterr().err
    assert contents(hub_pairs(place, "mask", "other"))[1][0] == rows[1]["other"]["bytes"]
    with pytest.raises(ConfigError, match="saved,mask: the images are in mask too"):
        find_box_data(f"{place},mask", column="mask")
    datasets.Dataset.from_list(rows, features=features).select_columns(["mask"]).save_to_disk(tmp_path / "alone")
    with pytest.raises(ConfigError, match="there is no column of images beside mask: give --image_column"):
        find_box_data(f"hf:{tmp_path / 'alone'},mask")
