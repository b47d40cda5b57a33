"""What a run prints and writes while it trains: smoothed values, the step rate, log.txt and TensorBoard curves."""
import importlib.util
import json
import os
import time
from collections import deque
from pathlib import Path

import torch
import torch.distributed as dist

from distributed import is_distributed
from errors import ConfigError, TrainingError, describe


class SmoothedValue:
    """A series of numbers: the mean over a window and over all. Tensors stay on the device until read."""

    def __init__(self, window: int):
        self.recent, self.total, self.count, self.pending = deque(maxlen=window), 0.0, 0, []

    def update(self, value: float | torch.Tensor) -> None:
        self.pending.append(value)

    def read(self) -> None:
        """Fetch the values since the last call, which waits for the device."""
        if self.pending and isinstance(self.pending[0], torch.Tensor):
            self.pending = torch.stack(self.pending).tolist()
        for value in self.pending:
            self.recent.append(value)
            self.total += value
            self.count += 1
        self.pending = []

    @property
    def avg(self) -> float:
        return sum(self.recent) / max(len(self.recent), 1)

    @property
    def global_avg(self) -> float:
        return self.total / max(self.count, 1)


class MetricLogger:
    """SmoothedValues by name, and the rate of the loop that updates them."""

    def __init__(self, window: int = 20):
        self.meters: dict[str, SmoothedValue] = {}
        self.window, self.steps, self.last_read, self.seconds_per_step = window, 0, time.time(), 0.0

    def update(self, **values: float | torch.Tensor) -> None:
        for name, value in values.items():
            self.meters.setdefault(name, SmoothedValue(self.window)).update(value)
        self.steps += 1

    def read(self) -> None:
        """Fetch all values and measure the rate since the last call (which also waited for the device)."""
        for meter in self.meters.values():
            meter.read()
        if self.steps:
            self.seconds_per_step = (time.time() - self.last_read) / self.steps
        self.steps, self.last_read = 0, time.time()

    def __getitem__(self, name: str) -> SmoothedValue:
        return self.meters[name]

    def synchronize_between_processes(self, device: torch.device) -> None:
        """Make every global_avg the mean over all ranks."""
        self.read()
        if is_distributed():
            sums = torch.tensor([[m.total, m.count] for m in self.meters.values()], dtype=torch.float32, device=device)
            dist.all_reduce(sums)
            for meter, (total, count) in zip(self.meters.values(), sums.tolist(), strict=True):
                meter.total, meter.count = total, count


def check_log(output: Path, tensorboard: bool) -> None:
    """Find out whether RunLog can append to what is in the folder.

    Raises:
        ConfigError: log.txt is not a text file, or there is no place or no package for TensorBoard's curves.
    """
    path, curves = output / "log.txt", output / "tensorboard"
    if os.path.lexists(path):
        if not path.is_file():
            raise ConfigError(f"{path} is {describe(path)}, not the log of a run: remove it, or choose another "
                              "--output_dir")
        read_log(path)
    if tensorboard and os.path.lexists(curves) and not curves.is_dir():
        raise ConfigError(f"{curves} is not a folder, so --tensorboard cannot use it: remove it, or choose another "
                          "--output_dir")
    if tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("--tensorboard needs the package of that name: pip install tensorboard")


def read_log(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ConfigError(f"{path} is not the log of a run ({reason}): move it away, or choose another "
                          "--output_dir") from None


class RunLog:
    """log.txt, one JSON object per line and epoch, and TensorBoard curves if asked for.

    Raises:
        ConfigError: they cannot be written.
    """

    def __init__(self, output: Path, start_epoch: int, tensorboard: bool):
        check_log(output, tensorboard)
        self.path, self.board = output / "log.txt", None
        text = read_log(self.path) if self.path.is_file() else ""
        half_line = text and not text.endswith("\n")  # of a run that was killed
        try:
            with open(self.path, "a") as file:
                file.write("\n" if half_line else "")
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(output / "tensorboard", purge_step=start_epoch)
        except OSError as error:
            raise ConfigError(f"cannot write to {error.filename or output} ({error.strerror})") from None

    def write(self, stats: dict[str, float], epoch: int) -> None:
        """Append an epoch.

        Raises:
            TrainingError: the disk is full, or the folder has become unwritable.
        """
        row = {f"train_{name}": value for name, value in stats.items()} | {"epoch": epoch}
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
            if self.board:
                for name, value in stats.items():
                    self.board.add_scalar(f"train/{name}", value, epoch)
                self.board.flush()
        except OSError as error:
            raise TrainingError(f"cannot write to {error.filename or self.path} ({error.strerror}): make room and run "
                                "the same command again: it continues from the last checkpoint") from None
