"""Recognise files that are no checkpoints by their first bytes, and say what to do with them."""
import bz2
import contextlib
import gzip
import lzma
import zipfile
from pathlib import Path

CONVERT = "save its arrays by torch.save, as a dictionary of tensors"
# (offset, bytes there, what the file is, what to do with it)
FOREIGN_FORMATS = (
    (0, b"\x1f\x8b", "gzip-compressed", "run gunzip < FILE > NEW"),
    (0, b"BZh", "bzip2-compressed", "run bunzip2 < FILE > NEW"),
    (0, b"\xfd7zXZ\0", "xz-compressed", "run unxz < FILE > NEW"),
    (0, b"\x28\xb5\x2f\xfd", "zstd-compressed", "run unzstd < FILE > NEW"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "run 7z x FILE, and give the file that it holds"),
    (0, b"Rar!", "a RAR archive", "unpack it, and give the file that it holds"),
    (257, b"ustar", "a tar archive", "run tar -xf FILE, and give the file that it holds"),
    (0, b"\x93NUMPY", "a NumPy array (.npy)", CONVERT),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file", CONVERT),
    (0, b"\x89PNG", "a PNG image", "give a checkpoint"),
    (0, b"\xff\xd8\xff", "a JPEG image", "give a checkpoint"),
    (0, b"%PDF", "a PDF document", "give a checkpoint"),
)
OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
MARKUP = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")
ONNX_FIELDS = b"\x12\x1a\x22\x2a\x3a\x42"  # tags that can follow the version in an ONNX model


def what_instead(path: str | Path, start: bytes) -> str | None:
    """Say what a file is and what to do with it, as the end of a sentence; None if it may be a checkpoint.

    Args:
        start: its first 512 bytes.
    """
    for offset, magic, what, advice in FOREIGN_FORMATS:
        if start[offset:offset + len(magic)] == magic:
            if magic in OPENERS and _holds_tar(path, OPENERS[magic]):
                what, advice = f"a tar archive, {what}", "run tar -xf FILE, and give the file that it holds"
            return f"is {what}: {advice}"
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(MARKUP):
        return "is an HTML page, probably from a failed download: download it again"
    if not start.strip(b"\0"):
        return "has only zeros at its start, as after an interrupted download or copy: download or copy it again"
    if start[0] == 8 and start[1:2] <= b"\x20" and start[2:3] in [bytes([tag]) for tag in ONNX_FIELDS]:
        return "is an ONNX model: give the PyTorch checkpoint that it was exported from"
    return _what_zip(path) if start.startswith(b"PK") else None


def _what_zip(path: str | Path) -> str | None:
    try:
        if not zipfile.is_zipfile(path):
            return "is truncated: download or copy it again"
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        return f"is damaged ({error}): download or copy it again"
    if any(name.endswith("/constants.pkl") for name in names):
        return "is a TorchScript program (torch.jit.save): give the state_dict of the model that it was made from"
    if any(name.endswith("/data.pkl") for name in names):
        return None
    if names and all(name.endswith(".npy") for name in names):
        return f"has NumPy arrays (.npz): {CONVERT}"
    held = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"is a zip archive of {held}: unzip it, and give the file that it holds" if names else (
        "is a zip archive without a file: download or copy it again")


def _holds_tar(path: str | Path, opener) -> bool:
    with contextlib.suppress(OSError, EOFError, lzma.LZMAError, zipfile.BadZipFile), opener(path) as file:
        return file.read(512)[257:262] == b"ustar"
    return False
