"""What the folder of a run holds, and how it stays whole whenever the run is killed.

    checkpoint.pth        the last state
    previous.pth          the one before, used where checkpoint.pth is damaged
    checkpoint0010.pth    a copy for good, after every --saveckp_freq-th epoch
    log.txt               a line of JSON for each epoch, the same as in the checkpoint
    steps.jsonl           the same for each line of progress; earlier_steps.jsonl: of a run that was here before
    tracker_id.txt        by which wandb and trackio know the run
    bad_images.txt        what could not be read
    damaged.pth, nan.pth  for a look: a checkpoint that was damaged, the state before a step that was not finite
    run.lock              while a process trains: which one
"""
import contextlib
import datetime
import errno
import os
import re
import shutil
import socket
from pathlib import Path

from selfpatch.checkpoints.files import CheckpointError, read_checkpoint, write_checkpoint
from selfpatch.distributed.processes import is_main_process
from selfpatch.errors import PASSING_ERRORS, ConfigError, TrainingError, describe
from selfpatch.whole_files import WriteError, whole_file

try:
    import fcntl
except ImportError:  # Windows: without a lock
    fcntl = None


LEFTOVER = re.compile(r"\.(checkpoint\d*\.pth|previous\.pth|nan\.pth|log\.txt|steps\.jsonl)\.\d+\.tmp")


def numbered(epoch: int, saveckp_freq: int) -> int | None:
    """The epoch, if a copy of its checkpoint is kept for good; none is of -1, before the first epoch."""
    return epoch if saveckp_freq and epoch >= 0 and epoch % saveckp_freq == 0 else None


