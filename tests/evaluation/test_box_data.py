"""Data sets of boxes: what is found, what is left out by name, and damage in one line."""
import json
import os

import numpy as np
import pytest
from dense_data import TRUE_BOXES, make_folders, make_voc, write_pair

from selfpatch.errors import ConfigError
from selfpatch.evaluation.object_discovery import boxes_of_mask, find_box_data
from selfpatch.evaluation.segmentation import IGNORE, find_segmentation_data
from selfpatch.evaluation.tables import unique_names


def test_boxes_of_voc_coco_and_masks(tmp_path):
    voc = find_box_data(f"voc:{make_voc(tmp_path / 'voc')}")
    assert len(voc) == 3 and voc[0].read_boxes().tolist() == TRUE_BOXES
    masks = find_box_data(f"folders:{make_folders(tmp_path / 'pairs')}")
    assert masks[0].name == "train/0" and masks[0].read_boxes().tolist() == TRUE_BOXES
    content = {"images": [{"id": 7, "file_name": "0.jpg"}, {"id": 8, "file_name": "1.jpg"}],
               "annotations": [{"image_id": 7, "bbox": [8, 8, 32, 32], "iscrowd": 0},
                               {"image_id": 7, "bbox": [0, 0, 90, 60], "iscrowd": 1}]}
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    coco = find_box_data(f"coco:{tmp_path / 'boxes.json'},{tmp_path / 'pairs' / 'images' / 'train'}")
    assert [image.read_boxes().tolist() for image in coco] == [TRUE_BOXES[:1], []]
    plain = find_box_data(f"images:{tmp_path / 'pairs' / 'images'}")
    assert len(plain) == 8 and plain[0].read_boxes() is None


def test_images_of_one_stem_have_names_of_their_own(tmp_path):
    """Results are kept by name, and pictures written to files of that name."""
    assert unique_names(["a/x.jpg", "b/x.jpg", "a/x.png", "../c/y.jpg", "/d/y.jpg"]) == [
        "a/x.jpg", "b/x", "a/x.png", "c/y", "d/y"]
    folder = make_folders(tmp_path, 2).split(",")[0]
    (tmp_path / "images/val/1.png").write_bytes((tmp_path / "images/val/1.jpg").read_bytes())
    names = ["train/0", "train/1", "val/0", "val/1.jpg", "val/1.png"]
    for data in (f"images:{folder}", f"folders:{folder},{tmp_path / 'masks'}"):
        assert [image.name for image in find_box_data(data)] == names
    content = {"images": [{"id": i, "file_name": f"{split}/0.jpg"} for i, split in enumerate(("train", "val"))],
               "annotations": [{"image_id": 0, "bbox": [8, 8, 32, 32]}]}
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    assert [image.name for image in find_box_data(f"coco:{tmp_path / 'boxes.json'},{folder}")] == ["train/0", "val/0"]


def test_masks_without_objects(tmp_path):
    data = f"folders:{make_folders(tmp_path)}"
    for split in ("train", "val"):
        for i in range(4):
            write_pair(tmp_path / f"images/{split}/{i}.jpg", tmp_path / f"masks/{split}/{i}.png", i, np.zeros_like)
    with pytest.raises(ConfigError, match="has no boxes; 255 is no object.*images:FOLDER works without them"):
        find_box_data(data)
    write_pair(tmp_path / "images/val/3.jpg", tmp_path / "masks/val/3.png", 3)
    assert len(find_box_data(data)) == 8


def test_ignored_pixels_have_no_box():
    mask = np.zeros((5, 6), np.uint8)
    mask[1:3, 2:5], mask[4, 5] = 7, IGNORE
    assert boxes_of_mask(mask).tolist() == [[2, 1, 5, 3]]
    assert boxes_of_mask(np.zeros((5, 6), np.uint8)).shape == (0, 4)


@pytest.mark.parametrize("bbox, expected", [
    (["8", "8", "32", 32.0], TRUE_BOXES[:1]), ([], None), (None, None), ([8, 8, 0, 0], None),
    ([50, 50, -20, -20], None), ([float("nan")] * 4, None), ([8, 8, float("inf"), 9], None), ([-9, 8, 5, 5], None),
    ("8832", None), ([[8], 8, 3, 3], None),
    (["x", 8, 3, 3], None), ([8, 8, 32], None), ([-8, -8, 900, 900], [[-8, -8, 892, 892]])])
def test_an_odd_box_is_left_out_by_name(tmp_path, capsys, bbox, expected):
    """And what is written as text is a number; a BOM and ids as text are read."""
    folder = make_folders(tmp_path).split(",")[0]
    content = {"images": [{"id": "7", "file_name": "0.jpg"}, {"id": 8, "file_name": "1.jpg"}],
               "annotations": [{"id": 3, "image_id": 7, "bbox": bbox},
                               {"id": 4, "image_id": "8", "bbox": [1, 2, 3, 4]}]}
    (tmp_path / "boxes.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(content).encode())
    images = find_box_data(f"coco:{tmp_path / 'boxes.json'},{folder}/train")
    assert [one.read_boxes().tolist() for one in images] == [expected or [], [[1, 2, 4, 6]]]
    err = capsys.readouterr().err
    assert err.count("\n") == (expected is None)
    assert expected or "boxes.json are left out" in err and ": annotation 3 of image 7 has " in err


def test_odd_boxes_of_voc(tmp_path, capsys):
    root = make_voc(tmp_path / "voc")
    path = root / "Annotations/000001.xml"
    box = "<object><bndbox><xmin>{}</xmin><ymin>2</ymin><xmax>{}</xmax><ymax>9</ymax></bndbox></object>"
    boxes = "".join(box.format(*sides) for sides in ((1, 5.0), (" 5 ", 5), (6, 5), ("nan", 5), ("", 5)))
    path.write_text(f"\ufeff<annotation>{boxes}<object><bndbox><xmin>3</xmin></bndbox></object></annotation>")
    assert find_box_data(f"voc:{root}")[1].read_boxes().tolist() == [[0, 1, 5, 9], [4, 1, 5, 9]]
    err = capsys.readouterr().err
    assert "4 boxes of" in err and "Annotations/000001.xml has ['6', '2', '5', '9'], …" in err and err.count("\n") == 1


def test_a_coco_file_with_two_images_of_one_id(tmp_path):
    folder = make_folders(tmp_path).split(",")[0]
    content = {"images": [{"id": 1, "file_name": "0.jpg"}, {"id": "1", "file_name": "1.jpg"}], "annotations": []}
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="^--data coco: .*boxes.json has several images of the id 1"):
        find_box_data(f"coco:{tmp_path / 'boxes.json'},{folder}/train")


