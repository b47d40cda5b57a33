"""Images in .zip and .tar archives, read where they lie.

An archive is read through once, to find where each image begins. That index is kept beside it, NAME.index.npz, and made
anew when the archive's size or time of change is another. Names in an archive are names alone: nothing is unpacked, and
links lead to other members of the archive only.
"""
import contextlib
import os
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import BinaryIO

import numpy as np
import torch

from selfpatch.data.archive_index import SPARSE, TAR, Index, make_index
from selfpatch.data.files import UnreadableImage, is_chosen, unread_formats, with_retries
from selfpatch.data.names import NamedImages, common_top, in_order, number_classes
from selfpatch.errors import ConfigError
from selfpatch.whole_files import WriteError, regular, whole_file

INDEX_VERSION, INDEX_SUFFIX = 3, ".index.npz"
COMPRESSED_TARS = (".tgz", ".tbz", ".tbz2", ".txz", ".tzst", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
# by method: from the bytes stored and the size that the directory gives; no more than one byte above it is unpacked
UNPACK = {zipfile.ZIP_STORED: lambda data, _: data,
          zipfile.ZIP_DEFLATED: lambda data, size: zlib.decompressobj(-15).decompress(data, size + 1)}
READ_ERRORS = (OSError, ValueError, zlib.error, tarfile.TarError)  # of read_member
MAX_BYTES = 2**31  # of an image: holes and compression would let a small archive fill the memory
OPEN_ARCHIVES = 64  # at a time in a process, which may have 1024 files open by default


class ArchiveImages(NamedImages):
    """The images of one or several archives, in the order that they would have in a folder, were they unpacked.

    Images of one name follow each other in the order of the archives' names, in whatever order these are given.

    Args:
        suffixes: take images whose names end so alone, see files.split_name.
        beside: keep images beside class folders too.
    """

    def __init__(self, paths: list[str], suffixes: Sequence[str] = (), beside: bool = False):
        self.paths = sorted(paths, key=lambda path: (os.path.basename(path), path))
        indices = [open_index(path) for path in self.paths]
        names = [name for index in indices for name in index.names]
        positions = np.concatenate([index.positions for index in indices])
        archives = np.repeat(np.arange(len(paths)), [len(index.names) for index in indices])
        unread = sum((index.unread for index in indices), Counter())
        if suffixes:
            unread += unread_formats(names, suffixes)
            kept = [i for i, name in enumerate(names) if is_chosen(name, suffixes)]
            names, positions, archives = [names[i] for i in kept], positions[kept], archives[kept]
        self.top = common_top(names)
        names = [name[len(self.top):] for name in names]
        order = in_order(names)
        if not beside:  # left out as in a folder, if there are others
            order = [i for i in order if "/" in names[i]] or order
        left_out = len(names) - len(order)
        names = [names[i] for i in order]
        super().__init__(self.paths[0] if len(paths) == 1 else f"{self.paths[0]} and {len(paths) - 1} more", names,
                         *number_classes(names))
        self.positions = torch.from_numpy(positions[order])
        self.archives = torch.from_numpy(archives[order]).to(torch.int32)
        self.unread, self.outside = unread, left_out
        self.suffixes = suffixes or self.suffixes

    def location(self, index: int) -> str:
        return f"{self.paths[self.archives[index]]}/{self.top}{self.names[index]}"

    def places(self) -> list[Hashable]:
        files = [(status.st_dev, status.st_ino) for status in map(os.stat, self.paths)]
        members = zip(self.archives.tolist(), self.positions[:, 0].tolist(), self.names, strict=True)
        return [(files[archive], start if start >= 0 else name) for archive, start, name in members]

    def read(self, index: int) -> bytes:
        path, position = self.paths[self.archives[index]], self.positions[index].tolist()
        try:
            data = with_retries(lambda: read_member(path, *position))
        except READ_ERRORS as error:
            reason = getattr(error, "strerror", None) or error
            raise UnreadableImage(f"cannot read the image {self.location(index)} ({reason})") from None
        if not data:
            raise UnreadableImage(f"cannot read the image {self.location(index)} (0 bytes): remove it from the archive")
        return data

    def sizes(self) -> torch.Tensor:
        return self.positions[:, 2]


# ----------------------------------------------------------------------------------------------------------------------
# Reading an image


@lru_cache(maxsize=OPEN_ARCHIVES)
def open_archive(path: str) -> BinaryIO:
    """The archive, opened by this process or the one that it was forked from: os.pread moves no common position."""
    return open(path, "rb", buffering=0)


def read_at(path: str, start: int, count: int) -> bytes:
    """Bytes of an archive.

    Raises:
        ValueError: it ends before.
    """
    try:
        archive = open_archive(path)  # held until it is read: another thread may take it out of the cache
        # first, since memory for all of it would be taken, whatever a damaged directory says
        if start + count > os.fstat(archive.fileno()).st_size:
            raise ValueError("the archive has become shorter since it was indexed, or its directory is damaged")
        return os.pread(archive.fileno(), count, start)
    except OSError:
        open_archive.cache_clear()  # a file server that was unreachable may know the open file no longer
        raise


def read_member(path: str, start: int, stored: int, size: int, method: int, crc: int) -> bytes:
    """The bytes of a member, of a position in an Index.

    Raises:
        ValueError, zlib.error, tarfile.TarError: it has none, or they are not what the archive says.
    """
    if start < 0:
        raise ValueError("a link to a file that is not in the archive")
    if size > MAX_BYTES:
        raise ValueError(f"{size:,} bytes, more than {MAX_BYTES:,}")
    if method == SPARSE:
        return read_sparse(path, start)
    return read_at(path, start, stored) if method == TAR else read_zip_member(path, start, stored, size, method, crc)


def read_sparse(path: str, start: int) -> bytes:
    """The bytes of a tar's member with holes, which are not stored."""
    with open(path, "rb") as file:  # by itself, since tarfile moves the position
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            if (member := archive.next()) is None or not member.issparse():
                raise ValueError("there is no member with holes where the index says")
            return archive.extractfile(member).read()


def read_zip_member(path: str, start: int, stored: int, size: int, method: int, crc: int) -> bytes:
    """The bytes of a member, unpacked and compared with its checksum.

    Raises:
        ValueError, zlib.error: they are not what the archive's directory says.
    """
    header = read_at(path, start, 30)
    if header[:4] != b"PK\3\4":
        raise ValueError("there is no member of the archive where its directory says")
    name, extra = struct.unpack("<HH", header[26:])
    if method not in UNPACK:  # a link leads to it
        raise ValueError(f"compressed by method {method}, which is not read")
    data = UNPACK[method](read_at(path, start + 30 + name + extra, stored), size)
    if len(data) != size or zlib.crc32(data) != crc:
        raise ValueError("damaged in the archive: wrong checksum")
    return data


# ----------------------------------------------------------------------------------------------------------------------
# The index


def open_index(path: str) -> Index:
    """The index of an archive, from the file beside it or made anew and kept there, if that can be written.

    Raises:
        ConfigError: the archive cannot be read, is cut off, compressed as a whole, or encrypted.
    """
    try:
        status = os.stat(regular(path))
        stamp = [INDEX_VERSION, status.st_size, status.st_mtime_ns]
        kept = f"{path}{INDEX_SUFFIX}"
        if (index := read_kept_index(kept, stamp)) is None:
            index = make_index(path)
            keep_index(kept, index, stamp)
    except OSError as error:
        raise ConfigError(f"cannot read the archive {path} ({error.strerror or error})") from None
    return index


def read_kept_index(kept: str, stamp: list[int]) -> Index | None:
    """An index that was kept, if it belongs to the archive as it is now."""
    try:
        with np.load(regular(kept), allow_pickle=False) as content:
            if content["stamp"].tolist() != stamp:
                return None
            names = content["names"].tobytes().decode(errors="surrogateescape").split("\0")[:-1]
            unread = dict(zip(content["suffixes"].tolist(), content["counts"].tolist(), strict=True))
            index = Index(names, content["positions"].astype(np.int64), Counter(unread))
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error):
        return None
    return index if index.positions.shape == (len(names), 5) else None


def keep_index(kept: str, index: Index, stamp: list[int]) -> None:
    """Write an index whole or not at all; where the folder cannot be written to, go on without."""
    names = "".join(f"{name}\0" for name in index.names).encode(errors="surrogateescape")
    suffixes = sorted(index.unread)
    with contextlib.suppress(WriteError), whole_file(kept) as temporary, open(temporary, "wb") as file:
        np.savez(file, stamp=np.array(stamp), names=np.frombuffer(names, dtype=np.uint8), positions=index.positions,
                 suffixes=np.array(suffixes, dtype=np.str_),
                 counts=np.array([index.unread[suffix] for suffix in suffixes], dtype=np.int64))
