"""Running means of a training loop's values, and the loop's speed."""
import time
from collections import deque

import torch
import torch.distributed as dist

from selfpatch.distributed.processes import is_distributed


class SmoothedValue:
    """A series of numbers, with its mean over a window and over all. Tensors stay on the device until read."""

    def __init__(self, window: int):
        self.recent, self.total, self.count, self.pending = deque(maxlen=window), 0.0, 0, []

    def update(self, value: float | torch.Tensor) -> None:
        self.pending.append(value)

    def read(self) -> None:
        """Fetch the values since the last call; waits for the device."""
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
    """SmoothedValues by name, and the speed of the loop that updates them."""

    def __init__(self, window: int = 20):
        self.meters: dict[str, SmoothedValue] = {}
        self.window, self.steps, self.last_read, self.seconds_per_step = window, 0, time.time(), 0.0

    def update(self, **values: float | torch.Tensor) -> None:
        for name, value in values.items():
            self.meters.setdefault(name, SmoothedValue(self.window)).update(value)
        self.steps += 1

    def read(self) -> None:
        """Fetch all values, and measure the speed since the last call (which waited for the device, too)."""
        for meter in self.meters.values():
            meter.read()
        if self.steps:
            self.seconds_per_step = (time.time() - self.last_read) / self.steps
        self.steps, self.last_read = 0, time.time()

    def state_dict(self) -> dict[str, list[float]]:
        """Sum and length of each series, on this rank."""
        self.read()
        return {name: [meter.total, meter.count] for name, meter in self.meters.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        for name, (total, count) in state.items():
            meter = self.meters.setdefault(name, SmoothedValue(self.window))
            meter.total, meter.count = total, count

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
