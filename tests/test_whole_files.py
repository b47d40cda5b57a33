"""A file or folder is replaced by a whole one or stays as it was."""
import errno
import os
from pathlib import Path

import pytest

from selfpatch.whole_files import WriteError, whole_file, whole_folder


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
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse_the_new_one)
    with pytest.raises(WriteError, match="b cannot be written: .*; the folder that was there before is kept$"):
        write(tmp_path / "b", "two")
    assert (tmp_path / "b" / "file").read_text() == "one" and os.listdir(tmp_path) == ["b"]


def test_through_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    write(tmp_path / "link", "one")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "file").read_text() == "one"


def test_a_file_stays_as_it_was_when_the_write_fails(tmp_path):
    for text in ("one", "two"):
        with whole_file(tmp_path / "file", suffix=".txt") as temporary:
            assert temporary.suffix == ".txt" and temporary.parent == tmp_path
            temporary.write_text(text)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for error, seen in ((full, WriteError), (KeyboardInterrupt(), KeyboardInterrupt), (ValueError("x"), ValueError)):
        with pytest.raises(seen) as caught, whole_file(tmp_path / "file") as temporary:
            temporary.write_text("half")
            raise error
        if seen is WriteError:
            assert caught.value.errno == errno.ENOSPC and str(caught.value).endswith(
                "/file cannot be written: No space left on device; the file that was there before is kept")
        assert (tmp_path / "file").read_text() == "two" and os.listdir(tmp_path) == ["file"]


def test_two_writers_of_one_file_use_two_temporary_files(tmp_path):
    with whole_file(tmp_path / "file") as one, whole_file(tmp_path / "file") as two:
        one.write_text("one")
        two.write_text("two")
    assert one != two and (tmp_path / "file").read_text() == "one" and os.listdir(tmp_path) == ["file"]


def test_the_file_before_is_kept_under_another_name(tmp_path):
    for text in ("one", "two", "three"):
        with whole_file(tmp_path / "file", previous=tmp_path / "before") as temporary:
            temporary.write_text(text)
    assert [(tmp_path / name).read_text() for name in ("before", "file")] == ["two", "three"]
    assert sorted(os.listdir(tmp_path)) == ["before", "file"]


def test_a_file_through_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "file")
    with whole_file(tmp_path / "link") as temporary:
        temporary.write_text("one")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "file").read_text() == "one"


def test_a_name_that_is_too_long_is_one_line(tmp_path):
    with pytest.raises(WriteError, match="cannot be written: File name too long"), whole_file(tmp_path / ("x" * 256)):
        pass
