"""log.txt."""
import json
import os
import zlib
from pathlib import Path

from selfpatch.errors import PASSING_ERRORS, ConfigError, TrainingError, describe


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
        try:
            self.rewrite(text)
        except OSError as error:
            raise ConfigError(f"cannot write to {error.filename or output} ({error.strerror})") from None

    def state_dict(self) -> dict:
        """What a checkpoint keeps of the log."""
        return {"log": self.rows} | ({"older_log": [len(self.older), checksum(self.older)]} if self.older else {})

    def rewrite(self, text: str) -> None:
        """Make text, what log.txt holds, what it should hold."""
        wanted = self.older + reconcile(text[len(self.older):], self.rows)
        if wanted != text or not self.path.is_file():
            temporary = self.path.with_name(f".log.txt.{os.getpid()}.tmp")
            temporary.write_text(wanted, encoding="utf-8")
            os.replace(temporary, self.path)

    def write(self) -> None:
        """Bring log.txt up to rows.

        Raises:
            TrainingError: the folder has become unwritable. A full disk is a warning.
        """
        try:
            self.rewrite(self.path.read_text(encoding="utf-8") if self.path.is_file() else "")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text any more"
            message = f"cannot write to {self.path} ({reason})"
            if isinstance(error, OSError) and error.errno not in PASSING_ERRORS:
                raise TrainingError(f"{message}: the same command continues from the last checkpoint") from None
            print(f"warning: {message}; training goes on, and the next epoch will try again", flush=True)
