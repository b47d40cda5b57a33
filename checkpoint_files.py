"""Checkpoint files: written atomically, and read without executing code from the file."""
import argparse
import contextlib
import datetime
import os
import re
import stat
import warnings
import zipfile
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import safetensors.torch
import torch

from errors import ConfigError, printable

# argparse.Namespace for args, the plain values in it, and NumPy scalars: the published training loop stores np.float64
# learning rates. range is not among them: set(range(n)) would fill the memory from a few bytes.
NUMPY_SCALAR = np.float64(0).__reduce__()[0]
NUMPY_TYPES = (np.bool_, np.uint8, np.uint16, np.uint32, np.uint64, np.int8, np.int16, np.int32, np.int64, np.float16,
               np.float32, np.float64, np.str_)
ALLOWED_CLASSES = [argparse.Namespace, frozenset, datetime.date, datetime.datetime, datetime.time, datetime.timedelta,
                   datetime.timezone, np.dtype, *(type(np.dtype(number)) for number in NUMPY_TYPES),
                   *((NUMPY_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core"))]
RECONSTRUCT_ARRAY = np.zeros(0).__reduce__()[0]
LEGACY_TORCH_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")  # first number that torch.save wrote before torch 1.6
FILE_TYPES = ((stat.S_ISFIFO, "a FIFO (named pipe)"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"),
              (stat.S_ISBLK, "a device"))


class CheckpointError(ConfigError):
    """A checkpoint that cannot be used; the message is one line for the user, without control characters."""

    def __init__(self, message: str, every_rank: bool = False):
        super().__init__(printable(message), every_rank)


class HistoryPlaceholder:
    """Replaces mmengine's HistoryBuffer, which its training checkpoints contain but this project does not need."""


def placeholder_getattr(cls: type, name: str) -> str:
    """Replaces getattr, which those checkpoints use to refer to the methods of a history."""
    if cls is not HistoryPlaceholder:
        raise CheckpointError(f"it requires {name} of {getattr(cls, '__name__', cls)}, which no checkpoint needs")
    return name


def posix_path(*parts: str) -> str:
    """Replaces pathlib's classes: the path as a string, joined without a look at the disk."""
    return str(PurePosixPath(*parts))


def windows_path(*parts: str) -> str:
    """As posix_path, for a run on Windows."""
    return str(PureWindowsPath(*parts))


PLACEHOLDERS = [(HistoryPlaceholder, "mmengine.logging.history_buffer.HistoryBuffer"),
                (placeholder_getattr, "builtins.getattr"), (np.ndarray, "numpy.ndarray"),
                *((RECONSTRUCT_ARRAY, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
                # pathlib._local is where Python 3.13 defines them
                *((posix_path, f"{module}.{name}") for module in ("pathlib", "pathlib._local")
                  for name in ("Path", "PosixPath", "PurePath", "PurePosixPath")),
                *((windows_path, f"{module}.{name}") for module in ("pathlib", "pathlib._local")
                  for name in ("WindowsPath", "PureWindowsPath")),
                (argparse.Namespace, "types.SimpleNamespace")]


def allowed_classes() -> list:
    """Classes and functions that read_checkpoint may load.

    Those that the program has registered with torch.serialization, such as mmengine's real HistoryBuffer, take
    precedence over the placeholders.
    """
    registered = {entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}"
                  for entry in torch.serialization.get_safe_globals()}
    return ALLOWED_CLASSES + [entry for entry in PLACEHOLDERS if entry[1] not in registered]


def write_checkpoint(state: dict, path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Save state atomically: after a crash at any moment, path is either the old file or the complete new one.

    Args:
        state: anything that torch.save takes; a flat dictionary of tensors if path ends in .safetensors.
        path: file to write or replace; of a link, the file that it leads to.
        metadata: for .safetensors, texts that go into its header.

    Raises:
        CheckpointError: the disk is full or cannot be written; the old file is kept.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # two processes never write to one file
    try:
        with open(temporary, "wb") as file:
            if path.suffix == ".safetensors":
                # safetensors refuses tensors that share memory
                state = {name: tensor.clone().contiguous() for name, tensor in state.items()}
                file.write(safetensors.torch.save(state, {"format": "pt"} | (metadata or {})))
            else:
                torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        if (cause := _os_error(error)) is None:
            raise
        kept = "; the file that was there before is kept" if os.path.isfile(path) else ""
        raise CheckpointError(f"{path} cannot be written: {cause.strerror or cause}{kept}") from None
    finally:
        with contextlib.suppress(OSError):  # a disk that became read-only
            temporary.unlink(missing_ok=True)


def _os_error(error: BaseException | None) -> OSError | None:
    """The OSError behind an error: torch's zip writer raises a RuntimeError on top of it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def read_checkpoint(path: str | Path) -> dict:
    """Load a file that torch.save or safetensors wrote, onto the CPU.

    Only the classes in allowed_classes() are unpickled: besides tensors, plain containers and numbers, argparse's
    Namespace, dates, and NumPy's arrays and scalars. Paths become strings.

    Raises:
        CheckpointError: the file is missing, empty, truncated, a FIFO or a device, not a checkpoint, or would execute
            code, or its bytes do not have the checksums that torch.save wrote beside them.
    """
    is_safetensors = _is_safetensors(path)
    try:
        if is_safetensors:
            return safetensors.torch.load_file(path)
        check_sums(path)
        with torch.serialization.safe_globals(allowed_classes()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # errors are reported below, in one line
            content = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # corrupt bytes can raise almost anything in the unpickler
        raise _explain(path, error) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} contains a {type(content).__name__}, not a dictionary of tensors")
    return content


def read_metadata(path: str | Path) -> dict[str, str]:
    """The texts in the header of a .safetensors file that read_checkpoint can read; empty for other files."""
    if not _is_safetensors(path):
        return {}
    with safetensors.safe_open(path, "pt") as file:
        return file.metadata() or {}


def check_sums(path: str | Path) -> None:
    """Compare the records of a torch.save file with their CRC-32, which torch.load does not look at.

    Files in other formats have no checksums, nor do those written under set_crc32_options(False): they pass.

    Raises:
        zipfile.BadZipFile: a record has changed since it was written.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            # torch.save never compresses, and torch.load refuses what is; inflating it could take forever
            if not record.CRC or record.compress_type != zipfile.ZIP_STORED:
                continue
            with archive.open(record) as file:
                while file.read(2**22):
                    pass


def _explain(path: str | Path, error: Exception) -> CheckpointError:
    """Turn an error of torch's or safetensors' reader into one line."""
    if match := re.search(r"GLOBAL (\S+)", str(error)):
        return CheckpointError(
            f"{path} is refused: loading it would import {match[1]}, but checkpoints may contain only tensors, plain "
            "containers, numbers and argparse.Namespace; ask its author for the state_dict alone")
    if match := re.search(r"WeightsUnpickler error: (.+)", str(error)):
        return CheckpointError(f"{path} is refused: torch's safe reader reports {match[1]!r}; ask its author for the "
                               "state_dict alone")
    reason = re.split(r"\. |\n", str(error))[0] or type(error).__name__  # torch adds unsafe advice after this
    return CheckpointError(f"{path} is corrupt, truncated or not a checkpoint ({reason}): download or copy it again")


def _is_safetensors(path: str | Path) -> bool:
    """Whether the file is in safetensors' format rather than torch's, from its first 64 bytes.

    Raises:
        CheckpointError: those bytes show that it is in neither format, or there is no file to read.
    """
    try:
        mode = os.stat(path).st_mode  # before it is opened: opening a FIFO waits for a writer
        for matches, what in FILE_TYPES:
            if matches(mode):
                raise CheckpointError(f"{path} is {what}, not a file: give the path of a checkpoint")
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if not start:
        raise CheckpointError(f"{path} is empty (0 bytes): download or copy it again")
    if start[4:9] == b"\0\0\0\0{":  # header length in 8 bytes (little-endian), then the JSON header
        return True
    if start.startswith(b"\x1f\x8b"):
        raise CheckpointError(f"{path} is gzip-compressed: gunzip it first")
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.lower().startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")):
        raise CheckpointError(f"{path} is an HTML page, probably from a failed download: download it again")
    if start.startswith(b"PK") and not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} is truncated: download or copy it again")
    if start.startswith(b"\x80") and LEGACY_TORCH_MAGIC not in start:
        raise CheckpointError(f"{path} is a plain pickle, not written by torch.save: loading it could execute code")
    if all(byte >= 32 or byte in b"\t\r\n" for byte in start):
        line = (text.decode(errors="replace").splitlines() or [""])[0]
        raise CheckpointError(f"{path} is a text file that starts with {line!r}, not a checkpoint")
    return False
