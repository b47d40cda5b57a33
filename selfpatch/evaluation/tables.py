"""Results of an evaluation: a printed table, and a JSON file that is written whole and replaces none unasked.

And the table that it may begin with, the labels of test images.
"""
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from selfpatch.data.names import in_order
from selfpatch.data.sources import text_lines
from selfpatch.errors import ConfigError, warn
from selfpatch.whole_files import whole_file


def tell_apart(names: Sequence[str], taken: Iterable[str] = ()) -> list[str]:
    """The names in their order, all different: a repeated or taken one gets " (2)", " (3)", … appended.

    A name that is given once and not taken stays unchanged.
    """
    used, given, found = set(taken), set(names), []
    for name in names:
        number, unique = 1, name
        while unique in used or number > 1 and unique in given:
            number += 1
            unique = f"{name} ({number})"
        used.add(unique)
        found.append(unique)
    return found


def folder_names(names: Sequence[str]) -> list[str]:
    """Names of folders for the rows of a table, side by side in one folder: no separators, and neither . nor .."""
    plain = [name.replace(os.sep, "_") for name in names]
    return tell_apart(["backbone" if name in ("", os.curdir, os.pardir) else name for name in plain])


def unique_names(paths: Sequence[str | Path]) -> list[str]:
    """A name for each image: its relative path without the suffix, or with it if another image differs only there.

    Names that are still equal get numbers (see tell_apart). Leading / and .. are removed, so that no name
    points outside its folder.
    """
    plain = [PurePosixPath(*(part for part in PurePosixPath(path).parts if part not in ("/", ".."))) for path in paths]
    names = [str(path.with_suffix("")) for path in plain]
    count = Counter(names)
    return tell_apart([name if count[name] == 1 else str(path) for name, path in zip(names, plain, strict=True)])


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their longest cell, the first aligned left and the others right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [[cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in
              enumerate(zip(row, widths, strict=True))] for row in (header, *rows)]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def check_output(output: str | Path | None, overwrite: bool, option: str = "--output") -> None:
    """Check before long work that a result can be written.

    Raises:
        ConfigError: the file exists and overwrite is False, or its folder does not exist or cannot be written to.
    """
    if not output:
        return
    path = Path(output)
    odd = path.exists() and not path.is_file()  # a folder, pipe or device is never replaced
    if odd or os.path.lexists(path) and not overwrite:
        raise ConfigError(f"{option} {path} exists: give another name" + ("" if odd else ", or --overwrite"))
    if not path.parent.is_dir():
        raise ConfigError(f"{option} {path}: {path.parent} is not a folder, create it first")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{option} {path}: {path.parent} cannot be written to")


def write_json(content: object, output: str | Path) -> None:
    """Write a JSON file whole or not at all, and print its name.

    Raises:
        WriteError: the disk is full or cannot be written.
    """
    path = Path(output)
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {path}")


# ---------------------------------------------------------------- files of labels

def read_labels(path: str | Path, names: list[str], classes: list[str], one_order: bool = True) -> list[int]:
    """The class of each image, by a file with a line "name label" for each, or a label alone for each in their order.

    A name may lack its suffix and its folders, and may come last; separators are tabs, commas and spaces. A label is
    the name of a class, or its number, 0 being the first in sorted order, unless names of classes are numbers. Lines
    about other images are skipped, hence a header, too.

    Args:
        one_order: the images have no order but that of their names, such as that of the lines of a list.

    Raises:
        ConfigError: an image has no label or two, a label is no class, or labels alone may be in another order.
    """
    lines = [line.strip() for line in text_lines(str(path)) if line.strip()]
    labels = named_labels(lines, names)
    if alone := not labels and len(lines) == len(names):
        padded = [re.sub("[0-9]+", lambda number: number[0].zfill(20), name) for name in names]
        if not one_order or in_order(padded) != list(range(len(names))):
            raise ConfigError(f"the labels {path} are without names, and the images have more than one order (that of "
                              "a list or data set, or 2.jpg before 10.jpg): give a line \"name label\" for each")
        labels = list(enumerate(lines))
    if missing := sorted(set(range(len(names))) - {image for image, _ in labels}):
        raise ConfigError(f"the labels {path} have {len(lines)} lines, and no label for {len(missing)} of {len(names)} "
                          f"images, such as {names[missing[0]]}: give a line \"name label\" for each, or a label for "
                          "each in the order of their names")
    known, found = class_numbers(path, {label for _, label in labels}, classes, alone), {}
    for image, label in labels:
        if label not in known:
            raise ConfigError(f"the labels {path} give {names[image]} the class {label}, which is neither one of the "
                              f"{len(classes)} classes of the training images nor a number from 0 to {len(classes) - 1}"
                              ", its place among them where their names are no numbers (ILSVRC's own numbers are in "
                              "another order)")
        if found.setdefault(image, known[label]) != known[label]:
            raise ConfigError(f"the labels {path} give {names[image]} two classes, {classes[found[image]]} and "
                              f"{classes[known[label]]}: remove one of the lines")
    return [found[image] for image in range(len(names))]


def named_labels(lines: list[str], names: list[str]) -> list[tuple[int, str]]:
    """(image, label) of lines "name label", or "label name" where that fits more lines; other lines are skipped."""
    bases, numbers = [os.path.basename(name) for name in names], {}
    for cut in (lambda name: os.path.splitext(name)[0], str):
        for way in (names, bases) if len(set(bases)) == len(names) else (names,):
            numbers |= {cut(name): i for i, name in enumerate(way)}

    def pair(line: str, first: bool) -> tuple[int, str] | None:
        parts = [cut(separator)[::1 if first else -1] for cut in (line.partition, line.rpartition)
                 for separator in "\t, "]
        fits = [(name.strip(), label.strip()) for name, _, label in parts if label and name.strip() in numbers]
        name, label = max(fits, key=lambda one: len(one[0]), default=("", ""))  # a name may have spaces in it
        return (numbers[name], label) if fits else None

    return max(([found for line in lines if (found := pair(line, first))] for first in (True, False)), key=len)


def class_numbers(path: str | Path, labels: set[str], classes: list[str], alone: bool) -> dict[str, int]:
    """The classes of labels, by their names, or by numbers where all labels are; labels of no class are left out."""
    known = {name: i for i, name in enumerate(classes)}
    # as in Kaggle's LOC_val_solution.csv, where boxes follow
    words = {label: label if alone or label in known else label.split()[0] for label in labels}
    if all(map(str.isdecimal, words.values())) and not any(map(str.isdecimal, classes)):
        known = {str(i): i for i in range(len(classes))}
        if "0" not in words.values():
            warn(f"the labels {path} have no 0, which is the first class, {classes[0]}: if they count from 1, all "
                 "classes are wrong")
    return {label: known[word] for label, word in words.items() if word in known}
