"""Where training images come from: --data_path in all its kinds, each as a NamedImages.

    folder               with class folders or without, nested as deep as it is
    list.txt             a text file with the path of an image on each line, a class behind it or not
    a.zip b.tar          one or several archives, read in place (archives.py)
    hf:NAME              a data set of Hugging Face or a local one of that kind (hub.py)
    mine.py:ARGUMENT     anything else: what the function open_images(ARGUMENT) of that file opens
"""
import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from selfpatch.data.archives import ARCHIVE_SUFFIXES, COMPRESSED_TARS, ArchiveImages, open_index
from selfpatch.data.files import (
    IMAGE_SUFFIXES,
    UnreadableImage,
    is_hidden,
    is_image_name,
    refuse_folder,
    unread_formats,
    walk,
)
from selfpatch.data.hub import HubImages, split_of
from selfpatch.data.names import NamedImages, Progress, common_top, in_order, number_classes
from selfpatch.errors import ConfigError

KINDS = "a folder of images, a text file of their paths, .zip or .tar archives, hf:NAME, or FILE.py:ARGUMENT"


def open_images(paths: str | Path | list[str], option: str = "--data_path") -> NamedImages:
    """The images that a path stands for, or several archives together.

    Raises:
        ConfigError: there are none, or they cannot be read; the message names the option.
    """
    opens, paths = check_paths(paths, option), as_list(paths)
    images = opens(paths) if opens is ArchiveImages else opens(paths[0])
    if not len(images):
        reason = images.unread_summary() or f"files ending in {' '.join(IMAGE_SUFFIXES)}"
        if any(images.unread[suffix] for suffix in ARCHIVE_SUFFIXES):
            reason += "; give the archives in it themselves" + ", unpacked from this one" * (opens is ArchiveImages)
        raise ConfigError(f"{option} {images.source} has no images in it: {reason}")
    return images


def prepare(paths: str | Path | list[str]) -> None:
    """Index archives, and load a data set into its cache, so that other processes find them there."""
    opens = check_paths(paths)
    for path in as_list(paths):
        if opens is ArchiveImages:
            open_index(path)
        elif opens is HubImages:
            HubImages(path)


def as_list(paths: str | Path | list[str]) -> list[str]:
    return [str(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]


def absolute(path: str) -> str:
    """The path for a process that starts in another folder; names of data sets stay as they are."""
    if path.startswith("hf:"):
        start, mark, rest = path.removeprefix("hf:").partition(":")
        local = os.path.expanduser(start)
        return f"hf:{os.path.abspath(local)}{mark}{rest}" if os.path.exists(local) else path
    file, mark, argument = path.partition(".py:")
    return f"{os.path.abspath(file)}{mark}{argument}"


def check_paths(paths: str | Path | list[str], option: str = "--data_path") -> Callable[..., NamedImages]:
    """What opens the paths, found without reading more than the beginning of a file.

    Raises:
        ConfigError: one of them is not there, or is none of the kinds; or there are several that are no archives.
    """
    paths = as_list(paths)
    kinds = [kind_of(path, option) for path in paths]
    if len(paths) > 1 and set(kinds) != {ArchiveImages}:
        other = next(path for path, kind in zip(paths, kinds, strict=True) if kind is not ArchiveImages)
        raise ConfigError(f"{option} {other}: of several values each must be a .zip or .tar archive; give one folder, "
                          "list or data set")
    return kinds[0]


def kind_of(path: str, option: str) -> Callable[..., NamedImages]:
    if path.startswith("hf:"):
        split_of(path)
        return HubImages
    if ".py:" in path:
        return OwnImages
    if os.path.isdir(path):
        return open_folder
    if not os.path.exists(path):
        raise ConfigError(f"there is no folder {path}, and no file of that name: give {option} {KINDS}")
    if path.lower().endswith(ARCHIVE_SUFFIXES):
        return ArchiveImages
    if path.lower().endswith(COMPRESSED_TARS):
        raise ConfigError(f"{option} {path} is compressed as a whole, so that no image in it can be read by itself: "
                          "decompress it (gunzip, bunzip2, unxz or unzstd) and give the .tar")
    if not is_text(path):
        raise ConfigError(f"{option} {path} is no folder, archive or text: give {KINDS}")
    return open_list


def is_text(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return b"\0" not in file.read(4096) and not is_image_name(path)
    except OSError as error:
        raise ConfigError(f"cannot read {path} ({error.strerror})") from None


# ----------------------------------------------------------------------------------------------------------------------
# Folders


def open_folder(directory: str) -> NamedImages:
    """The images of a folder: those of its class folders, or where these have none, those in it, without classes."""
    images = open_class_folders(directory)
    if len(images):
        return images
    names = sorted(name for name in os.listdir(directory) if not is_hidden(name)
                   and not os.path.isdir(os.path.join(directory, name)))
    bare = NamedImages(directory, filter(is_image_name, names))
    bare.unread = images.unread + unread_formats(names) + Counter(
        suffix for name in names if (suffix := os.path.splitext(name)[1].lower()) in ARCHIVE_SUFFIXES)
    return bare


def open_class_folders(directory: str) -> NamedImages:
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
        unread.update(unread_formats(paths))
        found = sorted(filter(is_image_name, paths), key=os.path.split)
        names += [path[start:] for path in found]
        labels += [label] * len(found)
    images = NamedImages(directory, names, classes, labels)
    images.unread = unread
    images.outside = sum(is_image_name(name) and not is_hidden(name) for name in os.listdir(directory))
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


def open_list(path: str) -> NamedImages:
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
            if is_image_name(name):
                listed.append((name, label))
            elif formats := unread_formats([name]):
                unread.update(formats)
            else:
                raise ConfigError(f"{path}, line {number}: {name} is no image, whose name ends in "
                                  f"{' '.join(IMAGE_SUFFIXES)}: correct the line or remove it")
    images = listed_images(folder, listed, unread)
    images.source = path
    return images


def text_lines(path: str) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
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


# ----------------------------------------------------------------------------------------------------------------------
# Anything else


class OwnImages(NamedImages):
    """Images that a function of the user's opens: FILE.py:ARGUMENT calls open_images(ARGUMENT) of that file.

    The function returns the names of the images and a function from a name to the bytes of an image file. It is called
    again in worker processes that are started anew instead of forked.
    """

    def __init__(self, path: str):
        file, argument = path.split(".py:", 1)
        self.file, self.argument = f"{file}.py", argument
        names, self.read_name = self.call()
        names = list(names)
        order = in_order(names)
        names = [names[i] for i in order]
        super().__init__(path, names, *number_classes(names))

    def call(self) -> tuple[Iterable[str], Callable[[str], bytes]]:
        if not os.path.isfile(self.file):
            raise ConfigError(f"there is no file {self.file}, which should have a function open_images")
        specification = importlib.util.spec_from_file_location("own_images", self.file)
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        if not callable(function := getattr(module, "open_images", None)):
            raise ConfigError(f"{self.file} has no function open_images(argument) that returns names, and a function "
                              "from a name to bytes")
        return function(self.argument)

    def location(self, index: int) -> str:
        return f"{self.root}: {self.names[index]}"

    def read(self, index: int) -> bytes:
        self.read_name = self.read_name or self.call()[1]
        try:
            return self.read_name(self.names[index])
        except Exception as error:  # whatever the function raises is about this image
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UnreadableImage(f"cannot read the image {self.location(index)} ({reason})") from None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"read_name": None}
