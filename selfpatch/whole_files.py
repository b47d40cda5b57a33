"""Write a file or a folder whole: after a crash at any moment there is either the old one or the complete new one.

And read files that are whole: regular(path) refuses pipes.
"""
import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from selfpatch.errors import ConfigError, printable


class WriteError(ConfigError):
    """A file or folder could not be written; errno and strerror say why, as an OSError's do."""

    def __init__(self, path: str | Path, error: "OSError | WriteError"):
        self.errno, self.strerror, self.parts = error.errno, error.strerror or str(error), (path, error)
        kept = f"; the {'folder' if os.path.isdir(path) else 'file'} that was there before is kept"
        super().__init__(printable(f"{path} cannot be written: {self.strerror}" + kept * os.path.exists(path)))

    def __reduce__(self) -> tuple:
        return type(self), self.parts  # other ranks get it by pickle


def regular(path: str | Path) -> str | Path:
    """The path as it is, for the call that opens it: a pipe could make that call wait for ever, or be read in part.

    Raises:
        OSError: there is nothing at path, or a pipe, as for <(command), or a device.
    """
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a folder's own error is clear
        raise OSError(errno.EINVAL, "a pipe or a device, not a regular file", str(path))
    return path


@contextlib.contextmanager
def whole_file(path: str | Path, previous: Path | None = None, suffix: str = "") -> Iterator[Path]:
    """Give the name of a temporary file beside path to write to, which replaces path at the end.

    If the block raises, the temporary file is removed and path stays as it was. A process that is killed leaves
    .NAME.NUMBER.tmp behind.

    Args:
        path: file to write or replace; of a link, the file that it leads to.
        previous: keep under this name the file that is replaced.
        suffix: of the temporary file, for a writer that takes the format from it.

    Raises:
        WriteError: the disk is full or cannot be written, or path is a pipe or a device.
    """
    path = Path(os.path.realpath(path))
    with write_errors(path):  # a name may be too long even to look for
        if path.exists():
            regular(path)  # /dev/null would be replaced
    number = int.from_bytes(os.urandom(5), "big")  # unlike a process id, unique on all machines that share the disk
    temporary = path.with_name(f".{path.name}.{number}.tmp{suffix}")
    try:
        with write_errors(path):
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            if previous is not None and path.is_file():
                keep_as(path, previous)
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):  # a disk that became read-only
            temporary.unlink(missing_ok=True)  # also after os.replace, which leaves two names of one file as they are


@contextlib.contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """Give a temporary folder to write to, which replaces folder at the end and is removed if the block raises.

    The old folder is removed once the new one is in its place. A process that is killed between the two renames leaves
    it as .NAME.PID.old.

    Raises:
        WriteError: the disk is full or cannot be written.
    """
    folder = Path(os.path.realpath(folder))  # of a link, what it leads to
    temporary, replaced = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    with write_errors(folder):
        temporary.mkdir(parents=True)  # outside the try: one that exists is another process's
    try:
        with write_errors(folder):
            yield temporary
            if folder.exists():
                folder.rename(replaced)
            try:
                temporary.rename(folder)
            except OSError:
                if replaced.exists():
                    replaced.rename(folder)
                raise
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn an error of the disk into a WriteError of path."""
    try:
        yield
    except (OSError, WriteError) as error:
        raise WriteError(path, error) from None


def keep_as(path: Path, name: Path) -> None:
    """Give a file a second name, replacing what has that name; where there are no hard links, rename the file."""
    try:
        with whole_file(name) as temporary:
            os.link(path, temporary)
    except WriteError:
        shutil.move(path, name)  # which copies if the two are on different disks


def sync_folder(folder: Path) -> None:
    """Write a folder's names to the disk, so that a new one outlives a power cut; not every file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
