"""Inert replacements for the classes and functions that a checkpoint's pickle names; nothing of the file runs.

torch's safe reader handles tensors and plain containers. This module adds argparse's Namespace, dates, paths (as
strings), NumPy arrays and scalars, and StandIn for every unknown class.
"""
import _compat_pickle  # protocol 2 uses the names of Python 2
import argparse
import contextlib
import datetime
import math
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import torch

ALLOWED_CLASSES = [argparse.Namespace, frozenset, datetime.date, datetime.time, datetime.timedelta,
                   datetime.timezone, slice]

# Files that name anything of these modules are refused: no checkpoint needs them
REFUSED_MODULES = {
    "_io", "_pickle", "asyncio", "builtins", "code", "codeop", "commands", "ctypes", "glob",
    "http", "importlib", "io", "marshal", "multiprocessing", "nt", "ntpath", "operator", "os", "pathlib", "pickle",
    "platform", "posix", "posixpath", "pty", "requests", "runpy", "shutil", "signal", "socket", "subprocess", "sys",
    "tempfile", "threading", "timeit", "types", "urllib", "webbrowser"}
PLAIN_BUILTINS = {f"builtins.{name}" for name in ("bool", "complex", "dict", "float", "int", "list", "object",
                                                  "slice", "str", "tuple", "type", "Ellipsis", "NotImplemented")}


# ---------------------------------------------------------------- unknown classes

class _FilledLikeADict(type):
    """Metaclass that makes torch's reader accept StandIns.

    The reader sets items only of dict, OrderedDict and Counter, and calls only listed classes. A class that equals
    OrderedDict passes both checks, and its own __setitem__ receives the items.
    """

    def __eq__(cls, other):
        return other is OrderedDict or type.__eq__(cls, other)

    __hash__ = type.__hash__

    def __repr__(cls):
        return cls.origin


class StandIn(list, metaclass=_FilledLikeADict):
    """An inert object of an unknown class, with the data that the file has for it; a list holds its own items.

    Attributes:
        origin: the class or function, as module.name.
        args: its arguments.
        entries: its items, if it is a dictionary.
        state: the argument of its __setstate__.
    """
    origin = ""

    def __new__(cls, *args):
        self = list.__new__(cls)
        self.args, self.entries, self.state = args, {}, None
        return self

    def __init__(self, *args):
        super().__init__()

    def __setitem__(self, key, value):
        self.entries[key] = value

    def __setstate__(self, state):
        self.state = state

    __eq__, __hash__ = object.__eq__, object.__hash__  # it may be the key of a dictionary

    def __repr__(self):
        return f"{self.origin}({', '.join(map(repr, self.args))})"


def make_stand_in(origin: str) -> type:
    return _FilledLikeADict("StandIn", (StandIn,), {"origin": origin})


def stand_ins(path: str | Path, known: set[str]) -> list[tuple[type, str]]:
    """Make StandIns for the classes and functions that a file of torch.save names, except refused ones.

    Args:
        known: names that need no StandIn.
    """
    found = []
    for names in imported_names(path):
        if not any(is_refused(name) for name in names):
            found += [(make_stand_in(name), name) for name in names - known]
    return found


def is_refused(name: str) -> bool:
    module = name.split(".")[0]
    return module in REFUSED_MODULES and name not in PLAIN_BUILTINS or name.startswith(("torch.hub.", "torch.jit."))


