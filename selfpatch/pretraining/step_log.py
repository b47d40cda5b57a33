"""steps.jsonl, a line of JSON for every line of progress: what a run is steered by between the ends of epochs."""
import datetime
import json
import math
import os
from pathlib import Path

from selfpatch.data.loader import CropLoader
from selfpatch.distributed.processes import peak_memory_gb
from selfpatch.errors import PASSING_ERRORS, ConfigError, TrainingError
from selfpatch.method.training_run import TrainingRun
from selfpatch.pretraining.engine import prototypes
from selfpatch.pretraining.meters import MetricLogger
from selfpatch.pretraining.trackers import Trackers

FIRST_STEPS = 3  # of a process: compilation, caches and workers that start make them slow


def parse_step(line: bytes) -> dict | None:
    """A line of steps.jsonl as a row; None for any other bytes."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    known = isinstance(row, dict) and all(type(row.get(name)) in (int, float) for name in ("step", "epoch"))
    return row if known else None


def rows_until(data: bytes, epoch: float) -> list[bytes]:
    """The whole lines of steps.jsonl up to an epoch (a fraction), each once.

    By epoch and not by step, whose number is another one after a change of the batch.
    """
    lines, last = [], -math.inf
    for line in data.splitlines(keepends=True):
        row = parse_step(line) if line.endswith(b"\n") else None
        if row and last < row["epoch"] <= epoch:
            last = row["epoch"]
            lines.append(line)
    return lines


def set_aside(path: Path, earlier: Path) -> None:
    """Move a file to another name; where that is taken, add the lines to what is there."""
    if not earlier.exists():
        os.replace(path, earlier)
        return
    with open(earlier, "ab") as file:
        file.write(path.read_bytes())
    path.unlink()


def step_row(run: TrainingRun, logger: MetricLogger, images_per_second: float) -> dict[str, float | None]:
    """Means as in the line of progress, and this step's rates.

    gradient_norm is the largest of all tensors and steps, before clipping; None if one was infinite.
    """
    norm, step = max(logger["gradient_norm"].recent, default=math.nan), run.step - 1
    row = {"step": run.step, "epoch": run.step / run.steps_per_epoch, "loss": logger["total"].avg}
    for name, K in prototypes(run.dino_loss).items():
        row |= {f"{name}_loss": logger[name].avg, f"{name}_entropy": logger[f"{name}_entropy"].avg,
                f"{name}_ln_k": math.log(K)}
    return row | {"lr": run.schedules.lr(step), "weight_decay": run.schedules.weight_decay(step),
                  "teacher_momentum": run.schedules.momentum(step),
                  "gradient_norm": norm if math.isfinite(norm) else None, "clipped_share": logger["clipped"].avg,
                  "images_per_second": images_per_second, "memory_gib": peak_memory_gb(run.device)}


class StepLog:
    """Writes a row to steps.jsonl whenever it is called. For rank 0.

    Args:
        output: the run's folder.
        run: at the step where training begins or continues; rows of later steps are dropped.
        loader: how long training waited for it is in each row.
        images_per_step: over all ranks.
        trackers: get the same rows.
        mfu_per_rate: model-FLOPs utilisation at one image per second; None where the device's peak is not known.
        keep_older: set aside, in earlier_steps.jsonl, what a run that is over has left in the folder.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(self, output: Path, run: TrainingRun, loader: CropLoader, images_per_step: int,
                 trackers: Trackers | None = None, mfu_per_rate: float | None = None, keep_older: bool = False):
        self.path, self.run, self.loader = output / "steps.jsonl", run, loader
        self.images_per_step, self.trackers, self.mfu_per_rate = images_per_step, trackers or Trackers(), mfu_per_rate
        self.first_step, self.announced, self.unwritten = run.step, False, []
        try:
            if keep_older and run.step == 0 and self.path.is_file():
                set_aside(self.path, output / "earlier_steps.jsonl")
            self.size = self.tidy()
        except OSError as error:
            raise ConfigError(f"cannot write to {error.filename or output} ({error.strerror})") from None
        loader.wait.begin()

    def tidy(self) -> int:
        """Drop half lines and rows that will be written again; the file's size."""
        data = self.path.read_bytes() if self.path.is_file() else b""
        wanted = b"".join(rows_until(data, (self.run.step + 0.5) / self.run.steps_per_epoch if self.run.step else 0))
        if wanted != data:
            temporary = self.path.with_name(f".steps.jsonl.{os.getpid()}.tmp")
            temporary.write_bytes(wanted)
            os.replace(temporary, self.path)
        return len(wanted)

    def __call__(self, logger: MetricLogger) -> None:
        """Write the row of what logger has just read.

        Raises:
            TrainingError: the folder has become unwritable. A full disk is a warning.
        """
        rate = self.images_per_step / logger.seconds_per_step
        row = step_row(self.run, logger, rate) | {"data_wait": self.loader.wait.share()}
        if self.mfu_per_rate:
            row["mfu"] = self.mfu_per_rate * rate
        self.append(row)
        self.trackers.log_step(row)
        self.announce(logger.seconds_per_step)

    def append(self, row: dict) -> None:
        self.unwritten.append(json.dumps(row).encode() + b"\n")
        try:
            with open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
                # a row that found no room may have left a part of it
                self.size = min(self.size, os.fstat(file.fileno()).st_size)
                file.truncate(self.size)
                file.seek(self.size)
                file.write(b"".join(self.unwritten))
                file.flush()
            self.size += sum(map(len, self.unwritten))
            self.unwritten = []
        except OSError as error:
            message = f"cannot write to {self.path} ({error.strerror})"
            if error.errno not in PASSING_ERRORS:
                raise TrainingError(f"{message}: the same command continues from the last checkpoint") from None
            print(f"warning: {message}; training goes on, and the next line of progress will try again", flush=True)

    def announce(self, seconds_per_step: float) -> None:
        """Say once how long the whole run takes, by the first rate that has none of the first steps in it."""
        if self.announced:
            return
        if self.first_step is not None:
            # this rate may have them in it, the next one has not
            self.first_step = None if self.run.step - self.first_step >= FIRST_STEPS else self.first_step
            return
        self.announced, epochs = True, self.run.schedules.epochs
        steps = epochs * self.run.steps_per_epoch
        if self.run.step == steps:
            return
        whole, left = (datetime.timedelta(seconds=round(count * seconds_per_step))
                       for count in (steps, steps - self.run.step))
        print(f"expected time: {whole} for the whole run of {epochs} epochs, of which {left} remain (without "
              "evaluations and saving)", flush=True)
