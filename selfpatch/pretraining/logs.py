"""What a run prints and writes while it trains: smoothed values, the step rate, and log.txt."""
import json
import os
import time
import zlib
from collections import deque
from pathlib import Path

import torch
import torch.distributed as dist

from selfpatch.distributed.processes import is_distributed
from selfpatch.errors import PASSING_ERRORS, ConfigError, TrainingError, describe
from selfpatch.whole_files import WriteError, whole_file


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

    def state_dict(self) -> dict[str, list[float]]:
        """Sum and number of each series, of this rank."""
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


def check_log(output: Path) -> None:
    """Find out whether a run can append to the logs in the folder.

    Raises:
        ConfigError: log.txt is not a text file, or steps.jsonl not a file.
    """
    for path in (output / "log.txt", output / "steps.jsonl"):
        if os.path.lexists(path) and not path.is_file():
            raise ConfigError(f"{path} is {describe(path)}, not the log of a run: remove it, or choose another "
                              "--output_dir")
    if (output / "log.txt").is_file():
        read_log(output / "log.txt")


def read_log(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ConfigError(f"{path} is not the log of a run ({reason}): move it away, or choose another "
                          "--output_dir") from None


def parse_row(line: str) -> dict | None:
    """A line of log.txt as a row; None for any other text."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("epoch"), int) else None


def reconcile(text: str, rows: list[dict]) -> str:
    """log.txt as it should be: the rows of the checkpoint, each once, and lines that are no rows where they were.

    A process that is killed between checkpoint and log leaves a row missing, half written, or of an epoch that will be
    done again.
    """
    lines, seen = [], set()
    expected = {row["epoch"]: row for row in rows}
    for line in text.splitlines(keepends=True):
        row = parse_row(line)
        if row is None and line.endswith("\n"):
            lines.append(line)
        elif row and row["epoch"] in expected and row["epoch"] not in seen:
            seen.add(row["epoch"])
            lines.append(json.dumps(expected[row["epoch"]]) + "\n")
    return "".join(lines + [json.dumps(row) + "\n" for epoch, row in expected.items() if epoch not in seen])


def make_row(stats: dict[str, float], epoch: int) -> dict[str, float]:
    """An epoch's line in log.txt, with DINO's names."""
    return {f"train_{name}": value for name, value in stats.items()} | {"epoch": epoch}


def checksum(text: str) -> int:
    return zlib.crc32(text.encode())


class RunLog:
    """log.txt, one JSON object per line and epoch.

    Args:
        output: the run's folder.
        resumed: whether the run continues; one that begins where an older log lies adds to it.
        start_epoch: epochs that are done.
        rows: theirs, from the checkpoint; None: those in log.txt.
        older: length and CRC-32 of what a continued run's log.txt began with, from the checkpoint.

    Attributes:
        rows: one for each epoch; write brings log.txt up to them.
        older: what log.txt held before the run began.

    Raises:
        ConfigError: they cannot be written.
    """

    def __init__(self, output: Path, resumed: bool = False, start_epoch: int = 0, rows: list[dict] | None = None,
                 older: tuple[int, int] = (0, 0)):
        check_log(output)
        self.path = output / "log.txt"
        text = read_log(self.path) if self.path.is_file() else ""
        if rows is None:
            found = {row["epoch"]: row for row in map(parse_row, text.splitlines()) if row}
            rows = [found[epoch] for epoch in sorted(found) if epoch < start_epoch]
        self.rows = rows
        if resumed:
            self.older = text[:older[0]] if checksum(text[:older[0]]) == older[1] else ""  # unless it was edited
        else:
            self.older = text + "\n" * bool(text and not text.endswith("\n"))
        self.rewrite(text)

    def state_dict(self) -> dict:
        """What a checkpoint keeps of the log."""
        return {"log": self.rows} | ({"older_log": [len(self.older), checksum(self.older)]} if self.older else {})

    def rewrite(self, text: str) -> None:
        """Make text, what log.txt holds, what it should hold."""
        wanted = self.older + reconcile(text[len(self.older):], self.rows)
        if wanted != text or not self.path.is_file():
            with whole_file(self.path) as temporary:
                temporary.write_text(wanted, encoding="utf-8")

    def write(self) -> None:
        """Bring log.txt up to rows.

        Raises:
            TrainingError: the folder has become unwritable. A full disk is a warning.
        """
        try:
            self.rewrite(self.path.read_text(encoding="utf-8") if self.path.is_file() else "")
        except (OSError, WriteError, UnicodeDecodeError) as error:
            reason = error.strerror if hasattr(error, "errno") else "it is not text any more"
            message = f"cannot write to {self.path} ({reason})"
            if getattr(error, "errno", None) not in (None, *PASSING_ERRORS):
                raise TrainingError(f"{message}: the same command continues from the last checkpoint") from None
            print(f"warning: {message}; training goes on, and the next epoch will try again", flush=True)
