"""Images in .zip and .tar archives, read where they lie.

An archive is read through once, to find where each image begins. That index is kept beside it, NAME.index.npz, and made
anew when the archive's size or time of change is another. Names in an archive are names alone: nothing is unpacked.
"""
import contextlib
import os
import struct
import tarfile
import zipfile
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import BinaryIO, NamedTuple

import numpy as np
import torch

from selfpatch.data.files import OTHER_IMAGE_SUFFIXES, UnreadableImage, is_hidden, is_image_name, with_retries
from selfpatch.data.names import NamedImages, Progress, common_top, in_order, number_classes
from selfpatch.errors import ConfigError
from selfpatch.whole_files import WriteError, whole_file

INDEX_VERSION = 1
ARCHIVE_SUFFIXES = (".zip", ".tar")
COMPRESSED_TARS = (".tgz", ".tbz", ".tbz2", ".txz", ".tzst", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
# by method: from the bytes stored and the size that the directory gives; no more than one byte above it is unpacked
ZIP_METHODS = {zipfile.ZIP_STORED: lambda data, _: data,
               zipfile.ZIP_DEFLATED: lambda data, size: zlib.decompressobj(-15).decompress(data, size + 1)}
OPEN_ARCHIVES = 64  # at a time in a process, which may have 1024 files open by default


class Index(NamedTuple):
    """The images of an archive: names, and for each (start, bytes stored, bytes, method, CRC), int64 [n, 5].

    Start is that of the data in a .tar, and of the local header in a .zip. A .tar has 0 as method, and no CRC.
    """
    names: list[str]
    places: np.ndarray
    unread: Counter


class ArchiveImages(NamedImages):
    """The images of one or several archives, in the order that they would have in a folder, were they unpacked."""

    def __init__(self, paths: list[str]):
        self.paths, indices = paths, [open_index(path) for path in paths]
        names = [name for index in indices for name in index.names]
        places = np.concatenate([index.places for index in indices])
        archives = np.repeat(np.arange(len(paths)), [len(index.names) for index in indices])
        self.top = common_top(names)
        names = [name[len(self.top):] for name in names]
        order = in_order(names)
        if nested := [i for i in order if "/" in names[i]]:  # as in a folder, where images beside folders are left out
            order, left_out = nested, len(order) - len(nested)
        names = [names[i] for i in order]
        super().__init__(paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more", names,
                         *number_classes(names))
        self.places, self.archives = torch.from_numpy(places[order]), torch.from_numpy(archives[order]).to(torch.int32)
        self.unread, self.outside = sum((index.unread for index in indices), Counter()), left_out if nested else 0

    def location(self, index: int) -> str:
        return f"{self.paths[self.archives[index]]}/{self.top}{self.names[index]}"

    def read(self, index: int) -> bytes:
        path, place = self.paths[self.archives[index]], self.places[index].tolist()
        read = read_zip_member if path.lower().endswith(".zip") else read_tar_member
        try:
            data = with_retries(lambda: read(path, *place))
        except (OSError, ValueError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or error
            raise UnreadableImage(f"cannot read the image {self.location(index)} ({reason})") from None
        if not data:
            raise UnreadableImage(f"cannot read the image {self.location(index)} (0 bytes): remove it from the archive")
        return data


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
        open_archive.cache_clear()  # a file server that was away may know the open file no longer
        raise


def read_tar_member(path: str, start: int, stored: int, *_) -> bytes:
    return read_at(path, start, stored)


def read_zip_member(path: str, start: int, stored: int, size: int, method: int, crc: int) -> bytes:
    """The bytes of a member, unpacked and compared with its checksum.

    Raises:
        ValueError, zlib.error: they are not what the archive's directory says.
    """
    header = read_at(path, start, 30)
    if header[:4] != b"PK\3\4":
        raise ValueError("there is no member of the archive where its directory says")
    name, extra = struct.unpack("<HH", header[26:])
    data = ZIP_METHODS[method](read_at(path, start + 30 + name + extra, stored), size)
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
        status = os.stat(path)
        stamp = [INDEX_VERSION, status.st_size, status.st_mtime_ns]
        kept = f"{path}.index.npz"
        if (index := read_kept_index(kept, stamp)) is None:
            index = make_index(path)
            keep_index(kept, index, stamp)
    except OSError as error:
        raise ConfigError(f"cannot read the archive {path} ({error.strerror or error})") from None
    return index


def make_index(path: str) -> Index:
    """Where each image of an archive is; of several members with one name the last counts, as when it is unpacked."""
    rows, names, places, unread = {}, [], array("q"), Counter()
    is_zip = path.lower().endswith(".zip")
    progress = Progress(f"indexing {path}")
    for name, place in progress(zip_members(path) if is_zip else tar_members(path)):
        name = plain_name(name)
        if isinstance(place, str):  # a link; to nothing it has no bytes, which is reported when it is to be read
            row = rows.get(plain_name(place))
            place = (0,) * 5 if row is None else places[5 * row:5 * row + 5]
        if any(is_hidden(part) for part in name.split("/") if part != ".."):
            continue
        suffix = os.path.splitext(name)[1].lower()
        if not is_image_name(name):
            unread.update([suffix] * (suffix in OTHER_IMAGE_SUFFIXES or suffix in ARCHIVE_SUFFIXES))
        elif name in rows:
            places[5 * rows[name]:5 * rows[name] + 5] = array("q", place)
        else:
            rows[name] = len(names)
            names.append(name)
            places.extend(place)
    return Index(names, np.array(places, dtype=np.int64).reshape(-1, 5), unread)


def plain_name(name: str) -> str:
    """A member's name without the . and / that it may begin with."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def zip_members(path: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, place) of every file of a .zip, by its directory."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise ConfigError(f"{path} is cut off, or no zip archive ({error}): copy or download it again") from None
    for member in members:
        if member.is_dir() or not is_image_name(member.filename):
            yield member.filename, ()
            continue
        if member.flag_bits & 1:
            raise ConfigError(f"{path} is encrypted ({member.filename}): unpack it, or pack it anew without a password")
        if member.compress_type not in ZIP_METHODS:
            raise ConfigError(f"{path} is compressed by method {member.compress_type} ({member.filename}), which is "
                              "not read: pack it anew with zip -0, which is the fastest to read as well")
        yield member.filename, (member.header_offset, member.compress_size, member.file_size, member.compress_type,
                                member.CRC)


def tar_members(path: str) -> Iterator[tuple[str, tuple[int, ...] | str]]:
    """(name, place) of every file of a .tar, and at the end (name, name of the file that it leads to) of every link.

    Raises:
        ConfigError: it is cut off, or compressed.
    """
    links = []
    try:
        with open(path, "rb") as file:
            refuse_compressed(path, file)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members = []  # which would hold an object for every member
                    if member.issym() or member.islnk():
                        target = member.linkname
                        links.append((member.name, target if member.islnk() else os.path.normpath(
                            os.path.join(os.path.dirname(member.name), target))))
                    elif member.isreg():
                        yield member.name, (member.offset_data, member.size, member.size, 0, 0)
                end = archive.offset
            file.seek(end)
            # every writer ends with blocks of zeros: without them it was cut off between two members
            complete = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except tarfile.TarError as error:
        raise ConfigError(f"{path} is cut off, or no tar archive ({error}): copy or download it again") from None
    if not complete:
        raise ConfigError(f"{path} is cut off or damaged at byte {end:,}: copy or download it again")
    for name, target in links:
        yield name, target


def refuse_compressed(path: str, file: BinaryIO) -> None:
    magic = file.read(6)
    file.seek(0)
    for start, name, command in ((b"\x1f\x8b", "gzip", "gunzip"), (b"BZh", "bzip2", "bunzip2"),
                                 (b"\xfd7zXZ", "xz", "unxz"), (b"\x28\xb5\x2f\xfd", "zstd", "unzstd")):
        if magic.startswith(start):
            raise ConfigError(f"{path} is compressed as a whole ({name}), so that no image in it can be read by "
                              f"itself: decompress it with {command} and give the .tar")


def read_kept_index(kept: str, stamp: list[int]) -> Index | None:
    """An index that was kept, if it belongs to the archive as it is now."""
    try:
        with np.load(kept, allow_pickle=False) as content:
            if content["stamp"].tolist() != stamp:
                return None
            names = content["names"].tobytes().decode(errors="surrogateescape").split("\0")[:-1]
            unread = dict(zip(content["suffixes"].tolist(), content["counts"].tolist(), strict=True))
            index = Index(names, content["places"].astype(np.int64), Counter(unread))
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error):
        return None
    return index if index.places.shape == (len(names), 5) else None


def keep_index(kept: str, index: Index, stamp: list[int]) -> None:
    """Write an index whole or not at all; where the folder cannot be written to, go on without."""
    names = "".join(f"{name}\0" for name in index.names).encode(errors="surrogateescape")
    suffixes = sorted(index.unread)
    with contextlib.suppress(WriteError), whole_file(kept) as temporary, open(temporary, "wb") as file:
        np.savez(file, stamp=np.array(stamp), names=np.frombuffer(names, dtype=np.uint8), places=index.places,
                 suffixes=np.array(suffixes, dtype=np.str_),
                 counts=np.array([index.unread[suffix] for suffix in suffixes], dtype=np.int64))
