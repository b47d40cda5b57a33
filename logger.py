"""What a run prints and writes while it trains: smoothed values, the step rate, log.txt and TensorBoard curves."""
import json
import time
from collections import deque
from pathlib import Path

import torch
import torch.distributed as dist

from distributed import is_distributed


class SmoothedValue:
    """A series of numbers: the mean over a window and over all. Tensors stay on the device until read."""

    def __init__(self, window: int):
        self.recent, self.total, self.count, self.pending = deque(maxlen=window), 0.0, 0, []

    def update(self, value: float | torch.Tensor) -> None:
        self.pending.append(value)

    def read(self) -> None:
        """Fetch the values since the last call; the only moment that waits for the device."""
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
        """Fetch all values and measure the rate since the last call, which has waited for the device as well."""
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


class RunLog:
    """log.txt, one JSON object per line and epoch, and TensorBoard curves if asked for."""

    def __init__(self, output: Path, start_epoch: int, tensorboard: bool):
        self.path, self.board = output / "log.txt", None
        if self.path.is_file() and not self.path.read_text().endswith("\n"):
            with open(self.path, "a") as file:  # end the half line that a killed run has left
                file.write("\n")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(output / "tensorboard", purge_step=start_epoch)

    def write(self, stats: dict[str, float], epoch: int) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps({f"train_{name}": value for name, value in stats.items()} | {"epoch": epoch}) + "\n")
        if self.board:
            for name, value in stats.items():
                self.board.add_scalar(f"train/{name}", value, epoch)
            self.board.flush()
