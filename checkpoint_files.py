"""Checkpoint files: written whole, and read without running anything that they carry."""
import argparse
import os
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from errors import ConfigError

# argparse.Namespace for args, and numpy's numbers: the published loop leaves np.float64 rates in the optimizer
NUMPY_SCALAR = np.float64(0).__reduce__()[0]
NUMPY_NUMBERS = (np.bool_, np.uint8, np.int8, np.int16, np.int32, np.int64, np.float16, np.float32, np.float64)
SAFE_CLASSES = [argparse.Namespace, np.dtype, *(type(np.dtype(number)) for number in NUMPY_NUMBERS),
                *((NUMPY_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core"))]
RECONSTRUCT_ARRAY = np.zeros(0).__reduce__()[0]
TORCH_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")  # torch.save's first number before torch 1.6


class CheckpointError(ConfigError):
    """A checkpoint that cannot be used, and why, in one line for the user."""


class LossHistory:
    """Stands for mmengine's HistoryBuffer, which its training checkpoints carry and no job here asks for."""


def loss_history_method(cls: type, name: str) -> str:
    """Stands for getattr in those checkpoints, where it names the methods of a history."""
    if cls is not LossHistory:
        raise CheckpointError(f"it asks for {name} of {getattr(cls, '__name__', cls)}, which no checkpoint needs")
    return name


MMENGINE_CLASSES = [(LossHistory, "mmengine.logging.history_buffer.HistoryBuffer"),
                    (loss_history_method, "builtins.getattr"), (np.ndarray, "numpy.ndarray"),
                    *((RECONSTRUCT_ARRAY, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core"))]


def safe_classes() -> list:
    """What read_checkpoint lets in; what the program has let in itself, such as mmengine's own class, goes before."""
    own = {entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}"
           for entry in torch.serialization.get_safe_globals()}
    return SAFE_CLASSES + [entry for entry in MMENGINE_CLASSES if entry[1] not in own]


def write_checkpoint(state: dict, path: str | Path) -> None:
    """Save state at path so that a crash at any moment leaves the old file or the new one, never half of one.

    A path that ends in .safetensors takes a flat dictionary of tensors.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")  # one name: what a killed process leaves, the next one overwrites
    try:
        with open(temporary, "wb") as file:
            if path.suffix == ".safetensors":
                state = {name: tensor.clone().contiguous() for name, tensor in state.items()}  # it takes none shared
                file.write(safetensors.torch.save(state, {"format": "pt"}))
            else:
                torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path: str | Path) -> dict:
    """What torch.save or safetensors wrote at path, on the CPU; of classes only safe_classes() are let in.

    Raises:
        CheckpointError: no such file, or one that is empty, cut off, no checkpoint at all, or would run code.
    """
    is_safetensors = _is_safetensors(path)
    try:
        if is_safetensors:
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals(safe_classes()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong is said below, in one line
            content = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes raise nearly anything, inside the unpickler and below it
        if needs := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"{path} is refused: to read it would import {needs[1]}, and files may hold only tensors, plain "
                "containers, numbers and argparse.Namespace; have its maker save the state_dict alone") from None
        if needs := re.search(r"WeightsUnpickler error: (.+)", str(error)):
            raise CheckpointError(f"{path} is refused: torch's safe reader says {needs[1]!r}; have its maker save the "
                                  "state_dict alone") from None
        reason = re.split(r"\. |\n", str(error))[0] or type(error).__name__  # torch goes on with unsafe advice
        raise CheckpointError(f"{path} is damaged, cut off or no checkpoint ({reason}): get it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def _is_safetensors(path: str | Path) -> bool:
    """Whether the file is safetensors', not torch's; what its first bytes show to be neither is refused."""
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if not start:
        raise CheckpointError(f"{path} is empty (0 bytes): download or copy it again")
    if start[4:9] == b"\0\0\0\0{":  # the length of the header in 8 bytes, then the header, JSON
        return True
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.lower().startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")):
        raise CheckpointError(f"{path} is an HTML page, what a failed download leaves: download it again")
    if start.startswith(b"PK") and not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} is cut off, its end is missing: download or copy it again")
    if start.startswith(b"\x80") and TORCH_MAGIC not in start:
        raise CheckpointError(f"{path} is a plain pickle, not what torch.save writes: reading it could run code")
    if all(byte >= 32 or byte in b"\t\r\n" for byte in start):
        line = (text.decode(errors="replace").splitlines() or [""])[0]
        raise CheckpointError(f"{path} is a text file that begins {line!r}, not a checkpoint")
    return False