def imported_names(path: str | Path) -> list[set[str]]:
    """List each class or function that a file's pickles name, as written there and as Python 3 calls it."""
    found = []
    with contextlib.suppress(Exception), contextlib.ExitStack() as stack:  # loading reports damage
        if zipfile.is_zipfile(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
            files = [stack.enter_context(archive.open(name)) for name in archive.namelist()
                     if name.endswith("/data.pkl")]
        else:  # torch before 1.6: four pickles in a row (two numbers, a dictionary, the content)
            files = [stack.enter_context(open(path, "rb"))] * 4
        for file in files:
            for operation, text, _ in pickletools.genops(file):
                if operation.name == "GLOBAL":
                    module, name = text.split(" ", 1)
                    mapped = _compat_pickle.NAME_MAPPING.get(
                        (module, name), (_compat_pickle.IMPORT_MAPPING.get(module, module), name))
                    found.append({f"{module}.{name}", ".".join(mapped)})
    return found


# ---------------------------------------------------------------- mmengine, paths and containers

class HistoryPlaceholder:
    """Replaces mmengine's HistoryBuffer, which its checkpoints contain and nobody here needs."""


def placeholder_getattr(cls: type, name: str) -> str | type:
    """Replaces getattr, by which mmengine names methods of HistoryBuffer and others name class members."""
    if isinstance(cls, _FilledLikeADict):
        return make_stand_in(f"{cls.origin}.{name}")
    if cls is not HistoryPlaceholder:
        owner = getattr(cls, "__name__", cls)
        raise pickle.UnpicklingError(f"it requires {name} of {owner}, which no checkpoint needs")
    return name


def posix_path(*parts: str) -> str:
    """Replaces pathlib's classes by a string, without touching the disk."""
    return str(PurePosixPath(*parts))


def windows_path(*parts: str) -> str:
    """posix_path for runs on Windows."""
    return str(PureWindowsPath(*parts))


def date_and_time(*args) -> datetime.datetime | StandIn:
    """Replaces datetime; a time zone of another library makes it a StandIn."""
    try:
        return datetime.datetime(*args)
    except TypeError:
        return make_stand_in("datetime.datetime")(*args)


def plain_dict(*_) -> dict:
    """Replaces defaultdict; the reader adds the items."""
    return {}


def plain_list(*_) -> list:
    """Replaces deque; the reader adds the items."""
    return []


def no_bytes() -> bytes:
    """Replaces bytes, which pickle calls only for b""."""
    return b""


# ---------------------------------------------------------------- NumPy

class DType:
    """Replaces numpy.dtype for numbers, texts and times; NumPy itself would accept dangerous flags from the file."""

    def __init__(self, code: str, *_):
        if not isinstance(code, str) or not re.fullmatch(r"[?biufcSUMm]\d{0,9}", code):
            raise pickle.UnpicklingError(f"it has NumPy values of type {str(code)!r}, not of numbers or text")
        self.numpy = np.dtype(code)

    def __setstate__(self, state: tuple):
        self.numpy = self.numpy.newbyteorder(state[1])
        if self.numpy.kind in "Mm" and len(state) > 8:
            unit, number = state[8][1][:2]
            unit = unit.decode() if isinstance(unit, bytes) else unit
            self.numpy = np.dtype(f"{self.numpy.str}[{int(number)}{unit}]")

    def __repr__(self):
        return repr(self.numpy)


class Array(np.ndarray):
    """Replaces numpy.ndarray; its size must match the bytes in the file."""

    def __new__(cls, *_):
        raise pickle.UnpicklingError("it requires a NumPy array without its data")

    def __setstate__(self, state: tuple):
        _, shape, dtype, fortran_order, data = state
        if not (isinstance(dtype, DType) and isinstance(data, bytes) and isinstance(shape, tuple)
                and math.prod(shape) * dtype.numpy.itemsize == len(data)):
            raise pickle.UnpicklingError("it has a NumPy array whose data are not of its shape")
        super().__setstate__((1, shape, dtype.numpy, bool(fortran_order), data))

    def __reduce__(self):
        return self.view(np.ndarray).__reduce__()  # pickled as a plain array


def new_array(subtype: type, shape: tuple, code: bytes) -> Array:
    """Replaces numpy.core.multiarray._reconstruct: an empty array; __setstate__ sets shape and data."""
    if shape != (0,):
        raise pickle.UnpicklingError("it requires a NumPy array without its data")
    return np.ndarray.__new__(Array, shape)


def numpy_scalar(dtype: DType, data: bytes = b"") -> np.generic:
    """Replaces numpy.core.multiarray.scalar, e.g. for the learning rates that the published training loop stores."""
    if not isinstance(dtype, DType) or not isinstance(data, bytes) or len(data) != dtype.numpy.itemsize:
        raise pickle.UnpicklingError("it has a NumPy number whose data are not of its type")
    return np.frombuffer(data, dtype.numpy)[0] if data else dtype.numpy.type()


# ---------------------------------------------------------------- the tables

PLACEHOLDERS = [(HistoryPlaceholder, "mmengine.logging.history_buffer.HistoryBuffer"),
                (placeholder_getattr, "builtins.getattr"), (no_bytes, "builtins.bytes"),
                (plain_dict, "collections.defaultdict"), (plain_list, "collections.deque"),
                (date_and_time, "datetime.datetime"), (Array, "numpy.ndarray"), (DType, "numpy.dtype"),
                *((function, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core")
                  for function, name in ((new_array, "_reconstruct"), (numpy_scalar, "scalar"))),
                # Python 3.13 defines them in pathlib._local
                *((posix_path, f"{module}.{name}") for module in ("pathlib", "pathlib._local")
                  for name in ("Path", "PosixPath", "PurePath", "PurePosixPath")),
                *((windows_path, f"{module}.{name}") for module in ("pathlib", "pathlib._local")
                  for name in ("WindowsPath", "PureWindowsPath")),
                (argparse.Namespace, "types.SimpleNamespace")]


def name_of(entry: type | tuple) -> str:
    return entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}"


def allowed_classes() -> list:
    """List the classes and functions that read_checkpoint may call.

    Classes registered with torch.serialization, such as mmengine's real HistoryBuffer, take precedence over the
    placeholders.
    """
    registered = set(map(name_of, torch.serialization.get_safe_globals()))
    return ALLOWED_CLASSES + [entry for entry in PLACEHOLDERS if entry[1] not in registered]
