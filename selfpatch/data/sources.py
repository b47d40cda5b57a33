"""Where training images come from: --data_path in all its kinds, each as a NamedImages.

    folder               with class folders or without, nested as deep as it is
    list.txt             a text file with the path of an image on each line, a class behind it or not
    a.zip b.tar          one or several archives, read in place (archives.py); 'x/{000..099}.tar' 'x/*.tar' as well
    hf:NAME:CONFIG:SPLIT a data set of Hugging Face or a local one of that kind (hub.py)
    mine.py:ARGUMENT     anything else: what the function open_images(ARGUMENT) of that file opens
"""
import argparse
import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from selfpatch.data.archive_index import ARCHIVE_SUFFIXES
from selfpatch.data.archives import COMPRESSED_TARS, INDEX_SUFFIX, ArchiveImages, open_index
from selfpatch.data.files import (
    IMAGE_SUFFIXES,
    is_chosen,
    is_hidden,
    is_image_name,
    refuse_folder,
    unread_formats,
    walk,
)
from selfpatch.data.hub import HubImages, OwnImages, load_split, parts_of
from selfpatch.data.names import NamedImages, Progress, common_top, in_order, number_classes
from selfpatch.errors import ConfigError
from selfpatch.whole_files import regular

KINDS = ("a folder of images, a text file of their paths, .zip or .tar archives, hf:NAME, hf:NAME:CONFIG:SPLIT, or "
         "FILE.py:ARGUMENT")
MOST_SHARDS = 10**6


def add_source_options(group: argparse._ActionsContainer) -> None:
    """Add --image_suffix and --image_column, see open_images."""
    group.add_argument("--image_suffix", default=[], type=image_suffix, nargs="+", metavar="SUFFIX",
                       help="where photographs and masks are together: take the images alone whose names end so "
                            "from the first dot on, .jpg of 0001.jpg and 0001.seg.png, numbers aside; for folders, "
                            "lists and archives")
    group.add_argument("--image_column", default="", metavar="NAME",
                       help="of a Hugging Face data set; default: the first column of images")


def open_images(paths: str | Path | list[str], option: str = "--data_path", suffixes: Sequence[str] = (),
                column: str = "", beside: bool = False) -> NamedImages:
    """The images that a path stands for, or several archives together.

    Args:
        suffixes: --image_suffix, of folders, lists and archives: take images whose names end so from the first dot on.
        column: --image_column, of a Hugging Face data set; "" for the first one of images.
        beside: of archives, keep images beside class folders too.

    Raises:
        ConfigError: there are none, or they cannot be read; the message names the option.
    """
    reader, paths = check_paths(paths, option, suffixes, column)
    more = {ArchiveImages: (suffixes, beside), HubImages: (column,), OwnImages: ()}.get(reader, (suffixes,))
    images = reader(paths if reader is ArchiveImages else paths[0], *more)
    if not len(images):
        reason = images.unread_summary() or images.expects
        if any(images.unread[suffix] for suffix in ARCHIVE_SUFFIXES):
            reason += "; give the archives in it themselves" + ", unpacked from this one" * (reader is ArchiveImages)
        raise ConfigError(f"{option} {images.source} has no images in it: {reason}")
    return images


def prepare(paths: str | Path | list[str]) -> None:
    """Index archives, and load a data set into its cache, so that other processes find them there."""
    reader, paths = check_paths(paths)
    for path in paths:
        if reader is ArchiveImages:
            open_index(path)
        elif reader is HubImages:
            load_split(*parts_of(path))


