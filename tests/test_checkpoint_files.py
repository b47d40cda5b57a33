"""Files as the disk and other programs leave them: values in options, arrays, gzip, FIFOs, a full disk, odd names."""
import argparse
import datetime
import errno
import gzip
import os
import pathlib
import resource
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoint_files import CheckpointError, printable, read_checkpoint, write_checkpoint

ROOT = Path(__file__).parents[1]
STARTED = datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.timezone(datetime.timedelta(hours=1)))


@pytest.mark.parametrize("zipped", [True, False])
def test_plain_values_in_options(tmp_path, zipped):
    args = argparse.Namespace(
        output_dir=pathlib.PosixPath("/x/~"), data=pathlib.PurePosixPath("a/../b"),
        windows=pathlib.PureWindowsPath("C:/d"), started=STARTED, limit=datetime.timedelta(days=2), day=STARTED.date(),
        device=torch.device("cuda", 0), layers={1, 2}, frozen=frozenset("ab"), model=types.SimpleNamespace(depth=3),
        size=torch.Size([2, 3]))
    torch.save({"args": args}, tmp_path / "run.pth", _use_new_zipfile_serialization=zipped)
    assert vars(read_checkpoint(tmp_path / "run.pth")["args"]) == vars(args) | {
        "output_dir": "/x/~", "data": "a/../b", "windows": "C:\\d", "model": argparse.Namespace(depth=3)}


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])  # the second as Python 3.13 writes it
def test_paths_do_not_touch_the_disk(tmp_path, module, monkeypatch):
    class PosixPath:
        def __reduce__(self):
            return PosixPath, ("/", "x")

    PosixPath.__module__, PosixPath.__qualname__ = module, "PosixPath"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, module, types.ModuleType(module))
        sys.modules[module].PosixPath = PosixPath
        torch.save({"path": PosixPath()}, tmp_path / "run.pth")
    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "__new__", None)
        patch.setattr(pathlib.PosixPath, "__init__", None)
        content = read_checkpoint(str(tmp_path / "run.pth"))
    assert content == {"path": "/x"}


class Call:
    """Pickles as a call of the function with arguments."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("call, imported", [
    (Call(Path.touch, Path("made")), "getattr|touch"), (Call(os.path.expanduser, "~"), "expanduser"),
    (Call(range, 10 ** 12), "range"), (Call(eval, "1"), "eval"), (Call(open, "made", "w"), "open")],
    ids=["touch", "expanduser", "range", "eval", "open"])
def test_everything_else_is_refused(tmp_path, monkeypatch, call, imported):
    monkeypatch.chdir(tmp_path)
    torch.save({"args": argparse.Namespace(output_dir=Path("/x"), option=call)}, "evil.pth")
    with pytest.raises(CheckpointError, match=rf"evil.pth is .*({imported})"):
        read_checkpoint("evil.pth")
    assert os.listdir() == ["evil.pth"]


@pytest.mark.parametrize("args", [(1,), (argparse.Namespace(),), ("/", ["x"])])
def test_paths_of_something_else_are_refused(tmp_path, args):
    torch.save({"path": Call(pathlib.PosixPath, *args)}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="evil.pth is corrupt"):
        read_checkpoint(tmp_path / "evil.pth")


def test_arrays(tmp_path):
    torch.save({"a": np.arange(3.0), "b": np.ones((2, 2), np.float16)}, tmp_path / "arrays.pth")
    content = read_checkpoint(tmp_path / "arrays.pth")
    assert np.array_equal(content["a"], np.arange(3.0)) and content["b"].dtype == np.float16


def test_gzip_is_named(tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "run.pth")
    (tmp_path / "run.pth.gz").write_bytes(gzip.compress((tmp_path / "run.pth").read_bytes()))
    with pytest.raises(CheckpointError, match="run.pth.gz is gzip-compressed: gunzip it first"):
        read_checkpoint(tmp_path / "run.pth.gz")


def test_fifo_device_and_folder_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "run.pth")
    signal.alarm(20)  # a read of the FIFO would wait for ever
    try:
        for path, what in ((tmp_path / "run.pth", r"is a FIFO \(named pipe\), not a file"),
                           ("/dev/zero", "/dev/zero is a device"), (tmp_path, "cannot be read: Is a directory")):
            with pytest.raises(CheckpointError, match=what):
                read_checkpoint(path)
    finally:
        signal.alarm(0)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_real_disk_limit(tmp_path, suffix):
    """A limit on the size of files, set in a process of its own, fails in the middle of a write as a full disk does."""
    path = tmp_path / f"run{suffix}"
    code = (f"import torch, checkpoint_files as files; path = {str(path)!r}\n"
            "files.write_checkpoint({'a': torch.zeros(10)}, path)\n"
            "try: files.write_checkpoint({'a': torch.zeros(100_000)}, path)\n"
            "except files.CheckpointError as error: print(error)")

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, preexec_fn=limit, capture_output=True, text=True)
    assert (run.stderr, run.stdout) == (
        "", f"{path} cannot be written: File too large; the file that was there before is kept\n")
    assert list(tmp_path.iterdir()) == [path] and torch.equal(read_checkpoint(path)["a"], torch.zeros(10))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_full_disk_is_one_line(tmp_path, monkeypatch, number, function):
    path = tmp_path / "run.pth"

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(CheckpointError) as error:
        write_checkpoint({"epoch": 1}, path)
    assert str(error.value) == f"{path} cannot be written: {os.strerror(number)}"
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    write_checkpoint({"epoch": 1}, path)
    monkeypatch.setattr(os, function, fail)
    with pytest.raises(CheckpointError, match="kept$"):
        write_checkpoint({"epoch": 2}, path)
    monkeypatch.undo()
    assert read_checkpoint(path) == {"epoch": 1} and list(tmp_path.iterdir()) == [path]


def test_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    write_checkpoint({"epoch": 1}, path)

    def interrupted(state, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint({"epoch": 2}, path)
    assert read_checkpoint(path) == {"epoch": 1} and list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_pickled_is_not_a_full_disk(tmp_path):
    with pytest.raises((AttributeError, RuntimeError, TypeError), match="pickle"):
        write_checkpoint({"function": lambda: None}, tmp_path / "run.pth")
    with pytest.raises(CheckpointError, match="no/run.pth cannot be written: No such file or directory$"):
        write_checkpoint({}, tmp_path / "no" / "run.pth")
    assert list(tmp_path.iterdir()) == []


def test_names_with_escape_codes(tmp_path):
    assert printable("red \x1b[31mtext\r\n\x9b2J\u202e\udcff\x7f ok é 家") == "red ?[31mtext???2J??? ok é 家"
    assert len(printable("x" * 10_000_000)) == 4001
    with pytest.raises(CheckpointError, match=r"^\S+/\?\[2Jnone.pth cannot be read"):
        read_checkpoint(tmp_path / "\x1b[2Jnone.pth")
