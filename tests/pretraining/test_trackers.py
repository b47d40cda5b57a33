"""Curves for TensorBoard, wandb and trackio; the last two by stand-ins."""
import sys
from types import ModuleType

import pytest
from small_job import options

from main_selfpatch import train_dino
from selfpatch.errors import ConfigError
from selfpatch.pretraining.trackers import Trackers, check_trackers, chosen_trackers

pytestmark = [pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning"),
              pytest.mark.usefixtures("small_network")]


class Service(ModuleType):
    """What wandb and trackio have in common."""

    def __init__(self, name, fail=()):
        super().__init__(name)
        self.fail, self.calls, self.rows = fail, [], []

    def note(self, name, kwargs):
        if name in self.fail:
            raise RuntimeError(f"{name} failed\nand more")
        self.calls.append((name, kwargs))

    def init(self, **kwargs):
        self.note("init", kwargs)

    def log(self, values, step=None):
        self.note("log", {})
        assert (self.__name__ == "wandb") == (step is None)  # wandb drops steps below the last one
        self.rows.append((values.pop("trained_steps") if step is None else step, values))

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "trained_steps")

    def finish(self):
        self.note("finish", {})


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_gets_every_row_and_knows_a_resumed_run(image_folder, tmp_path, monkeypatch, name):
    words = ["--data_path", image_folder, "--output_dir", tmp_path, "--log_every", 2, "--log_with", name]
    inits = []
    for epochs, steps in ((1, [2, 3, 3]), (2, [5, 6, 6])):  # a row for steps, or for an epoch
        service = Service(name)
        monkeypatch.setitem(sys.modules, name, service)
        train_dino(options("--epochs", epochs, *words))
        assert [step for step, _ in service.rows] == steps and service.calls[-1][0] == "finish"
        assert {"step/loss", "step/lr", "step/gradient_norm"} <= service.rows[0][1].keys()
        assert {"train/loss", "train/clsloss"} <= service.rows[-1][1].keys()
        inits.append(service.calls[0][1])
    assert inits[0]["config"]["out_dim"] == 64 and inits[0]["resume"] == "allow"
    assert inits[0]["name"] == inits[1]["name"] and inits[0].get("id") == inits[1].get("id")
    assert ("id" in inits[0]) == (name == "wandb")


def test_a_service_that_fails_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    service = Service("wandb", fail=["log"])
    monkeypatch.setitem(sys.modules, "wandb", service)
    trackers = Trackers(["wandb"], tmp_path)
    for step in (1, 2):
        trackers.log_step({"step": step, "loss": 1.0})
    trackers.close()
    assert capsys.readouterr().out.count("warning: wandb failed") == 1
    service.fail = ["init"]
    with pytest.raises(ConfigError, match="^--log_with wandb cannot be started: init failed$"):
        Trackers(["wandb"], tmp_path)


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe\0", b"../../etc\n", b"a b", b"x" * 65])
def test_a_damaged_id_is_one_line(tmp_path, monkeypatch, damage):
    monkeypatch.setitem(sys.modules, "wandb", Service("wandb"))
    (tmp_path / "tracker_id.txt").write_bytes(damage)
    with pytest.raises(ConfigError, match="tracker_id.txt holds no name of a run: remove it, and the run gets new"):
        Trackers(["wandb"], tmp_path, step=1)
    Trackers(["wandb"], tmp_path)  # a new run writes its own


def test_tensorboard_is_a_short_form(tmp_path):
    assert chosen_trackers([], True) == ["tensorboard"]
    assert chosen_trackers(["trackio", "tensorboard"], True) == ["trackio", "tensorboard"]
    assert chosen_trackers(options().log_with, options().tensorboard) == []
    (tmp_path / "tensorboard").touch()
    check_trackers([], tmp_path)
    with pytest.raises(ConfigError, match="tensorboard is not a folder"):
        check_trackers(["tensorboard"], tmp_path)


def test_tensorboard_has_steps_beside_epochs(two_epochs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    tags = {}
    for folder in ("tensorboard", "tensorboard/steps"):
        events = EventAccumulator(str(two_epochs / folder)).Reload()
        tags[folder] = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert tags["tensorboard"]["train/loss"] == [0, 1] and tags["tensorboard/steps"]["step/loss"] == [3, 6]
