"""The folder of a run, and how its checkpoints stay whole whenever the run is killed.

    checkpoint.pth        the last state
    previous.pth          the state before it, used if checkpoint.pth is damaged
    checkpoint0010.pth    a lasting copy, after every --saveckp_freq-th epoch
    log.txt               a line of JSON for each epoch
    steps.jsonl           a line of JSON for each line of progress; earlier_steps.jsonl: those of an earlier run
    unsaved.txt           until the first checkpoint: where the run's part of log.txt begins
    tracker_id.txt        identifies the run to wandb and trackio
    bad_images.txt        images that could not be read
    damaged.pth, nan.pth  for inspection: a damaged checkpoint, the state before a step that was not finite
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
from selfpatch.errors import PASSING_ERRORS, ConfigError, TrainingError, try_print
from selfpatch.whole_files import WriteError, whole_file

try:
    import fcntl
except ImportError:  # Windows: without a lock
    fcntl = None


LEFTOVER = re.compile(r"\.(checkpoint\d*\.pth|previous\.pth|nan\.pth|log\.txt|steps\.jsonl)\.\d+\.tmp")


class RunFolder:
    """The folder of one run. For rank 0, except keep_for_inspection and add_bad_images.

    Args:
        path: of the folder.
        copy_every: keep a copy of every so many epochs' checkpoints; 0 for none.
    """

    def __init__(self, path: str | Path, copy_every: int = 1):
        self.path, self.copy_every = Path(path), copy_every
        self.last, self.previous = self.path / "checkpoint.pth", self.path / "previous.pth"
        self.lock_path, self.descriptor = self.path / "run.lock", None
        self.state = None
        self.overdue_copy: int | None = None  # epoch of checkpoint.pth, if its copy could not be made yet

    def lock(self) -> None:
        """Keep other processes from training here, and remove the temporary files of a killed one.

        The kernel releases the lock when the process ends, however it ends.

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
                try_print(f"warning: {self.path} cannot be locked ({error.strerror}): start no second run there")
                break
            if self.descriptor is None:
                os.close(descriptor)  # its holder has just removed the file: lock the new one
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
        """Whether there is a checkpoint to continue from, sound or not."""
        return self.last.is_file() or self.previous.is_file()

    def find(self) -> Path | None:
        """The checkpoint to continue from, None without an earlier run; take_state returns its content.

        If the last one is damaged, it is renamed to damaged.pth, and the one before is used.

        Raises:
            ConfigError: there was a run, but no sound checkpoint is left.
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
                try_print(f"warning: {damage or f'there is no {self.last}'}; continuing from the one before, "
                          f"{self.previous}")
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
        """What find has read; only once, to free the memory."""
        state, self.state = self.state, None
        return state

    def save(self, state: dict, epoch: int | None = None) -> None:
        """Write checkpoint.pth, and keep the one before.

        Args:
            epoch: the one that has just ended, if any: its copy is made if one is due.

        Raises:
            WriteError: the earlier files are kept.
        """
        if self.overdue_copy is not None:
            self.copy_if_missing(self.overdue_copy)  # the last moment at which checkpoint.pth is that epoch's
        write_checkpoint(state, self.last, self.previous)
        self.overdue_copy = epoch if self.copies(epoch) else None
        if self.copies(epoch):
            self.copy(epoch)
            self.overdue_copy = None

    def copies(self, epoch: int | None) -> bool:
        """Whether a copy of that epoch's checkpoint is kept."""
        return epoch is not None and epoch >= 0 and self.copy_every > 0 and epoch % self.copy_every == 0

    def copy_if_missing(self, epoch: int) -> None:
        """Copy checkpoint.pth, of that epoch, if a killed process or a full disk has left a copy out."""
        try:
            if self.copies(epoch) and not self.numbered(epoch).is_file():
                self.copy(epoch)
        except WriteError as error:
            try_print(f"warning: {error}")

    def copy(self, epoch: int) -> None:
        """Copy checkpoint.pth to its numbered name, whole or not at all."""
        with whole_file(self.numbered(epoch)) as temporary:
            try:
                os.link(self.last, temporary)  # no file is ever written in place, so two names may share one
            except OSError:
                shutil.copyfile(self.last, temporary)

    def try_save(self, state: dict, epoch: int | None = None, last_chance: bool = False) -> None:
        """Save; an error that may pass is a warning, unless no other save follows.

        Raises:
            TrainingError: the error will not pass, or last_chance is true.
        """
        try:
            self.save(state, epoch)
        except WriteError as error:
            if last_chance or error.errno not in PASSING_ERRORS:
                raise TrainingError(f"{error}; the same command continues from the last checkpoint") from None
            try_print(f"warning: {error}; training goes on, and the next save will try again")

    def keep_for_inspection(self, state: dict) -> str:
        """Write nan.pth on rank 0; the end of a message that says where it is, or why it could not be written."""
        path = self.path / "nan.pth"
        if not is_main_process():
            return ""
        try:
            write_checkpoint(state, path)
        except WriteError as error:
            return f"; {error}"
        return f"; the state before that step is in {path}"

    def add_bad_images(self, errors: set[str], num_images: int) -> None:
        """Append what bad_images.txt lacks, a line per image, and print how many there are."""
        path, encoding = self.path / "bad_images.txt", {"encoding": "utf-8", "errors": "surrogateescape"}
        try:
            text = path.read_text(**encoding) if path.is_file() else ""
            new = sorted(errors.difference(text.split("\n")))
            # in one piece, since several ranks may write at once
            with open(path, "a", **encoding) as file:
                file.write("\n" * bool(text and text[-1] != "\n") + "".join(f"{line}\n" for line in new))
        except OSError as error:
            try_print(f"warning: cannot write {path} ({error.strerror}); the next save will try again")
        try_print(f"warning: {len(errors)} of {num_images} images cannot be read, see {path}")
