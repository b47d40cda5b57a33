"""Files as the disk leaves them: FIFOs, a full disk, interrupted writes, odd names, header texts."""
import errno
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch
from repository import ROOT

from selfpatch.checkpoints.files import CheckpointError, printable, read_checkpoint, read_metadata, write_checkpoint
from selfpatch.whole_files import WriteError


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
    code = (f"import torch; from selfpatch.checkpoints import files; path = {str(path)!r}\n"
            "files.write_checkpoint({'a': torch.zeros(10)}, path)\n"
            "try: files.write_checkpoint({'a': torch.zeros(100_000)}, path)\n"
            "except files.ConfigError as error: print(error)")

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
    with pytest.raises(WriteError) as error:
        write_checkpoint({"epoch": 1}, path)
    assert str(error.value) == f"{path} cannot be written: {os.strerror(number)}"
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    write_checkpoint({"epoch": 1}, path)
    monkeypatch.setattr(os, function, fail)
    with pytest.raises(WriteError, match="kept$"):
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
    with pytest.raises(WriteError, match="no/run.pth cannot be written: No such file or directory$"):
        write_checkpoint({}, tmp_path / "no" / "run.pth")
    assert list(tmp_path.iterdir()) == []


def test_texts_in_the_header(tmp_path):
    write_checkpoint({"a": torch.zeros(1)}, tmp_path / "a.safetensors", metadata={"num_heads": "12"})
    assert read_metadata(tmp_path / "a.safetensors") == {"format": "pt", "num_heads": "12"}
    write_checkpoint({"a": torch.zeros(1)}, tmp_path / "a.pth")
    assert read_metadata(tmp_path / "a.pth") == {}


def test_names_with_escape_codes(tmp_path):
    assert printable("red \x1b[31mtext\r\n\x9b2J\u202e\udcff\x7f ok é 家") == "red ?[31mtext???2J??? ok é 家"
    assert len(printable("x" * 10_000_000)) == 4001
    with pytest.raises(CheckpointError, match=r"^\S+/\?\[2Jnone.pth cannot be read"):
        read_checkpoint(tmp_path / "\x1b[2Jnone.pth")
