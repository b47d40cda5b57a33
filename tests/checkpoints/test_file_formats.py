"""Files of other formats are named, with what to do about them; only what is cut short is to be downloaded again."""
import bz2
import gzip
import io
import lzma
import subprocess
import tarfile
import warnings
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

from selfpatch.checkpoints.files import CheckpointError, read_checkpoint


@pytest.fixture(scope="module")
def checkpoint():
    file = io.BytesIO()
    torch.save({"a": torch.arange(300.0)}, file)
    return file.getvalue()


def tar(content, mode="w"):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        member = tarfile.TarInfo("run.pth")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def archive(names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as held:
        for name in names:
            held.writestr(name, b"x")
    return file.getvalue()


def arrays(save):
    file = io.BytesIO()
    save(file)
    return file.getvalue()


def program():
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    return file.getvalue()


@pytest.mark.parametrize("make, expected", [
    (gzip.compress, "is gzip-compressed: run gunzip < FILE > NEW$"),
    (bz2.compress, "is bzip2-compressed: run bunzip2 < FILE > NEW$"),
    (lzma.compress, "is xz-compressed: run unxz < FILE > NEW$"),
    (lambda c: b"\x28\xb5\x2f\xfd" + c, "is zstd-compressed: run unzstd"),
    (lambda c: b"7z\xbc\xaf\x27\x1c" + c, "is a 7z archive: run 7z x"), (tar, "is a tar archive: run tar -xf"),
    (lambda c: tar(c, "w:gz"), "is a tar archive, gzip-compressed: run tar -xf FILE"),
    (lambda c: tar(c, "w:bz2"), "is a tar archive, bzip2-compressed"),
    (lambda c: tar(c, "w:xz"), "is a tar archive, xz-compressed"),
    (lambda c: archive(["run.pth", "b", "c", "d"]), "is a zip archive of run.pth, b, c, …: unzip it"),
    (lambda c: archive([]), "is a zip archive without a file"),
    (lambda c: arrays(lambda file: np.savez(file, a=np.zeros(3))), r"has NumPy arrays \(.npz\): save its arrays by"),
    (lambda c: arrays(lambda file: np.save(file, np.zeros(3))), r"is a NumPy array \(.npy\)"),
    (lambda c: b"\x89HDF\r\n\x1a\n" + bytes(99), "is an HDF5 file"), (lambda c: program(), "is a TorchScript program"),
    (lambda c: b"\x08\x08\x12\x07pytorch" + bytes(99), "is an ONNX model"), (lambda c: bytes(999), "only zeros"),
    (lambda c: b"\xff\xd8\xff\xe0" + bytes(99), "is a JPEG image"), (lambda c: b"%PDF-1.4\n\xe2", "is a PDF document"),
    (lambda c: b"\x1f\x8b" + bytes(20), "is gzip-compressed"), (lambda c: b"\x08\x08\xff" + bytes(99), "Unsupported"),
])
def test_other_formats(tmp_path, checkpoint, make, expected):
    path = tmp_path / "run.pth"
    path.write_bytes(make(checkpoint))
    with pytest.raises(CheckpointError, match=f"run.pth {expected}" if expected[0] in "ih" else expected) as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value)
    assert ("again" in str(error.value)) == any(words in expected for words in ("only zeros", "without a file"))


def test_the_advice_for_gzip_works(tmp_path, checkpoint):
    """gunzip FILE itself refuses the suffix .pth."""
    (tmp_path / "run.pth").write_bytes(gzip.compress(checkpoint))
    subprocess.run("gunzip < run.pth > new.pth", shell=True, check=True, cwd=tmp_path)
    assert read_checkpoint(tmp_path / "new.pth")["a"].shape == (300,)


@pytest.mark.parametrize("kind", ["new", "old", "safetensors"])
def test_every_cut_is_called_one(tmp_path, kind):
    path, state = tmp_path / "run.pth", {"a": torch.ones(300), "b": torch.ones(4, 5)}
    if kind == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "new")
    content = path.read_bytes()
    for length in range(80, len(content), 37):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="run.pth is (truncated|a plain pickle)"):
            read_checkpoint(path)


def test_damaged_directory_of_a_zip_file(tmp_path, checkpoint):
    path, start = tmp_path / "run.pth", checkpoint.rindex(b"PK\x01\x02")
    for i in range(start, len(checkpoint)):
        path.write_bytes(checkpoint[:i] + bytes([checkpoint[i] ^ 0xff]) + checkpoint[i + 1:])
        try:
            read_checkpoint(path)
        except CheckpointError as error:
            assert "\n" not in str(error)
