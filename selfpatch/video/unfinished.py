"""Continuing an evaluation that was killed: keep the videos it finished, remove the temporary folders it left."""
import contextlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np

from selfpatch.errors import ConfigError
from selfpatch.video.davis import Sequence, read_mask

LEFTOVER = re.compile(r"\.(.+)\.(\d+)\.(tmp|old)")  # of whole_files.py


class Unfinished:
    """Marks a run in progress, by .unfinished.json in its output folder.

    A later run with the same settings keeps the videos that were finished. A run that ends removes the marker, so that
    the next one computes everything again.

    Args:
        settings: everything that determines the masks; JSON, or converted with str.
    """

    def __init__(self, output_dir: str | Path, settings: dict):
        self.folder, self.settings = Path(output_dir), json.loads(json.dumps(settings, default=str))
        self.path = self.folder / ".unfinished.json"

    def begin(self) -> None:
        """Remove what killed processes left, and write the marker unless one with these settings exists.

        Raises:
            ConfigError: the folder cannot be written to.
        """
        try:
            remove_leftovers(self.folder)
            if not self.continues():
                self.path.write_text(json.dumps(self.settings))
        except OSError as error:
            raise ConfigError(f"--output_dir {self.folder}: {error.strerror}") from None

    def continues(self) -> bool:
        """Whether a run with these settings was interrupted."""
        try:
            return json.loads(self.path.read_text()) == self.settings
        except (OSError, ValueError, RecursionError):
            return False

    def masks(self, sequence: Sequence) -> np.ndarray | None:
        """Masks of a video that the interrupted run finished, uint8 [T, H, W]; None if it did not."""
        folder = self.folder / sequence.name
        with contextlib.suppress(OSError, ConfigError):
            if self.continues() and folder.stat().st_mtime_ns >= self.path.stat().st_mtime_ns:
                return np.stack([read_mask(folder / f"{path.stem}.png", binary=False).ids for path in sequence.frames])
        return None

    def end(self) -> None:
        self.path.unlink(missing_ok=True)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary folders of dead processes, and restore results that one of them was replacing."""
    for path in folder.glob(".*.*.*"):
        match = LEFTOVER.fullmatch(path.name)
        if match and path.is_dir() and not is_running(int(match[2])):
            if match[3] == "old" and not (folder / match[1]).exists():
                path.rename(folder / match[1])
            else:
                shutil.rmtree(path, ignore_errors=True)
