"""Errors that a user can act on, types of options that raise them, and how a job reports them.

Library code raises; only a job's main ends the process:

    if __name__ == "__main__":
        run_main(main, get_args_parser())
"""
import argparse
import contextlib
import errno
import importlib.util
import io
import math
import multiprocessing
import numbers
import os
import re
import signal
import sys
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TextIO

LONGEST_MESSAGE = 4000  # characters: the names in a message, and their length, may come from an untrusted file
# errors of a disk that may be gone at the next attempt
PASSING_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT}
GRACE_SECONDS = 3.0
CONTINUE_STATUS = 75  # EX_TEMPFAIL of sysexits.h: start the same command again


def printable(text: object) -> str:
    """Return text as one line for a terminal: replace control characters by ? and cut it at 4000 characters."""
    text = str(text)
    line = "".join("?" if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") else char
                   for char in text[:LONGEST_MESSAGE])
    return line if len(text) <= LONGEST_MESSAGE else f"{line}…"


class ConfigError(ValueError):
    """An option, a file or a machine does not fit.

    The message is one line for the user: it names the option or file and says what to do.

    Args:
        message: that line.
        every_rank: print the message from every process at once; set where the first process of each machine cannot
            have met the error.

    Attributes:
        on_all_ranks: every process raises the same error, so only the first one of each machine prints it.
    """

    on_all_ranks = False

    def __init__(self, message: str, every_rank: bool = False):
        if "Traceback (most recent call last)" in message:
            # a DataLoader rebuilds a worker's error from its traceback, whose last line is "module.Class: message"
            message = message.rstrip().splitlines()[-1].split(f"{type(self).__name__}: ", 1)[-1]
        super().__init__(message)
        self.every_rank = every_rank


class TrainingError(RuntimeError):
    """Training cannot continue; the message says why and what to try. Exit status 1."""

    every_rank, on_all_ranks, status = True, False, 1


class RunStopped(TrainingError):
    """A run was asked to stop and has saved; the same command continues it. Exit status 75."""

    every_rank, on_all_ranks, status = False, True, CONTINUE_STATUS

    def __init__(self, message: str, signal_number: int | None = None):
        super().__init__(message)
        self.signal_number = signal_number


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser with errors of one line, without the usage.

    It also rejects numbers beyond 64 bits and text that cannot be a path.

    Args:
        description: a module's docstring, of which --help shows the first paragraph; None under python -OO.
    """

    def __init__(self, *args, description: str | None = None, **kwargs):
        super().__init__(*args, description=description and description.split("\n\n")[0], **kwargs)

    def parse_known_args(self, args=None, namespace=None) -> tuple[argparse.Namespace, list[str]]:
        namespace, rest = super().parse_known_args(args, namespace)
        for action in self._actions:
            values = getattr(namespace, action.dest, None)
            for value in values if isinstance(values, (list, tuple)) else [values]:
                if reason := absurdity(value):
                    self.error(f"argument {'/'.join(action.option_strings) or action.dest}: {reason}")
        return namespace, rest

    def check(self, options: dict) -> None:
        """Raise ConfigError unless there are all options, with values that the command line could have given.

        Args:
            options: of a Namespace, which may have been made by hand.
        """
        for action in self._actions:
            if action.default == argparse.SUPPRESS:  # --help
                continue
            if action.dest not in options:
                raise ConfigError(f"the options lack {action.dest}: take them from get_args_parser().parse_args([…])")
            values = options[action.dest]
            several = isinstance(values, (list, tuple)) and action.nargs and action.nargs != "?"
            if several and not values and action.nargs == "+" and values != action.default:
                raise ConfigError(f"--{action.dest} is empty: give a value")
            if isinstance(action.nargs, int) and action.nargs and not (several and len(values) == action.nargs):
                raise ConfigError(f"--{action.dest} is {values!r}: it must be {action.nargs} values")
            for value in values if several else [values]:
                if value != action.default and (wanted := wanted_instead(action, value)):
                    raise ConfigError(f"--{action.dest} is {value!r}: it must be {wanted}")

    def error(self, message: str) -> NoReturn:
        sys.exit(report(ConfigError(f"{message} (--help lists the options)")))


def wanted_instead(action: argparse.Action, value: object) -> str:
    """Say what an option's value must be; empty if it is that already, or if that cannot be told."""
    if isinstance(value, bool):  # a number of Python's, and once the value of --checkpoint_activations
        return "" if isinstance(action.default, bool) or action.const else "no bool"
    if isinstance(action.default, bool):
        return "True or False"
    if isinstance(action.type, Number):
        kind = "" if action.type.is_kind(value) else f"of type {action.type.kind.__name__}, "
        return "" if value in action.type else f"{kind}{action.type}"
    if action.choices is not None:
        return "" if value in action.choices else f"one of {', '.join(map(str, action.choices))}"
    if action.type in (int, float):
        kind = numbers.Integral if action.type is int else numbers.Real
        return "" if isinstance(value, kind) else "a whole number" if action.type is int else "a number"
    is_text = isinstance(action.default, str) or action.default == []
    return "text" if is_text and not isinstance(value, (str, Path)) else ""


