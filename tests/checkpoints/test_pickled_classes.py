"""What other classes in a checkpoint become, and that nothing of a file runs."""
import argparse
import collections
import copy
import dataclasses
import datetime
import decimal
import enum
import functools
import io
import os
import pathlib
import pickle
import subprocess
import sys
import types
import uuid
import zoneinfo
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode

from selfpatch.checkpoints.files import CheckpointError, read_checkpoint, write_checkpoint
from selfpatch.checkpoints.loading import read_backbone
from selfpatch.checkpoints.pickled_classes import StandIn

STARTED = datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.timezone(datetime.timedelta(hours=1)))


@pytest.mark.parametrize("zipped", [True, False])
def test_plain_values_in_options(tmp_path, zipped):
    args = argparse.Namespace(
        output_dir=pathlib.PosixPath("/x/~"), data=pathlib.PurePosixPath("a/../b"),
        windows=pathlib.PureWindowsPath("C:/d"), started=STARTED, limit=datetime.timedelta(days=2), day=STARTED.date(),
        device=torch.device("cuda", 0), layers={1, 2}, frozen=frozenset("ab"), model=types.SimpleNamespace(depth=3),
        size=torch.Size([2, 3]))
    torch.save({"args": args}, tmp_path / "run.pth", _use_new_zipfile_serialization=zipped)
    assert vars(read_checkpoint(tmp_path / "run.pth")["args"]) == vars(args) | {
        "output_dir": "/x/~", "data": "a/../b", "windows": "C:\\d", "model": argparse.Namespace(depth=3)}


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])  # the second as Python 3.13 writes it
def test_paths_do_not_touch_the_disk(tmp_path, module, monkeypatch):
    class PosixPath:
        def __reduce__(self):
            return PosixPath, ("/", "x")

    PosixPath.__module__, PosixPath.__qualname__ = module, "PosixPath"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, module, types.ModuleType(module))
        sys.modules[module].PosixPath = PosixPath
        torch.save({"path": PosixPath()}, tmp_path / "run.pth")
    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "__new__", None)
        patch.setattr(pathlib.PosixPath, "__init__", None)
        content = read_checkpoint(str(tmp_path / "run.pth"))
    assert content == {"path": "/x"}


class Call:
    """Pickles as a call of the function with arguments."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("call, imported", [
    (Call(Path.touch, Path("made")), "getattr|touch"), (Call(os.path.expanduser, "~"), "expanduser"),
    (Call(range, 10 ** 12), "range"), (Call(eval, "1"), "eval"), (Call(open, "made", "w"), "open")],
    ids=["touch", "expanduser", "range", "eval", "open"])
def test_everything_else_is_refused(tmp_path, monkeypatch, call, imported):
    monkeypatch.chdir(tmp_path)
    torch.save({"args": argparse.Namespace(output_dir=Path("/x"), option=call)}, "evil.pth")
    with pytest.raises(CheckpointError, match=rf"evil.pth is .*({imported})"):
        read_checkpoint("evil.pth")
    assert os.listdir() == ["evil.pth"]


@pytest.mark.parametrize("args", [(1,), (argparse.Namespace(),), ("/", ["x"])])
def test_paths_of_something_else_are_refused(tmp_path, args):
    torch.save({"path": Call(pathlib.PosixPath, *args)}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="evil.pth is corrupt"):
        read_checkpoint(tmp_path / "evil.pth")


def test_arrays(tmp_path):
    torch.save({"a": np.arange(3.0), "b": np.ones((2, 2), np.float16)}, tmp_path / "arrays.pth")
    content = read_checkpoint(tmp_path / "arrays.pth")
    assert np.array_equal(content["a"], np.arange(3.0)) and content["b"].dtype == np.float16


class Attributes(dict):
    """As Lightning's AttributeDict."""


class Steps(list):
    pass


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Config:
    depth: int = 12


Point = collections.namedtuple("Point", "x y")