def as_list(paths: str | Path | list[str]) -> list[str]:
    return [str(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]


def expand(paths: str | Path | list[str], option: str = "--data_path") -> list[str]:
    """The paths, with those that 'x/{000..099}.tar' and 'x/*.tar' stand for; indices of archives are left out.

    Raises:
        ConfigError: there is no file for such a pattern.
    """
    found = []
    for path in as_list(paths):
        if path.startswith("hf:") or ".py:" in path or os.path.lexists(path):
            found.append(path)
            continue
        for pattern in expand_braces(path, option):
            matches = sorted(glob.glob(os.path.expanduser(pattern))) if glob.has_magic(pattern) else [pattern]
            if not matches:
                raise ConfigError(f"{option} {path}: there is no file of such a name")
            found += matches
    return [path for path in found if not path.endswith(INDEX_SUFFIX)] or found


def expand_braces(path: str, option: str) -> list[str]:
    """The paths that {000..099} and {a,b} in one stand for, as in a shell."""
    if not (match := re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", path)):
        return [path]
    first, last, words = match.groups()
    if words is None:
        width = len(first) if first.startswith("0") else 0
        if abs(int(last) - int(first)) >= MOST_SHARDS:
            raise ConfigError(f"{option} {path}: these are more than {MOST_SHARDS:,} archives")
        numbers = range(min(int(first), int(last)), max(int(first), int(last)) + 1)
        words = ",".join(f"{number:0{width}}" for number in numbers)
    return [path[:match.start()] + word + rest for rest in expand_braces(path[match.end():], option)
            for word in words.split(",")]


def image_suffix(text: str) -> str:
    """Type of --image_suffix: .seg.png, also for seg.png."""
    suffix = f".{text.lower().removeprefix('.')}"
    if not is_image_name(suffix):
        raise argparse.ArgumentTypeError(f"{text!r} is no suffix of images, such as {' '.join(IMAGE_SUFFIXES)}")
    return suffix


def absolute(path: str) -> str:
    """The path for a process that starts in another folder; names of data sets stay as they are."""
    if path.startswith("hf:"):
        start, mark, rest = path.removeprefix("hf:").partition(":")
        local = os.path.expanduser(start)
        return f"hf:{os.path.abspath(local)}{mark}{rest}" if os.path.exists(local) else path
    file, mark, argument = path.partition(".py:")
    return f"{os.path.abspath(file)}{mark}{argument}"


def check_paths(paths: str | Path | list[str], option: str = "--data_path", suffixes: Sequence[str] = (),
                column: str = "") -> tuple[Callable[..., NamedImages], list[str]]:
    """What reads the paths, and these with patterns expanded; no more is read than the beginning of a file.

    Args: as of open_images.

    Raises:
        ConfigError: one of them is not there, or is none of the kinds; several are no archives, or not different; or
            there are none.
    """
    if not (paths := expand(paths, option)):
        raise ConfigError(f"{option}: give {KINDS}")
    kinds = [kind_of(path, option) for path in paths]
    if len(paths) > 1 and set(kinds) != {ArchiveImages}:
        other = next(path for path, kind in zip(paths, kinds, strict=True) if kind is not ArchiveImages)
        raise ConfigError(f"{option} {other}: of several values each must be a .zip or .tar archive; give one folder, "
                          "list or data set")
    if kinds[0] is ArchiveImages:
        seen = {}
        for path in paths:
            status = os.stat(path)
            if first := seen.get(file := (status.st_dev, status.st_ino)):
                raise ConfigError(f"{option}: {path} is the same archive as {first}" if path != first else
                                  f"{option}: {path} is given twice")
            seen[file] = path
    if suffixes and kinds[0] in (HubImages, OwnImages):
        raise ConfigError(f"--image_suffix {' '.join(suffixes)}: is for folders, lists and archives, and {option} "
                          f"{paths[0]} is none of them")
    if column and kinds[0] is not HubImages:
        raise ConfigError(f"--image_column {column}: is for hf:NAME only, and {option} is {paths[0]}")
    return kinds[0], paths


def kind_of(path: str, option: str) -> Callable[..., NamedImages]:
    if path.startswith("hf:"):
        parts_of(path)
        return HubImages
    if ".py:" in path:
        return OwnImages
    if os.path.isdir(path):
        return open_folder
    if not os.path.exists(path):
        raise ConfigError(f"there is no folder {path}, and no file of that name: give {option} {KINDS}")
    try:
        with open(regular(path), "rb") as file:
            is_text = b"\0" not in file.read(4096) and not is_image_name(path)
    except OSError as error:
        raise ConfigError(f"{option}: cannot read {path} ({error.strerror}): give a file, such as one that the output "
                          "of a command was written to") from None
    if path.lower().endswith(ARCHIVE_SUFFIXES):
        return ArchiveImages
    if path.lower().endswith(COMPRESSED_TARS):
        raise ConfigError(f"{option} {path} is compressed as a whole, so that no image in it can be read by itself: "
                          "decompress it (gunzip, bunzip2, unxz or unzstd) and give the .tar")
    if path.endswith(".py"):
        raise ConfigError(f"{option} {path}: give {path}:ARGUMENT, for the images that its open_images(ARGUMENT) opens")
    if not is_text:
        raise ConfigError(f"{option} {path} is no folder, archive or text: give {KINDS}")
    return open_list


# ----------------------------------------------------------------------------------------------------------------------
# Folders


def open_folder(directory: str, suffixes: Sequence[str] = ()) -> NamedImages:
    """The images of a folder: those of its class folders, or where these have none, those in it, without classes."""
    images = open_class_folders(directory, suffixes)
    if len(images):
        return images
    names = sorted(name for name in os.listdir(directory) if not is_hidden(name)
                   and not os.path.isdir(os.path.join(directory, name)))
    bare = NamedImages(directory, [name for name in names if is_chosen(name, suffixes)])
    bare.suffixes, bare.unread = images.suffixes, images.unread + unread_formats(names, suffixes) + Counter(
        suffix for name in names if (suffix := os.path.splitext(name)[1].lower()) in ARCHIVE_SUFFIXES)
    return bare


def open_class_folders(directory: str, suffixes: Sequence[str] = ()) -> NamedImages:
    """The images below the folders in a folder, which are their classes, in torchvision's order.

    Hidden files and folders are left out, and each folder is read once: of links to one folder, or to a class folder,
    one counts; a link to a file is a file of its own. Images beside the class folders are counted.
    """
    classes = class_folders(directory)
    folders = [os.path.join(directory, name) for name in classes]
    # a link below one class that leads to another, or back to the top, adds nothing to it
    visited = {os.path.realpath(folder) for folder in (directory, *folders)}
    names, labels, unread, progress = [], [], Counter(), Progress(f"listing {directory}")
    start = len(os.path.join(directory, ""))
    for label, folder in enumerate(folders):
        paths = list(progress(walk(folder, visited)))
        unread.update(unread_formats(paths, suffixes))
        found = sorted((path for path in paths if is_chosen(path, suffixes)), key=os.path.split)
        names += [path[start:] for path in found]
        labels += [label] * len(found)
    images = NamedImages(directory, names, classes, labels)
    images.unread, images.suffixes = unread, suffixes or images.suffixes
    images.outside = sum(is_chosen(name, suffixes) and not is_hidden(name) and name not in classes
                         for name in os.listdir(directory))
    return images


def class_folders(directory: str) -> list[str]:
    """The folders in a folder, sorted."""
    try:
        with os.scandir(directory) as entries:
            folders = [entry for entry in entries if entry.is_dir() and not is_hidden(entry.name)]
    except OSError as error:
        refuse_folder(error)
    classes, walked = [], {os.path.realpath(directory)}
    for folder in sorted(folders, key=lambda entry: (entry.is_symlink(), entry.name)):  # not a link, if possible
        if (real := os.path.realpath(folder)) not in walked:
            walked.add(real)
            classes.append(folder.name)
    return sorted(classes)


# ----------------------------------------------------------------------------------------------------------------------
# Lists


def open_list(path: str, suffixes: Sequence[str] = ()) -> NamedImages:
    """The images of a text file, a path on each line, below the file's folder unless it begins with /.

    A class may follow the path, behind a tab, a space or a comma; without, the folder is the class.

    Raises:
        ConfigError: a line names a file that is not there, or has no class where others have one.
    """
    folder, listed, unread = os.path.dirname(path), [], Counter()
    folders = {}
    for number, line in enumerate(Progress(f"reading {path}", "lines")(text_lines(path)), 1):
        if line.strip():
            name, label = split_line(line, folder, folders)
            if name is None:
                raise ConfigError(f"{path}, line {number}: there is no file {os.path.join(folder, line.strip())}: "
                                  "correct the line or remove it")
            if listed and (label is None) != (listed[0][1] is None):
                raise ConfigError(f"{path}, line {number}: {'no' if label is None else 'a'} class, unlike the lines "
                                  "before it: give one on every line, or on none")
            if is_hidden(os.path.basename(name)):
                continue
            if is_chosen(name, suffixes):
                listed.append((name, label))
            elif formats := unread_formats([name], suffixes):
                unread.update(formats)
            else:
                raise ConfigError(f"{path}, line {number}: {name} is no image, whose name ends in "
                                  f"{' '.join(IMAGE_SUFFIXES)}: correct the line or remove it")
    images = listed_images(folder, listed, unread)
    images.source, images.suffixes = path, suffixes or images.suffixes
    return images


def text_lines(path: str) -> Iterator[str]:
    try:
        with open(regular(path), encoding="utf-8-sig", errors="surrogateescape") as file:
            for line in file:
                yield line.rstrip("\n")
    except OSError as error:
        raise ConfigError(f"cannot read the list {path} ({error.strerror})") from None


def split_line(line: str, folder: str, folders: dict[str, set[str]]) -> tuple[str | None, str | None]:
    """(path, class) of a line; the class is None if there is none, the path too if there is no such file.

    Args:
        folder: of the list.
        folders: names in each folder listed so far, which is much less work than a look for each file.
    """
    def exists(name: str) -> bool:
        where, base = os.path.split(os.path.join(folder, name))
        if where not in folders:
            try:
                folders[where] = set(os.listdir(where or "."))
            except OSError:
                folders[where] = set()
        return base in folders[where]

    if exists(line):
        return line, None
    line = line.strip()
    for separator in ("\t", " ", ","):
        name, _, label = line.rpartition(separator)
        if name and exists(name.rstrip()):
            return name.rstrip(), label.strip()
    return (line, None) if exists(line) else (None, None)


def listed_images(folder: str, listed: list[tuple[str, str | None]], unread: Counter) -> NamedImages:
    """The images of a list in the order of a folder, whatever that of its lines."""
    paths = [name.removeprefix("./") for name, _ in listed]
    top = common_top(paths)
    names = [path[len(top):] for path in paths]
    order = in_order(names)
    names = [names[i] for i in order]
    classes, labels = number_classes(names)
    if listed and listed[0][1] is not None:
        given = [listed[i][1] for i in order]
        classes = sorted(set(given), key=lambda text: (not text.isdecimal(), len(text) * text.isdecimal(), text))
        numbers = {name: i for i, name in enumerate(classes)}
        labels = [numbers[label] for label in given]
    images = NamedImages(os.path.join(folder, top), names, classes, labels)
    images.unread = unread
    return images
