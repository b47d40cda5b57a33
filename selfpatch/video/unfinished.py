"""An evaluation of videos that was killed: which ones it had finished, and what it left behind."""
import contextlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np

from selfpatch.errors import ConfigError
from selfpatch.video.davis import DataError, Sequence, read_mask

LEFTOVER = re.compile(r"\.(.+)\.(\d+)\.(tmp|old)")  # of whole_files.py


class Unfinished:
    """The marker of a call that is under way, .unfinished.json in the folder of its results.

    A call with the same settings that finds it takes over the videos that the earlier one has finished. It is removed
    at the end, so that a call after a whole one computes everything anew.

    Args:
        settings: everything that decides what the masks are, as JSON has it.
    """

    def __init__(self, output_dir: str | Path, settings: dict):
        self.folder, self.settings = Path(output_dir), json.loads(json.dumps(settings, default=str))
        self.path = self.folder / ".unfinished.json"

    def begin(self) -> None:
        """Clear up after processes that were killed, and write the marker unless one with these settings is there.

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
        try:
            return json.loads(self.path.read_text()) == self.settings
        except (OSError, ValueError):
            return False

    def masks(self, sequence: Sequence) -> np.ndarray | None:
        """The masks [T, H, W] of a video that the earlier call finished, None if it did not."""
        folder = self.folder / sequence.name
        with contextlib.suppress(OSError, DataError, ConfigError):
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
    except PermissionError:  # somebody else's
        pass
    return True


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary folders of processes that no longer run; results that were being replaced are put back."""
    for path in folder.glob(".*.*.*"):
        match = LEFTOVER.fullmatch(path.name)
        if match and path.is_dir() and not is_running(int(match[2])):
            if match[3] == "old" and not (folder / match[1]).exists():
                path.rename(folder / match[1])
            else:
                shutil.rmtree(path, ignore_errors=True)
