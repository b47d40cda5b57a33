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
