"""A run's logs: log.txt has a row of JSON for each epoch, steps.jsonl one for each line of progress.

Rows are written before the checkpoint of their step, and a resumed run drops those after its checkpoint. So no row is
missing or doubled, whenever the run was killed.
"""
import contextlib
import datetime
import json
import math
import os
import zlib
from collections.abc import Callable
from pathlib import Path

from selfpatch.data.loader import CropLoader
from selfpatch.distributed.processes import peak_memory_gb
from selfpatch.errors import PASSING_ERRORS, ConfigError, TrainingError, try_print
from selfpatch.method.training_run import TrainingRun
from selfpatch.pretraining.engine import prototypes
from selfpatch.pretraining.meters import MetricLogger
from selfpatch.pretraining.trackers import Trackers
from selfpatch.whole_files import WriteError, whole_file

FIRST_STEPS = 3  # of a process: slow because of compilation, caches and starting workers


def check_log(output: Path) -> None:
    """Raise ConfigError if the folder's log.txt is a file that is not text, or cannot be read."""
    path = output / "log.txt"
    try:
        read(path).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ConfigError(f"{path} is not the log of a run ({reason}): move it away, or choose another "
                          "--output_dir") from None


# ----------------------------------------------------------------------------------------------------------------------
# Files of rows


def read(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def parse_row(line: str | bytes) -> dict | None:
    """A line as a row, which has an epoch; None for any other text."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # the second: of brackets in brackets
        return None
    return row if isinstance(row, dict) and type(row.get("epoch")) in (int, float) else None


def rows_until(data: bytes, epoch: float, keep_notes: bool = False) -> list[bytes]:
    """The rows up to an epoch (a fraction, for steps) as lines, each once.

    By epoch, since the number of a step changes with the batch size.

    Args:
        keep_notes: also keep whole lines that are no rows.
    """
    kept, last = [], -math.inf
    for line in data.splitlines(keepends=True):
        row = parse_row(line)
        if row and last < row["epoch"] <= epoch:
            last = row["epoch"]
            kept.append(line if line.endswith(b"\n") else line + b"\n")
        elif row is None and keep_notes and line.endswith(b"\n"):
            kept.append(line)
    return kept


def encode(row: dict) -> bytes:
    return json.dumps(row).encode() + b"\n"


class JsonLines:
    """A file with a JSON object on each line, which grows by whole lines.

    On a full disk, writing is a warning; the rows are written with the next one.
    """

    def __init__(self, path: Path):
        self.path, self.unwritten, self.amended = path, [], None
        self.torn: int | None = None  # size before a write that may have left half a line

    def replace(self, data: bytes) -> None:
        """Make data the content of the file, whole or not at all."""
        with whole_file(self.path) as temporary:
            temporary.write_bytes(data)

    def append(self, row: dict) -> None:
        """Write a row.

        Raises:
            TrainingError: the folder has become unwritable.
        """
        self.unwritten.append(row)
        self.attempt(self.write)

    def amend(self, row: dict) -> None:
        """Write a row in the place of the last one; raises as append does."""
        if self.unwritten:
            self.unwritten[-1] = row
        else:
            self.amended = row
        self.attempt(self.write)

    def flush(self) -> None:
        """Bring all rows to the disk, as far as it has room."""
        if self.unwritten or self.path.is_file():
            self.attempt(lambda: self.write(sync=True))

    def write(self, sync: bool = False) -> None:
        if self.amended:
            lines = read(self.path).splitlines(keepends=True)
            last = max((i for i, line in enumerate(lines) if parse_row(line)), default=len(lines))
            self.replace(b"".join([*lines[:last], encode(self.amended), *lines[last + 1:]]))
            self.amended = self.torn = None  # the file is new
        with open(self.path, "ab") as file:
            if self.torn is not None:
                file.truncate(self.torn)
            self.torn = file.seek(0, os.SEEK_END)
            file.write(b"".join(map(encode, self.unwritten)))
            file.flush()
            if sync:
                os.fsync(file.fileno())
        self.unwritten, self.torn = [], None

    def attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except (OSError, WriteError) as error:
            message = f"cannot write to {self.path} ({error.strerror})"
            if error.errno not in PASSING_ERRORS:
                raise TrainingError(f"{message}: the same command continues from the last checkpoint") from None
            try_print(f"warning: {message}; training goes on, and the next row will try again")


# ----------------------------------------------------------------------------------------------------------------------
# The rows of a run


def epoch_row(stats: dict[str, float], epoch: int) -> dict[str, float]:
    """An epoch's line in log.txt, with DINO's names."""
    return {f"train_{name}": value for name, value in stats.items()} | {"epoch": epoch}


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


def older_part(text: str, mark: tuple[int, int] | None, begins: bool) -> str:
    """What log.txt held before the run began.

    Args:
        text: what it holds now.
        mark: length and CRC-32 of the older part when the run began; None if unknown.
        begins: the run has done no step.
    """
    if mark and zlib.crc32(text[:mark[0]].encode()) == mark[1]:
        return text[:mark[0]]
    if begins:
        return text + "\n" * bool(text and not text.endswith("\n"))
    start = position = 0  # someone has edited it: the run's first row is the last one of an epoch 0
    for line in text.splitlines(keepends=True):
        if (row := parse_row(line)) and row["epoch"] == 0:
            start = position
        position += len(line)
    return text[:start]


class RunLog:
    """log.txt, steps.jsonl and the trackers of a run. For rank 0.

    A run that begins where an older log.txt lies adds to it, and sets an older steps.jsonl aside. unsaved.txt marks the
    end of the older part until the first checkpoint does.

    Args:
        output: the run's folder.
        run: at the step where training begins or continues; rows of later steps are dropped.
        loader: every step's row says how long training waited for it.
        images_per_step: over all ranks.
        older: the mark of older_part in the run's checkpoint.
        mfu_per_rate: model-FLOPs utilisation at one image per second; None if the device's peak is unknown.

    Attributes:
        trackers: get the same rows; none at first.
        last_row: of log.txt; None before the end of the run's first epoch.

    Raises:
        ConfigError: the files cannot be read or written.
    """

    def __init__(self, output: Path, run: TrainingRun, loader: CropLoader, images_per_step: int,
                 older: tuple[int, int] | None = None, mfu_per_rate: float | None = None):
        check_log(output)
        self.run, self.loader, self.images_per_step = run, loader, images_per_step
        self.trackers, self.mfu_per_rate = Trackers(), mfu_per_rate
        self.epochs, self.steps = JsonLines(output / "log.txt"), JsonLines(output / "steps.jsonl")
        self.unsaved = output / "unsaved.txt"
        self.first_step = self.measured = run.step  # the step until which the speed was measured last
        self.announced = False
        try:
            self.drop_later_rows(older)
        except OSError as error:
            raise ConfigError(f"cannot write to {error.filename or output} ({error.strerror})") from None
        loader.wait.begin()

    def drop_later_rows(self, mark: tuple[int, int] | None) -> None:
        """Leave the rows of the run's steps so far in both files."""
        run, begins = self.run, self.run.step == 0
        if begins:
            numbers = read(self.unsaved).split()
            mark = tuple(map(int, numbers)) if len(numbers) == 2 and all(n.isdigit() for n in numbers) else None
        data = read(self.epochs.path)
        self.older = older_part(data.decode(), mark, begins).encode()
        self.mark = [len(self.older.decode()), zlib.crc32(self.older)]
        rows = rows_until(data[len(self.older):], run.epoch - 1, keep_notes=True)
        self.last_row = next(filter(None, map(parse_row, reversed(rows))), None)
        if (wanted := self.older + b"".join(rows)) != data or not self.epochs.path.is_file():
            self.epochs.replace(wanted)
        if begins:
            if self.older and mark is None:
                self.set_steps_aside()  # first: a run that is killed here begins again without a mark
            self.unsaved.write_text("{} {}\n".format(*self.mark))
        data = read(self.steps.path)
        wanted = b"".join(rows_until(data, (run.step + 0.5) / run.steps_per_epoch if run.step else 0))
        if wanted != data:
            self.steps.replace(wanted)

    def set_steps_aside(self) -> None:
        """Add what steps.jsonl holds to earlier_steps.jsonl, and remove it."""
        earlier = JsonLines(self.steps.path.with_name("earlier_steps.jsonl"))
        if self.steps.path.is_file():
            earlier.replace(read(earlier.path) + read(self.steps.path))
            self.steps.path.unlink()

    def state_dict(self) -> dict[str, list[int]]:
        """What a checkpoint keeps of the log."""
        return {"older_log": self.mark} if self.older else {}

    def flush(self) -> None:
        """Bring the rows to the disk, before a checkpoint of the same step is written."""
        self.epochs.flush()
        self.steps.flush()

    def saved(self) -> None:
        """Say that the run has a checkpoint."""
        with contextlib.suppress(OSError):  # a folder that became read-only
            self.unsaved.unlink(missing_ok=True)

    def log_epoch(self, row: dict) -> None:
        self.last_row = row
        self.epochs.append(row)

    def amend_epoch(self, values: dict[str, float]) -> None:
        """Add values to the last epoch's row."""
        self.last_row |= values
        self.epochs.amend(self.last_row)

    def log_step(self, logger: MetricLogger) -> None:
        """Write the row of what logger has just read."""
        rate = self.images_per_step / logger.seconds_per_step
        row = step_row(self.run, logger, rate) | {"data_wait": self.loader.wait.share()}
        if self.mfu_per_rate:
            row["mfu"] = self.mfu_per_rate * rate
        self.steps.append(row)
        self.trackers.log_step(row)
        self.announce(logger.seconds_per_step)

    def announce(self, seconds_per_step: float) -> None:
        """Print once how long the whole run takes, by the first speed that excludes the process's first steps."""
        since, self.measured = self.measured, self.run.step
        if self.announced or since - self.first_step < FIRST_STEPS:
            return
        self.announced, epochs = True, self.run.schedules.epochs
        steps = epochs * self.run.steps_per_epoch
        if self.run.step == steps:
            return
        whole, left = (datetime.timedelta(seconds=round(count * seconds_per_step))
                       for count in (steps, steps - self.run.step))
        try_print(f"expected time: {whole} for the whole run of {epochs} epochs, of which {left} remain (without "
                  "evaluations and saving)")
