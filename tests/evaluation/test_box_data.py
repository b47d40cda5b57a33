"""Data sets of boxes as other programs write them: damage in one line, and what is left out by name."""
import json
import os

import pytest
from dense_data import make_folders, make_voc

from selfpatch.errors import ConfigError
from selfpatch.evaluation.object_discovery import find_box_data
from selfpatch.evaluation.segmentation import find_segmentation_data


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
