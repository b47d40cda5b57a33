"""Schedules and LARS against the published figures; clipping, freezing, logging, safe files, errors."""
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from golden_rules import load, rand
from networks import small_wrapper
from torch import nn

import selfpatch_head
import utils
import vision_transformer
from selfpatch.errors import ConfigError
from selfpatch.method.losses import DINOLoss
from selfpatch.method.optim import update_teacher
from selfpatch.method.schedules import cosine_schedule
from selfpatch.whole_files import WriteError


def test_names_that_users_of_dino_import():
    for name in ("cosine_scheduler get_params_groups clip_gradients cancel_gradients_last_layer LARS MetricLogger "
                 "SmoothedValue bool_flag fix_random_seeds init_distributed_mode get_rank get_world_size "
                 "is_main_process save_on_master restart_from_checkpoint").split():
        assert callable(getattr(utils, name))
    assert vision_transformer.__dict__["vit_small"]().embed_dim == 384


@pytest.mark.parametrize("module, build", [
    (vision_transformer, lambda: vision_transformer.vit_pico()),
    (vision_transformer, lambda: vision_transformer.DINOHead(8, 4, hidden_dim=8, bottleneck_dim=4)),
    (selfpatch_head, lambda: selfpatch_head.SelfPatchHead(6, 3)), (selfpatch_head, small_wrapper)])
def test_networks_pickled_under_the_names_of_the_root_load(monkeypatch, module, build):
    """As in a file of torch.save(model), where the pickle names vision_transformer.VisionTransformer."""
    network = build()
    with monkeypatch.context() as patch:
        for cls in {type(part) for part in network.modules() if type(part).__module__.startswith("selfpatch.")}:
            patch.setattr(cls, "__module__", cls.__module__.rpartition(".")[2])
        data = pickle.dumps(network)
    assert b"selfpatch." not in data
    assert f"{module.__name__}".encode() in data
    loaded = pickle.loads(data)
    assert type(loaded) is type(network)
    for ours, theirs in zip(loaded.parameters(), network.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_golden_schedules():
    golden = load("schedules.npz")
    for key, schedule in {
            "lr": utils.cosine_scheduler(0.002, 1e-6, 10, 7, warmup_epochs=3),
            "wd": utils.cosine_scheduler(0.04, 0.4, 10, 7),
            "momentum": utils.cosine_scheduler(0.996, 1, 10, 7),
            "teacher_temp": [DINOLoss(8, 8, 4, 0.04, 0.07, 3, 10).teacher_temp(i) for i in range(10)]}.items():
        np.testing.assert_allclose(schedule, golden[key], rtol=1e-12, atol=1e-15, err_msg=key)


def test_schedules_are_plain_floats():
    """The optimizer's state keeps them, and weights_only loading refuses numpy's."""
    schedule = cosine_schedule(np.float64(1), 0, steps=10, warmup_steps=3)
    assert all(type(schedule(step)) is float for step in range(10))


def test_warmup_as_long_as_the_run():
    np.testing.assert_allclose(utils.cosine_scheduler(1.0, 0.0, 2, 3, warmup_epochs=2), np.linspace(0, 1, 6))


def test_golden_lars():
    golden = load("lars.npz")
    salt = golden["salt"]
    params = [nn.Parameter(rand(7, 5, 4, salt=salt)), nn.Parameter(rand(8, 6, salt=salt))]
    optimizer = utils.LARS(params, lr=0.3, weight_decay=0.1)
    for i in range(3):
        for j, p in enumerate(params):
            p.grad = rand(20 + 2 * i + j, *p.shape, salt=salt)
        grads = [p.grad.clone() for p in params]
        optimizer.step()
        assert all(torch.equal(p.grad, grad) for p, grad in zip(params, grads, strict=True))
    for p, key in zip(params, ("p0", "p1"), strict=True):
        torch.testing.assert_close(p.detach(), torch.from_numpy(golden[key]), rtol=1e-5, atol=1e-6)


def test_lars_skips_what_has_no_gradient_and_resumes():
    params = [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(3, 2))]
    optimizer = utils.LARS([{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.0}], lr=0.5)
    params[0].grad = torch.ones(2, 2)
    optimizer.step()
    assert (params[1] == 1).all() and not (params[0] == 1).any()
    other = utils.LARS([{"params": params[:1]}, {"params": params[1:]}])
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(other.state[params[0]]["mu"], optimizer.state[params[0]]["mu"])