def load_value(tmp_path, value, zipped=True):
    torch.save({"args": argparse.Namespace(value=value), "a": torch.ones(1)}, tmp_path / "run.pth",
               _use_new_zipfile_serialization=zipped)
    content = read_checkpoint(tmp_path / "run.pth")
    assert torch.equal(content["a"], torch.ones(1))
    return content["args"].value


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("value, text", [
    (decimal.Decimal("1.5"), "decimal.Decimal('1.5')"),
    (InterpolationMode.BICUBIC, "torchvision.transforms.functional.InterpolationMode('bicubic')"),
    (Colour.RED, "test_pickled_classes.Colour(1)"), (Point(1, 2), "test_pickled_classes.Point(1, 2)"),
    (Colour, "test_pickled_classes.Colour"), (int, "builtins.int"), (..., "builtins.Ellipsis"),
    (np.float32, "numpy.float32"), (torch.nn.functional.relu, "torch.nn.functional.relu"),
    (functools.partial(int, 2), "functools.partial(builtins.int)"), (uuid.UUID(int=5), "uuid.UUID()"),
    ({Colour.RED: [Colour.RED]}, "{test_pickled_classes.Colour(1): [test_pickled_classes.Colour(1)]}")])
def test_unknown_classes_become_stand_ins(tmp_path, value, text, zipped):
    assert repr(load_value(tmp_path, value, zipped)) == text


