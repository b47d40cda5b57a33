"""Results of an evaluation: a printed table, and a JSON file that is written whole and replaces none unasked."""
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from selfpatch.errors import ConfigError
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