class RunFolder:
    """The folder of one run. All but check and add_bad_images is for rank 0 alone."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.last, self.previous = self.path / "checkpoint.pth", self.path / "previous.pth"
        self.lock_path, self.descriptor = self.path / "run.lock", None
        self.state = None
        self.overdue_copy: int | None = None  # epoch of a copy that could not be made of checkpoint.pth as it is now

    def lock(self) -> None:
        """Keep other processes from training here, and remove what one that was killed was writing.

        The kernel gives the lock up when the process ends, however it ends.

        Raises:
            ConfigError: a live process is training here.
        """
        while fcntl is not None and self.descriptor is None:
            try:
                descriptor = os.open(self.lock_path, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise ConfigError(f"cannot lock {self.lock_path} ({error.strerror}): if no process of another user is "
                                  "training there, remove it; or choose another --output_dir") from None
            try:
                # held by the process, unlike flock's: data workers do not inherit it
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(descriptor), os.stat(self.lock_path)):
                        self.descriptor = descriptor
            except OSError as error:
                holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
                os.close(descriptor)
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise ConfigError(f"--output_dir {self.path} is in use by {holder}: wait until that run ends, end "
                                      "it, or choose another folder") from None
                print(f"warning: {self.path} cannot be locked ({error.strerror}): start no second run there")
                break
            if self.descriptor is None:
                os.close(descriptor)  # its holder removed the file in between: lock the new one
        if self.descriptor is None:
            return
        with contextlib.suppress(OSError):  # a full disk: the lock holds without the name of its holder
            os.truncate(self.descriptor, 0)
            os.write(self.descriptor, f"process {os.getpid()} on {socket.gethostname()} since "
                                      f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}\n".encode())
        for leftover in self.path.glob(".*.tmp"):
            if LEFTOVER.fullmatch(leftover.name) and leftover.is_file():
                leftover.unlink(missing_ok=True)

    def unlock(self) -> None:
        if self.descriptor is not None:
            with contextlib.suppress(OSError):  # a folder that became read-only
                self.lock_path.unlink(missing_ok=True)
            os.close(self.descriptor)
            self.descriptor = None

    def numbered(self, epoch: int) -> Path:
        return self.path / f"checkpoint{epoch:04}.pth"

    def has_run(self) -> bool:
        """Whether find would continue from a checkpoint, as long as one of them is sound."""
        return self.last.is_file() or self.previous.is_file()

    def find(self) -> Path | None:
        """The checkpoint to continue from, None where there has been no run; take_state gives what it holds.

        It is the last one, or the one before where that is damaged; a damaged one is renamed to damaged.pth.

        Raises:
            ConfigError: there is no sound checkpoint, although there was a run.
        """
        damage = ""
        if self.last.is_file():
            try:
                self.state = read_checkpoint(self.last)
                return self.last
            except CheckpointError as error:
                damage = str(error)
        if self.previous.is_file():
            with contextlib.suppress(CheckpointError):
                self.state = read_checkpoint(self.previous)
                print(f"warning: {damage or f'there is no {self.last}'}; continuing from the one before, "
                      f"{self.previous}", flush=True)
                if damage:
                    with contextlib.suppress(OSError):
                        os.replace(self.last, self.path / "damaged.pth")
                return self.previous
        copies = sorted(path.name for path in self.path.glob("checkpoint[0-9]*.pth"))
        if damage or copies:
            raise ConfigError(f"{damage or f'there is no {self.last}, but a run was saved here'}: "
                              + (f"to continue from a copy, rename it to checkpoint.pth ({', '.join(copies[-3:])}), "
                                 if copies else "remove it, ") + "or choose another --output_dir")
        return None

    def take_state(self) -> dict | None:
        """What find has read, once."""
        state, self.state = self.state, None
        return state

    def save(self, state: dict, epoch: int | None = None) -> None:
        """Write checkpoint.pth, and keep the one before.

        Args:
            epoch: also keep a copy with this number.

        Raises:
            WriteError: the files that were there before are kept.
        """
        if self.overdue_copy is not None:
            self.copy_if_missing(self.overdue_copy)  # the last moment at which checkpoint.pth is that epoch's
        write_checkpoint(state, self.last, self.previous)
        self.overdue_copy = epoch
        if epoch is not None:
            self.copy(epoch)
            self.overdue_copy = None

    def copy_if_missing(self, epoch: int) -> None:
        """Make a copy that was due when the run before was killed or had no room; a full disk is a warning."""
        try:
            if not self.numbered(epoch).is_file():
                self.copy(epoch)
        except WriteError as error:
            print(f"warning: {error}", flush=True)

    def copy(self, epoch: int) -> None:
        """Copy checkpoint.pth to its numbered name, whole or not at all."""
        with whole_file(self.numbered(epoch)) as temporary:
            try:
                os.link(self.last, temporary)  # no file is ever written in place, so that two names can share one
            except OSError:
                shutil.copyfile(self.last, temporary)

    def try_save(self, state: dict, epoch: int | None = None, last_chance: bool = False) -> None:
        """save, where an error that may pass is a warning, as there is another save to come.

        Raises:
            TrainingError: it will not pass, or there is no other save to come.
        """
        try:
            self.save(state, epoch)
        except WriteError as error:
            if last_chance or error.errno not in PASSING_ERRORS:
                raise TrainingError(f"{error}; the same command continues from the last checkpoint") from None
            print(f"warning: {error}; training goes on, and the next save will try again", flush=True)

    def keep_for_a_look(self, state: dict) -> str:
        """Write nan.pth on rank 0; where it is or why it is not, to be added to a message there."""
        path = self.path / "nan.pth"
        if not is_main_process():
            return ""
        try:
            write_checkpoint(state, path)
        except WriteError as error:
            return f"; {error}"
        return f"; the state before that step is in {path}"

    def add_bad_images(self, errors: set[str], num_images: int) -> None:
        """Append what bad_images.txt does not have yet, one line per image, and say how many there are."""
        path, encoding = self.path / "bad_images.txt", {"encoding": "utf-8", "errors": "surrogateescape"}
        try:
            text = path.read_text(**encoding) if path.is_file() else ""
            new = sorted(errors.difference(text.split("\n")))
            # added in one piece, since several ranks may do so at once
            with open(path, "a", **encoding) as file:
                file.write("\n" * bool(text and text[-1] != "\n") + "".join(f"{line}\n" for line in new))
        except OSError as error:
            print(f"warning: cannot write {path} ({error.strerror}); the next save will try again", flush=True)
        print(f"warning: {len(errors)} of {num_images} images cannot be read, see {path}", flush=True)

    def check(self) -> None:
        """Find out whether checkpoint.pth can be one.

        Raises:
            ConfigError: it is a folder, a link to nothing or the like.
        """
        for path in (self.last, self.previous):
            if os.path.lexists(path) and not path.is_file():
                raise ConfigError(f"{path} is {describe(path)}, not a checkpoint to resume from: remove it, or choose "
                                  "another --output_dir")
