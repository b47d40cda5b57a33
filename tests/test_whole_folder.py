"""A folder is replaced by a whole one or stays as it was."""
import os
from pathlib import Path

import pytest

from selfpatch.whole_files import whole_folder


def write(folder, text, fail=False):
    with whole_folder(folder) as temporary:
        (temporary / "file").write_text(text)
        if fail:
            raise KeyboardInterrupt


def test_new_and_replaced(tmp_path):
    for text in ("one", "two"):
        write(tmp_path / "a" / "b", text)
        assert (tmp_path / "a" / "b" / "file").read_text() == text
    assert os.listdir(tmp_path / "a") == ["b"]


def test_interrupted(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "b", "one", fail=True)
    assert not os.listdir(tmp_path)


def test_what_was_there_comes_back(tmp_path, monkeypatch):
    write(tmp_path / "b", "one")
    rename = Path.rename

    def refuse_the_new_one(path, target):
        if path.suffix == ".tmp":
            raise PermissionError(target)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse_the_new_one)
    with pytest.raises(PermissionError):
        write(tmp_path / "b", "two")
    assert (tmp_path / "b" / "file").read_text() == "one" and os.listdir(tmp_path) == ["b"]


def test_through_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    write(tmp_path / "link", "one")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "file").read_text() == "one"
