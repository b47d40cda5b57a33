"""Checkpoint files: written atomically, and read without executing code from the file."""
import os
import pickle
import re
import stat
import warnings
import zipfile
from pathlib import Path

import safetensors.torch
import torch

from selfpatch.checkpoints.foreign_files import what_instead
from selfpatch.checkpoints.pickled_classes import StandIn, allowed_classes, is_refused, name_of, stand_ins
from selfpatch.errors import ConfigError, printable
from selfpatch.whole_files import whole_file

LEGACY_TORCH_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")  # first number in a file of torch before 1.6
FILE_TYPES = ((stat.S_ISFIFO, "a FIFO (named pipe)"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"),
              (stat.S_ISBLK, "a device"))


class CheckpointError(ConfigError):
    """A checkpoint cannot be used; the message is one line for the user, without control characters."""

    def __init__(self, message: str, every_rank: bool = False):
        super().__init__(printable(message), every_rank)


def write_checkpoint(state: dict, path: str | Path, previous: Path | None = None,
                     metadata: dict[str, str] | None = None) -> None:
    """Save state as a whole file, see whole_files.whole_file.

    Args:
        state: anything that torch.save takes; a flat dictionary of tensors if path ends in .safetensors.
        path: file to write or replace; a link is followed.
        previous: keep under this name the file that is replaced.
        metadata: texts for the header of a .safetensors file.

    Raises:
        WriteError: the disk is full or cannot be written; the old file is kept.
    """
    with whole_file(path, previous) as temporary, open(temporary, "wb") as file:
        if Path(path).suffix == ".safetensors":
            # safetensors refuses tensors that share memory
            state = {name: tensor.clone().contiguous() for name, tensor in state.items()}
            file.write(safetensors.torch.save(state, {"format": "pt"} | (metadata or {})))
        else:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # of its zip writer, on top of what the disk said
                raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def read_checkpoint(path: str | Path) -> dict:
    """Load a file of torch.save or safetensors onto the CPU, without executing anything from it.

    Besides tensors, plain containers and numbers it may contain argparse's Namespace, dates, NumPy arrays and scalars,
    paths (returned as strings) and objects of any other class (returned as pickled_classes.StandIn).

    Raises:
        CheckpointError: the file is missing, empty, truncated, a FIFO or a device, not a checkpoint, larger than
            memory, names functions that could run code, or does not match its checksums.
    """
    is_safetensors = _is_safetensors(path)
    try:
        if is_safetensors:
            return safetensors.torch.load_file(path)
        check_sums(path)
        content = _unpickle(path)
    except MemoryError:
        raise CheckpointError(f"{path} needs more memory than there is") from None
    except Exception as error:  # corrupt bytes can raise almost anything in the unpickler
        raise _explain(path, error) from None
    if isinstance(content, StandIn):
        raise CheckpointError(f"{path} contains a whole {content.origin}, not a dictionary of tensors: ask its author "
                              "for the state_dict alone")
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} contains a {type(content).__name__}, not a dictionary of tensors")
    return content


def _unpickle(path: str | Path) -> object:
    """torch.load with allowed_classes() alone; StandIns replace all other classes that the file names."""
    def load(classes: list) -> object:
        with torch.serialization.safe_globals(classes), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # errors are reported in one line
            return torch.load(path, map_location="cpu", weights_only=True)

    classes = allowed_classes()
    try:
        return load(classes)
    except pickle.UnpicklingError as error:
        if "GLOBAL" not in str(error):
            raise
    known = set(map(name_of, classes + torch.serialization.get_safe_globals()))
    return load(classes + stand_ins(path, known))


def read_metadata(path: str | Path) -> dict[str, str]:
    """Read the header texts of a .safetensors file; empty for other files."""
    if not _is_safetensors(path):
        return {}
    with safetensors.safe_open(path, "pt") as file:
        return file.metadata() or {}


def check_sums(path: str | Path) -> None:
    """Compare the records of a torch.save file with their CRC-32, which torch.load ignores.

    Files without checksums pass: those of other formats, and those written under set_crc32_options(False).

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


CUT_SHORT = re.compile(r"EOF|ran out of input|central directory|CRC-32|incomplete|InvalidHeader|HeaderTooLarge|"
                       r"header too|header length|pop from empty|unexpected pos|file read|unpack requires|"
                       r"index out of range|wrong byte size|is corrupted", re.IGNORECASE)


def _explain(path: str | Path, error: Exception) -> CheckpointError:
    """Turn an error of torch's or safetensors' reader into one line."""
    text = str(error)
    match = re.search(r"GLOBAL (\S+)", text)
    if match and "." in match[1] and not is_refused(match[1]):  # cut file: others have stand-ins
        return CheckpointError(f"{path} is truncated or damaged (at {match[1]}): download or copy it again")
    if match:
        return CheckpointError(f"{path} is refused: loading it would import {match[1]}, which could run code and which "
                               "no weights need; ask its author for the state_dict alone")
    match = re.search(r"WeightsUnpickler error:\s*(.+)", text)  # torch adds unsafe advice before and after this
    reason = match[1] if match else re.split(r"\. |\n", text)[0] or type(error).__name__
    if isinstance(error, EOFError | zipfile.BadZipFile) or CUT_SHORT.search(text):
        return CheckpointError(f"{path} is truncated or damaged ({reason}): download or copy it again")
    if match and not reason.startswith("Unsupported operand"):
        return CheckpointError(f"{path} is refused: torch's safe reader reports {reason!r}; ask its author for the "
                               "state_dict alone")
    return CheckpointError(f"{path} is corrupt, truncated or not a checkpoint ({reason})")


def _is_safetensors(path: str | Path) -> bool:
    """Tell safetensors' format from torch's by the first 512 bytes.

    Raises:
        CheckpointError: they belong to neither format, or there is no file to read.
    """
    try:
        mode = os.stat(path).st_mode  # before it is opened: opening a FIFO waits for a writer
        for matches, what in FILE_TYPES:
            if matches(mode):
                raise CheckpointError(f"{path} is {what}, not a file: give the path of a checkpoint")
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if not start:
        raise CheckpointError(f"{path} is empty (0 bytes): download or copy it again")
    if start[4:9] == b"\0\0\0\0{":  # header length in 8 bytes (little-endian), then the JSON header
        return True
    if what := what_instead(path, start):
        raise CheckpointError(f"{path} {what}")
    if start.startswith(b"\x80") and LEGACY_TORCH_MAGIC not in start[:64]:
        raise CheckpointError(f"{path} is a plain pickle, not written by torch.save: loading it could execute code")
    if all(byte >= 32 or byte in b"\t\r\n" for byte in start[:64]):
        text = start[:64].removeprefix(b"\xef\xbb\xbf").lstrip()
        line = (text.decode(errors="replace").splitlines() or [""])[0]
        raise CheckpointError(f"{path} is a text file that starts with {line!r}, not a checkpoint")
    return False