def test_what_stand_ins_keep(tmp_path):
    config = load_value(tmp_path, Attributes(depth=12, paths=[Path("/x")]))
    assert isinstance(config, StandIn) and config.entries == {"depth": 12, "paths": ["/x"]}
    assert load_value(tmp_path, Config(6)).state == {"depth": 6}
    assert load_value(tmp_path, uuid.UUID(int=5)).state["int"] == 5
    assert load_value(tmp_path, Point(1, 2)).args == (1, 2)
    berlin = load_value(tmp_path, datetime.datetime(2026, 1, 2, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")))
    assert berlin.origin == "datetime.datetime" and "Berlin" in repr(berlin)


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 refuses subclasses of list")
def test_a_list_of_another_class(tmp_path):
    steps = load_value(tmp_path, Steps([1, 2]))
    assert isinstance(steps, StandIn) and list(steps) == [1, 2]


def test_containers_and_slices(tmp_path):
    assert load_value(tmp_path, collections.defaultdict(list, a=[1])) == {"a": [1]}
    assert load_value(tmp_path, collections.deque([1, 2], 5)) == [1, 2]
    assert load_value(tmp_path, slice(1, 2)) == slice(1, 2)


def test_options_of_a_class_of_their_own(tmp_path):
    with torch.device("meta"):
        from selfpatch.method.vision_transformer import vit_tiny
        shapes = vit_tiny().state_dict()
    state = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in shapes.items()}
    torch.save({"teacher": state, "args": Attributes(k_num=2)}, tmp_path / "run.pth")
    assert read_backbone(tmp_path / "run.pth")[1].k_num == 2


def test_whole_models_are_named(tmp_path):
    for content, what in ((torch.nn.Linear(1, 1), "contains a whole torch.nn.modules.linear.Linear"),
                          ({"model": torch.nn.Linear(1, 1)}, "has a whole torch.nn.modules.linear.Linear as 'model'")):
        torch.save(content, tmp_path / "model.pth")
        with pytest.raises(CheckpointError, match=f"model.pth {what}.*ask its author for the state_dict"):
            read_backbone(tmp_path / "model.pth")


class Touch:
    """A class of the file's own whose construction is seen."""

    def __init__(self, path):
        Path(path).touch()

    def __reduce__(self):
        return Touch, (str(self.path),)

    def __setstate__(self, state):
        Path(state).touch()


def test_no_code_of_a_known_class_runs(tmp_path):
    """Not even of a class that could be imported."""
    made, value = tmp_path / "made", Touch.__new__(Touch)
    value.path = made
    assert load_value(tmp_path, value).args == (str(made),)
    assert not made.exists()
    torch.load(tmp_path / "run.pth", weights_only=False)
    assert made.exists()


@pytest.mark.parametrize("call, name", [
    (Call(os.system, "touch made"), "posix.system"), (Call(subprocess.Popen, "touch made"), "Popen"),
    (Call(subprocess.getoutput, "touch made"), "getoutput"), (Call(exec, "1"), "exec"),
    (Call(io.open, "made", "w"), "open"), (Call(pickle.loads, b""), "loads"),
    (Call(__import__, "this"), "__import__"), (Call(sys.exit, 3), "sys.exit"),
    (Call(compile, "1", "", "eval"), "compile"), (Call(torch.hub.load, "x", "y"), "torch.hub.load")])
@pytest.mark.parametrize("zipped", [True, False])
def test_dangerous_functions_are_refused(tmp_path, monkeypatch, call, name, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({"args": [Colour.RED, call]}, "evil.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=rf"evil.pth is refused: loading it would import \S*{name}, which could"):
        read_checkpoint("evil.pth")
    assert os.listdir() == ["evil.pth"]


def test_stand_ins_are_no_tensors(tmp_path):
    """A function of torch's that is called with a stand-in gets no code of the file either."""
    for call in (Call(torch._utils._rebuild_tensor_v2, Colour.RED, 0, (1,), (1,), False, collections.OrderedDict()),
                 Call(torch._tensor._rebuild_from_type_v2, Touch, Colour, ("made",), {}),
                 Call(torch.nn.Parameter, Colour.RED)):
        torch.save({"a": call}, tmp_path / "evil.pth")
        with pytest.raises(CheckpointError, match="evil.pth is "):
            read_checkpoint(tmp_path / "evil.pth")
    assert not Path("made").exists()


@pytest.mark.parametrize("call", [
    Call(np.ndarray, (10 ** 13,)), Call(np.zeros(0).__reduce__()[0], np.ndarray, (10 ** 13,), b"b"),
    Call(np.ndarray, (10 ** 7, 10 ** 6), np.dtype("f4"), b"\0" * 4, 0, (0, 0)),
    Call(np.dtype, "O"), Call(np.dtype, "O,f4"), Call(np.dtype, [("a", "f4")]), np.array([None]),
    Call(np.float64(0).__reduce__()[0], np.dtype("f8"), b"123"), Call(np.float64(0).__reduce__()[0], 3, b"")])
def test_arrays_without_their_data(tmp_path, call):
    torch.save({"a": call}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="evil.pth is refused: torch's safe reader reports .*NumPy"):
        read_checkpoint(tmp_path / "evil.pth")


class Spoilt:
    """Pickles as an array whose state is another one."""

    def __init__(self, *state):
        self.state = state

    def __reduce__(self):
        return np.zeros(0).__reduce__()[0], (np.ndarray, (0,), b"b"), self.state


@pytest.mark.parametrize("state", [
    (1, (10 ** 13,), np.dtype("f4"), False, b"1234"), (1, (10 ** 10, 10 ** 10), np.dtype("f4"), False, b""),
    (1, (-1,), np.dtype("f4"), False, b"1234"), (1, (1,), np.dtype("f4"), False, [None]), (1, 5, 6, 7, 8)])
def test_arrays_whose_data_do_not_fit(tmp_path, state):
    torch.save({"a": Spoilt(*state)}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="whose data are not of its shape"):
        read_checkpoint(tmp_path / "evil.pth")


@pytest.mark.parametrize("array", [
    np.arange(6, dtype=">i2").reshape(2, 3), np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.zeros((0, 3)),
    np.array(["text", ""]), np.array([True]), np.array(["2026-01-02"], "M8[D]"), np.arange(2, dtype="m8[25us]"),
    np.array(5), np.array([1 + 2j]), np.array([b"a"])], ids=str)
def test_arrays_of_all_types(tmp_path, array):
    found = load_value(tmp_path, array)
    assert found.dtype == array.dtype.newbyteorder("=") and found.shape == array.shape and np.array_equal(found, array)
    write_checkpoint({"a": found, "b": copy.deepcopy(found)[:1] if found.ndim else found}, tmp_path / "again.pth")
    plain = torch.load(tmp_path / "again.pth", weights_only=False)["a"]
    assert type(plain) is np.ndarray and np.array_equal(plain, array)


@pytest.mark.parametrize("number", [
    np.float64(0.5), np.int8(-3), np.bool_(True), np.str_("a"), np.str_(""), np.datetime64("2026-01-02"),
    np.timedelta64(3, "s"), np.complex64(1j), np.longdouble(2)], ids=repr)
def test_numbers_of_all_types(tmp_path, number):
    found = load_value(tmp_path, number)
    assert found == number and type(found) is type(number)


def test_states_of_random_generators(tmp_path):
    state = np.random.RandomState(3).get_state()
    torch.save({"state": state}, tmp_path / "run.pth")
    generator = np.random.RandomState(4)
    generator.set_state(read_checkpoint(tmp_path / "run.pth")["state"])
    assert generator.rand() == np.random.RandomState(3).rand()


def test_out_of_memory_is_one_line(tmp_path, monkeypatch):
    def full(*_, **__):
        raise MemoryError

    torch.save({}, tmp_path / "run.pth")
    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(CheckpointError, match="run.pth needs more memory than there is"):
        read_checkpoint(tmp_path / "run.pth")
