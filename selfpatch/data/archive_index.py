"""Where the images of .zip and .tar archives lie, found in one reading of an archive."""
import os
import stat
import tarfile
import zipfile
import zlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from selfpatch.data.files import OTHER_IMAGE_SUFFIXES, is_hidden, is_image_name
from selfpatch.data.names import Progress
from selfpatch.errors import ConfigError

ARCHIVE_SUFFIXES = (".zip", ".tar")
ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # those that are read
TAR, SPARSE = -1, -2  # methods of members of a .tar
NOWHERE = (-1, 0, 0, TAR, 0)  # the place of a link to a file that is not in the archive
ZIP_END, ZIP_END_BYTES = b"PK\5\6", 22  # what a .zip ends with, before a comment


class Index(NamedTuple):
    """The images of an archive: names, and for each (start, bytes stored, bytes, method, CRC), int64 [n, 5].

    Start is that of the data in a .tar, and of the header in a .zip or for a member with holes (method SPARSE). A .tar
    has no CRC.
    """
    names: list[str]
    places: np.ndarray
    unread: Counter


def make_index(path: str, is_wanted: Callable[[str], bool] = is_image_name) -> Index:
    """Where each image of an archive is; of several members with one name the last counts, as when it is unpacked.

    Args:
        is_wanted: whether a name is that of an image, or of what else is looked for.
    """
    rows, names, places, unread, links = {}, [], array("q"), Counter(), {}
    members = tar_members if is_tar(path) else zip_members
    for name, place in Progress(f"indexing {path}")(members(path)):
        name = plain_name(name)
        links.pop(name, None)
        if isinstance(place, str):
            links[name], place = plain_name(place), NOWHERE
        if in_hidden(name):
            continue
        suffix = os.path.splitext(name)[1].lower()
        if not is_wanted(name):
            unread.update([suffix] * (suffix in OTHER_IMAGE_SUFFIXES or suffix in ARCHIVE_SUFFIXES))
        elif name in rows:
            places[5 * rows[name]:5 * rows[name] + 5] = array("q", place)
        else:
            rows[name] = len(names)
            names.append(name)
            places.extend(place)
    if links:
        enter_linked_folders(links, rows, names, is_wanted, lambda: members(path))
        places.extend(NOWHERE * (len(names) - len(places) // 5))
        follow_links(links, rows, places, lambda: members(path))
    return Index(names, np.array(places, dtype=np.int64).reshape(-1, 5), unread)


def in_hidden(name: str) -> bool:
    return any(is_hidden(part) for part in name.split("/") if part != "..")


def enter_linked_folders(links: dict[str, str], rows: dict[str, int], names: list[str],
                         is_wanted: Callable[[str], bool], members: Callable[[], Iterator]) -> None:
    """Add the images below hidden folders that links lead to, as links to them; other folders have theirs already.

    Of several links to one folder the first counts, as for folders on a disk.
    """
    folders = {end_of_links(name, links): name for name in sorted(links.keys() - rows.keys(), reverse=True)
               if not in_hidden(name)}
    folders = {folder: name for folder, name in folders.items() if in_hidden(folder)}
    for name, _ in members() if folders else ():
        name = plain_name(name)
        for i, char in enumerate(name):
            if char == "/" and name[:i] in folders and is_wanted(name) and not in_hidden(name[i + 1:]):
                added = folders[name[:i]] + name[i:]
                if added not in rows:
                    rows[added], links[added] = len(names), name
                    names.append(added)


def follow_links(links: dict[str, str], rows: dict[str, int], places: array, members: Callable[[], Iterator]) -> None:
    """Give links the places of the files that they lead to, which may be hidden, or have no image's name.

    Args:
        links: the target of each.
        rows: the row in places of each image, links among them.
        members: reads the archive once more, for files that are not in rows.
    """
    targets = defaultdict(list)
    for name in links.keys() & rows.keys():
        targets[end_of_links(name, links)].append(rows[name])
    found = {name: tuple(places[5 * rows[name]:5 * rows[name] + 5]) for name in targets if name in rows}
    if others := targets.keys() - found.keys():
        found |= {plain: place for name, place in members()
                  if (plain := plain_name(name)) in others and not isinstance(place, str)}
    for name, place in found.items():
        for row in targets[name]:
            places[5 * row:5 * row + 5] = array("q", place)


def end_of_links(name: str, links: dict[str, str]) -> str:
    """The name that a link leads to at last, through links among its folders too; one that goes in a circle is left."""
    for _ in range(40):  # as many as Linux follows
        ends = [i for i, char in enumerate(name) if char == "/"] + [len(name)]
        link = next((name[:end] for end in ends if name[:end] in links), None)
        if link is None:
            break
        name = plain_name(os.path.normpath(links[link] + name[len(link):]))
    return name


def plain_name(name: str) -> str:
    """A member's name without the . and / that it may begin with."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def target_of(name: str, target: str) -> str:
    """What a symbolic link leads to, as a name in the archive."""
    return os.path.normpath(os.path.join(os.path.dirname(name), target))


def is_tar(path: str) -> bool:
    """Whether an archive is a .tar, by its first bytes, and where these don't tell, by its name.

    Raises:
        ConfigError: it is compressed as a whole.
    """
    with open(path, "rb") as file:
        start = file.read(tarfile.BLOCKSIZE)
    refuse_compressed(path, start)
    try:
        tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return not (start.startswith(b"PK") or path.lower().endswith(".zip"))
    return True


def zip_members(path: str) -> Iterator[tuple[str, tuple[int, ...] | str]]:
    """(name, place) of every file of a .zip, by its directory, and (name, name of what it leads to) of every link.

    Raises:
        ConfigError: it is cut off, in parts, joined with another, encrypted, or compressed in a way that is not read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members, names = [member for member in archive.infolist() if not member.is_dir()], archive.namelist()
            targets = {member.filename: archive.read(member).decode(errors="surrogateescape") for member in members
                       if stat.S_ISLNK(member.external_attr >> 16) and member.file_size <= 4096}
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, RuntimeError, zlib.error) as error:
        raise ConfigError(f"{path} is cut off, or no zip archive ({error}): copy or download it again") from None
    check_whole_zip(path, members)
    # written on Windows against the format's rules; elsewhere \ is a character like any other
    windows = any("\\" in name for name in names) and not any("/" in name for name in names)
    for member in members:
        name = member.filename.replace("\\", "/") if windows else member.filename
        if member.filename in targets:
            yield name, target_of(name, targets[member.filename])
            continue
        if is_image_name(name) and member.flag_bits & 1:
            raise ConfigError(f"{path} is encrypted ({name}): unpack it, or pack it anew without a password")
        if is_image_name(name) and member.compress_type not in ZIP_METHODS:
            raise ConfigError(f"{path} is compressed by method {member.compress_type} ({name}), which is not read: "
                              "pack it anew with zip -0, which is the fastest to read as well")
        yield name, (member.header_offset, member.compress_size, member.file_size, member.compress_type, member.CRC)


def check_whole_zip(path: str, members: list[zipfile.ZipInfo]) -> None:
    """Raise ConfigError if a .zip is one part of several, or begins with another one, which would not be read."""
    first = min((member.header_offset for member in members), default=0)
    if first < 0 or any(member.volume for member in members):
        raise ConfigError(f"{path} is a part of a split zip archive: join its parts, zip -s 0 {path} --out whole.zip")
    with open(path, "rb") as file:
        file.seek(max(first - ZIP_END_BYTES - 2**16, 0))
        before = file.read(first - file.tell())  # a program that unpacks it may lie there as well
    end = before.rfind(ZIP_END)
    if end >= 0 and len(before) >= end + ZIP_END_BYTES and \
            len(before) == end + ZIP_END_BYTES + int.from_bytes(before[end + 20:end + 22], "little"):
        raise ConfigError(f"{path} is two zip archives in one file, of which the second begins at byte {first:,}: give "
                          f"them as two files (head -c {first}, tail -c +{first + 1})")


def tar_members(path: str) -> Iterator[tuple[str, tuple[int, ...] | str]]:
    """(name, place) of every file of a .tar, or of several that were joined, and (name, its target) of every link.

    Raises:
        ConfigError: it is cut off or in parts, or something else follows it.
    """
    with open(path, "rb") as file:
        start = next_block(file) if file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE) else 0  # it may be empty
        while start is not None:
            file.seek(start)
            try:
                end = yield from tar_piece(path, file)
            except tarfile.TarError as error:
                raise ConfigError(f"{path} is cut off, or no tar archive ({error}): copy or download it "
                                  "again") from None
            file.seek(end)
            # every writer ends with blocks of zeros: without them it was cut off between two members
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                what = "cut off or damaged" if end > start or not start else \
                    "followed by something that is no tar archive"
                raise ConfigError(f"{path} is {what} at byte {end:,}: copy or download it again")
            start = next_block(file)


