"""Checkpoints: written whole or not at all, read without running anything they carry."""
import argparse
import os
from pathlib import Path

import torch


def read_checkpoint(path: str | Path) -> dict:
    """What torch.save wrote at path, on the CPU; of pickled classes only argparse.Namespace is let in."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def write_checkpoint(state: dict, path: str | Path) -> None:
    """Save state at path so that a crash at any moment leaves the old file or the new one, never half of one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