def absurdity(value: object) -> str:
    """Say why no one can mean this value of an option; empty if it is plausible."""
    if isinstance(value, int) and not -2**63 <= value < 2**63:
        return f"{value} is beyond 64 bits"
    if isinstance(value, (str, Path)):
        if "\0" in str(value):
            return f"{str(value)!r} has a NUL in it"
        if str(value).startswith(("https://", "http://")):
            return ""  # no path
        path = re.sub(r"\{[^{}]*\}", "", str(value).partition(".py:")[0])  # x/{a,b}.tar and mine.py:ARGUMENT
        longest = max((os.fsencode(part) for part in path.split("/")), key=len)
        if len(longest) > 255:
            return f"a name of {len(longest)} bytes, of which file systems allow 255"
    return ""


def user_path(text: str) -> Path:
    """Type of a path option: expand ~, also in --option=~/x, where the shell does not."""
    return Path(os.path.expanduser(text))


class Number:
    """Type of an option whose value is a number within bounds.

    Args:
        kind: int or float.
        least, most: bounds that are allowed.
        above, below: bounds that are not; infinity is none.
    """

    def __init__(self, kind: type, least: float = -math.inf, most: float = math.inf, above: float = -math.inf,
                 below: float = math.inf):
        self.kind, self.least, self.most, self.above, self.below = kind, least, most, above, below

    def __call__(self, text: str) -> int | float:
        try:
            value = self.kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"invalid {self.kind.__name__} value: {text!r}") from None
        if value not in self:
            raise argparse.ArgumentTypeError(f"it is {value}, and must be {self}")
        return value

    def __contains__(self, value: float) -> bool:
        return self.is_kind(value) and self.least <= value <= self.most and self.above < value < self.below

    def is_kind(self, value: object) -> bool:
        return isinstance(value, numbers.Integral if self.kind is int else numbers.Real)

    def __str__(self) -> str:
        bounds = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        words = [f"{word} {bound}" for word, bound in bounds.items() if math.isfinite(bound)]
        endless = self.kind is float and min(self.most, self.below) == math.inf
        return " and ".join([*words, "finite"] if endless else words)


class OneOrSeveral(argparse.Action):
    """Of an option with nargs="+": a single value as it is, several as a list."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values if len(values) > 1 else values[0])


POSITIVE_INT, POSITIVE_FLOAT = Number(int, 1), Number(float, above=0)


def is_installed(package: str) -> bool:
    """Whether a package can be imported; it is not imported. A folder without a module does not count."""
    if package in sys.modules:
        return sys.modules[package] is not None
    specification = importlib.util.find_spec(package)
    return specification is not None and specification.origin is not None


def require_packages(user: str, *packages: str) -> None:
    """Raise ConfigError, with the command that installs what is missing, unless all packages are installed."""
    if missing := [package for package in packages if not is_installed(package)]:
        raise ConfigError(f"{user} needs the package{'s' * (len(missing) > 1)} {' and '.join(missing)}: pip install "
                          f"{' '.join(missing)}")


def check_may_start(count: int, option: str = "--num_workers", most: int = 0) -> None:
    """Raise ConfigError if this process is to start more than `most` others and is daemonic, which may start none."""
    if count > most and multiprocessing.current_process().daemon:
        raise ConfigError(f"{option} {count}: this process is daemonic, as those of multiprocessing.Pool are, and may "
                          f"not start others: give {option} {most}")


def describe(path: Path) -> str:
    """Name what is at path instead of a regular file, for a message."""
    if path.is_dir():
        return "a folder"
    return "a broken link" if path.is_symlink() and not path.exists() else "no regular file"


def program_name() -> str:
    return Path(sys.argv[0]).name


def is_first_of_machine() -> bool:
    """Whether this is the first process of its machine, according to the launcher's environment variables."""
    return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"