def tar_piece(path: str, file: BinaryIO) -> Iterator[tuple[str, tuple[int, ...] | str]]:
    """The members of the .tar that begins at the file's position; returns where it ends."""
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # which would hold an object for every member
            if member.type == b"M":
                raise ConfigError(f"{path} is a part of a tar archive of several volumes ({member.name} began in "
                                  "another one): unpack them with tar -M, and pack them anew")
            if member.issym():
                yield member.name, target_of(member.name, member.linkname)
            elif member.islnk():
                yield member.name, member.linkname
            elif member.issparse():
                yield member.name, (member.offset, 0, member.size, SPARSE, 0)
            elif member.isreg():
                yield member.name, (member.offset_data, member.size, member.size, TAR, 0)
        return archive.offset


def next_block(file: BinaryIO) -> int | None:
    """Where the next block begins that is not all zeros, None if the file ends before."""
    while chunk := file.read(2**20):
        if rest := chunk.lstrip(b"\0"):
            position = file.tell() - len(rest)
            return position - position % tarfile.BLOCKSIZE
    return None


def refuse_compressed(path: str, data: bytes) -> None:
    for start, name, command in ((b"\x1f\x8b", "gzip", "gunzip"), (b"BZh", "bzip2", "bunzip2"),
                                 (b"\xfd7zXZ", "xz", "unxz"), (b"\x28\xb5\x2f\xfd", "zstd", "unzstd")):
        if data.startswith(start):
            raise ConfigError(f"{path} is compressed as a whole ({name}), so that no image in it can be read by "
                              f"itself: decompress it with {command} and give the .tar")
