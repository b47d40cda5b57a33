"""Options that take a file are given a pipe, as of <(command), or a device: one line at once, nothing read in part."""
import os
import signal
from pathlib import Path

import pytest

from selfpatch.checkpoints.files import read_checkpoint
from selfpatch.data.files import load_rgb
from selfpatch.data.sources import open_images
from selfpatch.errors import ConfigError
from selfpatch.evaluation.object_discovery import find_box_data
from selfpatch.evaluation.tables import check_output, write_json
from selfpatch.video.davis import read_set


@pytest.fixture
def pipe(tmp_path):
    signal.alarm(60)  # opening it would wait for a writer
    yield lambda name: os.mkfifo(tmp_path / name) or tmp_path / name
    signal.alarm(0)


def read_sequences(path: Path) -> None:
    (path.parent / "ImageSets" / "2017").mkdir(parents=True)
    path.rename(path.parent / "ImageSets" / "2017" / "val.txt")
    read_set(path.parent)


@pytest.mark.parametrize("name, read, message", [
    ("list", open_images, "--data_path: cannot read .*list .a pipe or a device.*: give a file"),
    ("x.txt", lambda path: open_images([path], "--knn_data"), "--knn_data: cannot read .*x.txt .a pipe"),
    ("x.zip", open_images, "cannot read .*x.zip .a pipe"), ("x.tar", open_images, "cannot read .*x.tar .a pipe"),
    ("x.py", lambda path: open_images(f"{path}:a"), "there is no file .*x.py, which"),
    ("x.pth", read_checkpoint, "x.pth is a FIFO"), ("x.jpg", load_rgb, "x.jpg is not a regular file"),
    ("x.json", lambda path: find_box_data(f"coco:{path},{path.parent}"), "cannot read .*x.json .a pipe"),
    ("val.txt", read_sequences, "val.txt: cannot be read .a pipe"),
    ("y.json", lambda path: write_json({}, path), "y.json cannot be written: a pipe"),
    ("z.json", lambda path: check_output(path, overwrite=True), "z.json exists: give another name$")])
def test_a_pipe_is_one_line(pipe, name, read, message):
    path = pipe(name)
    with pytest.raises(ConfigError, match=message) as error:
        read(path)
    assert "\n" not in str(error.value)


def test_a_device_is_never_replaced():
    with pytest.raises(ConfigError, match="/dev/null cannot be written: a pipe or a device"):
        write_json({}, "/dev/null")
    assert Path("/dev/null").is_char_device()


def test_what_a_command_writes_and_standard_input(image_folder, tmp_path):
    """<(cat list) is a pipe, by its number; /dev/stdin may be a file, which is read like any other."""
    (tmp_path / "list").write_text("".join(f"{path}\n" for path in image_folder.rglob("*.jpg")))
    reading, writing = os.pipe()
    os.close(writing)
    with os.fdopen(reading), pytest.raises(ConfigError, match="a pipe or a device"):
        open_images(f"/dev/fd/{reading}")
    with open(tmp_path / "list") as file:
        assert len(open_images(f"/dev/fd/{file.fileno()}")) == 12