def test_clipping_is_per_tensor():
    model = nn.Linear(3, 2)
    model.weight.grad, model.bias.grad = torch.full((2, 3), 10.0), torch.full((2,), 0.01)
    utils.clip_gradients(model, 2.0)
    assert model.weight.grad.norm().item() == pytest.approx(2.0, rel=1e-5)
    assert torch.equal(model.bias.grad, torch.full((2,), 0.01))


def test_freezing_takes_gradients_away():
    model = nn.ModuleDict({"last_layer": nn.Linear(2, 2), "mlp": nn.Linear(2, 2)})
    for epoch, frozen in ((0, True), (1, False)):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        utils.cancel_gradients_last_layer(epoch, model, freeze_last_layer=1)
        assert (model["last_layer"].weight.grad is None) == frozen and model["mlp"].weight.grad is not None


def test_teacher_follows_frozen_parameters_too():
    student, teacher = nn.Linear(2, 2), nn.Linear(2, 2)
    student.bias.requires_grad_(False)
    expected = [0.9 * t + 0.1 * s for t, s in zip(teacher.parameters(), student.parameters(), strict=True)]
    update_teacher(student, teacher, 0.9)
    for ours, p in zip(teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(ours.detach(), p.detach())


def test_seeds_differ_by_rank_and_epoch_and_repeat():
    draws = []
    for seed in ((0, 0, 1), (0, 1, 0), (0, 1, 1), (0, 0, 1)):
        utils.fix_random_seeds(*seed)
        draws.append((torch.rand(()).item(), float(np.random.rand())))
    assert draws[0] == draws[3] and len(set(draws)) == 3


def test_meters_keep_tensors_until_read():
    logger = utils.MetricLogger(window=2)
    for value in (1.0, 2.0, 6.0):
        logger.update(loss=torch.tensor(value), pace=value)
    assert logger["loss"].count == 0
    logger.read()
    assert (logger["loss"].global_avg, logger["loss"].avg, logger["pace"].global_avg) == (3.0, 4.0, 3.0)


@pytest.mark.parametrize("word, value", [("true", True), ("ON", True), ("1", True), ("False", False), ("off", False)])
def test_bool_flag(word, value):
    assert utils.bool_flag(word) is value


def test_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    utils.save_on_master({"epoch": 1}, path)

    def dies_halfway(state, file):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", dies_halfway)
    with pytest.raises(WriteError, match="no space"):
        utils.save_on_master({"epoch": 2}, path)
    assert torch.load(path, weights_only=True) == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth"]


class Run:
    """What restart_from_checkpoint needs."""

    def load_state_dict(self, state):
        if "epoch" not in state:
            raise ConfigError("has no 'epoch'")
        self.epoch = state["epoch"]


def test_restart_loads_what_is_there_and_names_a_file_that_does_not_fit(tmp_path):
    path, run = tmp_path / "checkpoint.pth", Run()
    assert not utils.restart_from_checkpoint(path, run) and not hasattr(run, "epoch")
    torch.save({"epoch": 3}, path)
    assert utils.restart_from_checkpoint(path, run) and run.epoch == 3
    torch.save({"step": 3}, path)
    with pytest.raises(ConfigError, match="checkpoint.pth: has no 'epoch'"):
        utils.restart_from_checkpoint(path, run)


MAIN = """
import sys; from selfpatch import errors
def main(word):
    if word == "config":
        raise errors.ConfigError("--lr is nan")
    if word == "training":
        raise errors.TrainingError("the loss was nan")
    return 3
errors.run_main(main, sys.argv[1])
"""


@pytest.mark.parametrize("word, local_rank, status, line", [
    ("config", "0", 2, "-c: error: --lr is nan\n"), ("config", "1", 2, "-c: error: --lr is nan\n"),
    ("training", "1", 1, "-c: error: the loss was nan\n"), ("none", "0", 3, "")])
def test_a_main_ends_with_one_line_and_a_status(word, local_rank, status, line):
    result = subprocess.run([sys.executable, "-c", MAIN, word], capture_output=True, text=True,
                            env=os.environ | {"LOCAL_RANK": local_rank})
    assert (result.returncode, result.stderr) == (status, line)
