"""What takes the place of the classes and functions that a checkpoint's pickle names; nothing of the file runs.

torch's safe reader knows tensors and plain containers. Here are, in addition, argparse's Namespace, dates, paths as
strings, NumPy's arrays and scalars, and for a class that nobody knows a StandIn, which keeps its arguments.
"""
import _compat_pickle  # the names of Python 2, in which protocol 2 is written
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

# Files that name anything of these modules are refused: nothing in them belongs into a checkpoint
REFUSED_MODULES = {
    "_io", "_pickle", "asyncio", "builtins", "code", "codeop", "commands", "ctypes", "glob",
    "http", "importlib", "io", "marshal", "multiprocessing", "nt", "ntpath", "operator", "os", "pathlib", "pickle",
    "platform", "posix", "posixpath", "pty", "requests", "runpy", "shutil", "signal", "socket", "subprocess", "sys",
    "tempfile", "threading", "timeit", "types", "urllib", "webbrowser"}
PLAIN_BUILTINS = {f"builtins.{name}" for name in ("bool", "complex", "dict", "float", "int", "list", "object",
                                                  "slice", "str", "tuple", "type", "Ellipsis", "NotImplemented")}


# ---------------------------------------------------------------- classes that nobody knows

class _FilledLikeADict(type):
    """The type of StandIns. torch's reader fills only objects whose type is dict, OrderedDict or Counter, and calls
    only classes that are in a list; a class equal to one of these is filled, by its own __setitem__, and called too."""

    def __eq__(cls, other):
        return other is OrderedDict or type.__eq__(cls, other)

    __hash__ = type.__hash__

    def __repr__(cls):
        return cls.origin


class StandIn(list, metaclass=_FilledLikeADict):
    """An object of an unknown class: inert, with what the file has of it. Items of a list are its own.

    Attributes:
        origin: the class or function, as module.name.
        args: what it would have been called with.
        entries: items, if it is a dictionary.
        state: what its attributes would have been set from.
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
    """StandIns for the classes and functions that a file of torch.save names, but not for those that are refused.

    Args:
        known: names that need none.
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
    """What the pickles in a file name as module.name, each as it stands there and as Python 3 calls it."""
    found = []
    with contextlib.suppress(Exception), contextlib.ExitStack() as stack:  # damage is found when the file is loaded
        if zipfile.is_zipfile(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
            files = [stack.enter_context(archive.open(name)) for name in archive.namelist()
                     if name.endswith("/data.pkl")]
        else:  # four pickles of torch before 1.6, one after another: two numbers, a dictionary, and the content
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
    """Replaces mmengine's HistoryBuffer, which its training checkpoints contain but this project does not need."""


def placeholder_getattr(cls: type, name: str) -> str | type:
    """Replaces getattr, by which those checkpoints name the methods of a history, and others the members of a class."""
    if isinstance(cls, _FilledLikeADict):
        return make_stand_in(f"{cls.origin}.{name}")
    if cls is not HistoryPlaceholder:
        owner = getattr(cls, "__name__", cls)
        raise pickle.UnpicklingError(f"it requires {name} of {owner}, which no checkpoint needs")
    return name


def posix_path(*parts: str) -> str:
    """Replaces pathlib's classes: the path as a string, joined without a look at the disk."""
    return str(PurePosixPath(*parts))


def windows_path(*parts: str) -> str:
    """As posix_path, for a run on Windows."""
    return str(PureWindowsPath(*parts))


def date_and_time(*args) -> datetime.datetime | StandIn:
    """Replaces datetime, whose time zone may be of another library."""
    try:
        return datetime.datetime(*args)
    except TypeError:
        return make_stand_in("datetime.datetime")(*args)


def plain_dict(*_) -> dict:
    """Replaces defaultdict, whose items follow."""
    return {}


def plain_list(*_) -> list:
    """Replaces deque, whose items follow."""
    return []


def no_bytes() -> bytes:
    """Replaces bytes, which is called for those of length 0 alone."""
    return b""


# ---------------------------------------------------------------- NumPy

class DType:
    """Replaces numpy.dtype: numbers, texts or times. NumPy itself would take flags from a file that it must not."""

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
    """Replaces numpy.ndarray: an array of exactly the bytes that the file has for it."""

    def __new__(cls, *_):
        raise pickle.UnpicklingError("it requires a NumPy array without its data")

    def __setstate__(self, state: tuple):
        _, shape, dtype, fortran_order, data = state
        if not (isinstance(dtype, DType) and isinstance(data, bytes) and isinstance(shape, tuple)
                and math.prod(shape) * dtype.numpy.itemsize == len(data)):
            raise pickle.UnpicklingError("it has a NumPy array whose data are not of its shape")
        super().__setstate__((1, shape, dtype.numpy, bool(fortran_order), data))

    def __reduce__(self):
        return self.view(np.ndarray).__reduce__()  # written as what it is


def new_array(subtype: type, shape: tuple, code: bytes) -> Array:
    """Replaces numpy.core.multiarray._reconstruct, which makes an array of no elements; its shape and data follow."""
    if shape != (0,):
        raise pickle.UnpicklingError("it requires a NumPy array without its data")
    return np.ndarray.__new__(Array, shape)


def numpy_scalar(dtype: DType, data: bytes = b"") -> np.generic:
    """Replaces numpy.core.multiarray.scalar: the published training loop stores np.float64 learning rates."""
    if not isinstance(dtype, DType) or not isinstance(data, bytes) or len(data) != dtype.numpy.itemsize:
        raise pickle.UnpicklingError("it has a NumPy number whose data are not of its type")
    return np.frombuffer(data, dtype.numpy)[0] if data else dtype.numpy.type()


# ----------------------------------------------------------------

PLACEHOLDERS = [(HistoryPlaceholder, "mmengine.logging.history_buffer.HistoryBuffer"),
                (placeholder_getattr, "builtins.getattr"), (no_bytes, "builtins.bytes"),
                (plain_dict, "collections.defaultdict"), (plain_list, "collections.deque"),
                (date_and_time, "datetime.datetime"), (Array, "numpy.ndarray"), (DType, "numpy.dtype"),
                *((function, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core")
                  for function, name in ((new_array, "_reconstruct"), (numpy_scalar, "scalar"))),
                # pathlib._local is where Python 3.13 defines them
                *((posix_path, f"{module}.{name}") for module in ("pathlib", "pathlib._local")
                  for name in ("Path", "PosixPath", "PurePath", "PurePosixPath")),
                *((windows_path, f"{module}.{name}") for module in ("pathlib", "pathlib._local")
                  for name in ("WindowsPath", "PureWindowsPath")),
                (argparse.Namespace, "types.SimpleNamespace")]


def name_of(entry: type | tuple) -> str:
    return entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}"


def allowed_classes() -> list:
    """Classes and functions that read_checkpoint may load.

    Those that the program has registered with torch.serialization, such as mmengine's real HistoryBuffer, take
    precedence over the placeholders.
    """
    registered = set(map(name_of, torch.serialization.get_safe_globals()))
    return ALLOWED_CLASSES + [entry for entry in PLACEHOLDERS if entry[1] not in registered]