@pytest.mark.parametrize("change, data, says", [
    (lambda root: (root / "voc/Annotations/000001.xml").unlink(), "voc:{0}/voc", "cannot read the boxes .*000001.xml"),
    (lambda root: (root / "voc/Annotations/000001.xml").write_text("<a>"), "voc:{0}/voc", "is not VOC's annotation"),
    (lambda root: (root / "voc/JPEGImages/000001.jpg").unlink(), "voc:{0}/voc", "1 of 3 images are missing"),
    (lambda root: [path.write_text("<a></a>") for path in (root / "voc/Annotations").iterdir()], "voc:{0}/voc",
     "has no boxes; images:FOLDER works without"),
    (lambda root: (root / "x.json").write_text("[]"), "coco:{0}/x.json,{0}/voc", "no instances in COCO's format"),
    (lambda root: None, "coco:{0}/y.json,{0}/voc", "cannot read .*y.json"),
    (lambda root: None, "images:{0}/voc/ImageSets", "there are no images"),
    (lambda root: None, "voc:{0}", "is not a VOC folder"),
    (lambda root: None, "boxes:{0}", "--data boxes:.*: give voc:PLACE")])
def test_refusals_of_boxes(tmp_path, change, data, says):
    make_voc(tmp_path / "voc")
    change(tmp_path)
    with pytest.raises(ConfigError, match=says):
        find_box_data(data.format(tmp_path))


# ---------------------------------------------------------------- damage


def test_a_pipe_with_the_name_of_an_image_is_refused(tmp_path):
    data = f"folders:{make_folders(tmp_path)}"
    (tmp_path / "masks/val/1.png").unlink()
    os.mkfifo(tmp_path / "masks/val/1.png")
    for find in (find_box_data, lambda text: find_segmentation_data(text, 3)):
        with pytest.raises(ConfigError, match="val/1.png is not a regular file"):
            find(data)


@pytest.mark.parametrize("name, content, says", [
    ("voc/Annotations/000001.xml", '<?xml version="1.0" encoding="foo"?><a/>', "is not VOC's annotation .*unknown enc"),
    ("boxes.json", "[" * 100_000, "boxes.json has no instances in COCO's format .Recursion")])
def test_what_no_program_writes(tmp_path, name, content, says):
    root = make_voc(tmp_path / "voc")
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=says):
        find_box_data(f"voc:{root}" if name.startswith("voc") else f"coco:{tmp_path / name},{root / 'JPEGImages'}")


def test_annotations_of_coco_as_other_programs_write_them(tmp_path, capsys):
    """Boxes beside the image, ids as floats or of no image, flags as text, and images listed twice."""
    folder = make_folders(tmp_path).split(",")[0]
    content = {"images": [{"id": 1, "file_name": "0.jpg", "width": 96, "height": "64"},
                          {"id": "2", "file_name": "1.jpg", "width": 0, "height": None},
                          {"id": 1.0, "file_name": "0.jpg", "width": 96, "height": 64}],
               "annotations": [{"id": 1, "image_id": 1.0, "bbox": [8, 8, 32, 32], "iscrowd": "0"},
                               {"id": 2, "image_id": "1", "bbox": [0, 0, 9, 9], "iscrowd": "1"},
                               {"id": 3, "image_id": 1, "bbox": [9000, 20, 10, 10]},
                               {"id": 4, "image_id": 1, "bbox": [20, 64, 10, 10]},
                               {"id": 5, "image_id": 2.0, "bbox": [9000, 20, 10, 10], "iscrowd": False},
                               {"id": 6, "image_id": 3, "bbox": [1, 2, 3, 4]},
                               {"id": 7, "bbox": [1, 2, 3, 4]}, {"id": 8, "image_id": None, "bbox": [1, 2, 3, 4]}]}
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    images = find_box_data(f"coco:{tmp_path / 'boxes.json'},{folder}/train")
    assert [one.read_boxes().tolist() for one in images] == [[[8, 8, 40, 40]], [[9000, 20, 9010, 30]]]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and "1 images of" in lines[0] and "count once for each id: 0.jpg" in lines[0]
    assert "2 boxes of" in lines[1] and "pixels of their image: annotation 3 of image 1 has [9000" in lines[1]
    assert "3 boxes of" in lines[2] and "not among its images: annotation 6 of image 3, …" in lines[2]


def test_boxes_of_voc_beside_the_image(tmp_path, capsys):
    root = make_voc(tmp_path / "voc")
    path = root / "Annotations/000000.xml"
    whole = path.read_text().replace("<annotation>", "<annotation><size><width>56</width><height>64</height></size>")
    path.write_text(whole)
    assert find_box_data(f"voc:{root}")[0].read_boxes().tolist() == [[8, 8, 40, 40]]
    assert "Annotations/000000.xml has ['57', '33', '88', '56']" in capsys.readouterr().err