def try_print(text: str, stream: TextIO | None = None) -> None:
    """Print a line, on stdout by default, in work that goes on where it cannot: on a full disk, in a closed pipe."""
    with contextlib.suppress(OSError):
        print(text, file=stream, flush=True)


def warn(text: str) -> None:
    """Print a warning as one line on stderr, from the first process of each machine."""
    if is_first_of_machine():
        try_print(f"warning: {printable(text)}", sys.stderr)


def report(error: Exception) -> int:
    """Print an error as one line on stderr, and return the exit status.

    Of several processes the first of each machine prints it. The others may have met another error: they first wait a
    little, so that a launcher can end them if the first one has failed too, and then print theirs.
    """
    if not (error.every_rank or is_first_of_machine()):
        time.sleep(0 if error.on_all_ranks else GRACE_SECONDS)
    if error.every_rank or is_first_of_machine() or not error.on_all_ranks:
        kind = "" if isinstance(error, RunStopped) else "error: "
        try_print(f"{program_name()}: {kind}{printable(error)}", sys.stderr)
    return getattr(error, "status", 2)


def replace_unknown_characters() -> None:
    """Let the standard streams print ? for characters that they cannot encode."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def output_error(stream: TextIO, text: str = "") -> OSError | None:
    """Why text, and what a stream still holds, cannot be written; None if it was."""
    try:
        print(text, end="", file=stream, flush=True)
    except OSError as error:
        return error
    return None


def run_main(main: Callable[..., int | None], *args) -> NoReturn:
    """Call main(*args) and end the process with the status it returns.

    A ConfigError becomes one line and status 2, a TrainingError one line and its status, Ctrl-C one line and 130;
    an output that nobody reads any more, as in job.py | head, status 141, and one that is full, one line and 2.
    Characters that the output cannot encode are replaced by ?; a path that the locale cannot encode is one line.

    Args:
        args: main's; in the place of a parser, the options that it reads from the command line.
    """
    replace_unknown_characters()
    status = error = None
    try:
        status = status_of(main, args)
    except OSError as raised:
        if raised.filename is None:
            error = output_error(sys.stdout, "\n")
        if not error or error.errno != raised.errno:  # it was of another file
            raise
    if error := error or output_error(sys.stdout):
        status = status or (128 + signal.SIGPIPE if isinstance(error, BrokenPipeError) else
                            report(ConfigError(f"the output cannot be written ({error.strerror})")))
    for stream in (sys.stdout, sys.stderr):  # an error at the exit of the interpreter would change the status
        if output_error(stream):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(status)


def status_of(main: Callable[..., int | None], args: tuple) -> int | str | None:
    """What to end the process with; errors are reported."""
    try:
        return main(*(arg.parse_args() if isinstance(arg, argparse.ArgumentParser) else arg for arg in args))
    except SystemExit as end:  # of --help
        return end.code
    except (ConfigError, TrainingError) as error:
        return report(error)
    except UnicodeEncodeError as error:  # of a path, by LC_ALL=C without UTF-8 mode
        if not sys.getfilesystemencoding() == error.encoding != "utf-8":
            raise
        return report(ConfigError(f"{error.object!a} cannot be encoded in {error.encoding}: set PYTHONUTF8=1"))
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the job is ending already
        if is_first_of_machine():
            try_print(f"{program_name()}: interrupted", sys.stderr)
        return 128 + signal.SIGINT
