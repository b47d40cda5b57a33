"""Schedules and LARS against the published figures; clipping, freezing, logging, processes' environment, safe files."""
import argparse
import os

import numpy as np
import pytest
import torch
from golden_rules import load, rand
from torch import nn

import utils
from errors import ConfigError, report
from losses import DINOLoss


def test_golden_schedules():
    golden = load("schedules.npz")
    for key, schedule in {
            "lr": utils.cosine_scheduler(0.002, 1e-6, 10, 7, warmup_epochs=3),
            "wd": utils.cosine_scheduler(0.04, 0.4, 10, 7),
            "momentum": utils.cosine_scheduler(0.996, 1, 10, 7),
            "teacher_temp": DINOLoss(8, 8, 4, 0.04, 0.07, 3, 10).teacher_temp_schedule}.items():
        np.testing.assert_allclose(schedule, golden[key], rtol=1e-12, atol=1e-15, err_msg=key)


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
    utils.update_teacher(student, teacher, 0.9)
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


@pytest.fixture
def clean_env(monkeypatch):
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name)
    return monkeypatch


def process_args(**kwargs):
    return argparse.Namespace(**{"local_rank": 0, "device": "cpu", "port": 29500, "dist_url": "env://"} | kwargs)


def test_plain_python_is_one_process(clean_env):
    args = process_args()
    utils.init_distributed_mode(args)
    assert (args.rank, args.world_size, args.device.type) == (0, 1, "cpu") and not utils.is_distributed()


@pytest.mark.parametrize("env, option, expected", [({"LOCAL_RANK": "2"}, 0, 2), ({}, 3, 3)])
def test_local_rank_from_either_launcher(clean_env, env, option, expected):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", **env}.items():
        clean_env.setenv(name, value)
    args = process_args(local_rank=option)
    utils.init_distributed_mode(args)
    assert args.local_rank == expected


@pytest.mark.parametrize("nodes, first", [("node7", "node7"), ("a,b", "a"), ("n[01-04,7],m3", "n01"),
                                          ("rack[3]-x[2,5]", "rack3-x2")])
def test_first_slurm_host_without_scontrol(clean_env, nodes, first, tmp_path):
    clean_env.setenv("PATH", str(tmp_path))
    clean_env.setenv("SLURM_JOB_NODELIST", nodes)
    assert utils.first_slurm_host() == first


def test_slurm_script_without_srun_is_one_process(clean_env):
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "ENVIRONMENT": "BATCH"}.items():
        clean_env.setenv(name, value)
    args = process_args()
    utils.init_distributed_mode(args)
    assert (args.rank, args.world_size) == (0, 1)


@pytest.mark.parametrize("env, index", [({"SLURM_LOCALID": "3"}, 0), ({"LOCAL_RANK": "0"}, 0)])
def test_one_visible_gpu(clean_env, env, index):
    for name, value in env.items():
        clean_env.setenv(name, value)
    clean_env.setattr(torch.cuda, "device_count", lambda: 1)
    clean_env.setattr(torch.cuda, "set_device", lambda index: None)
    assert utils.pick_device("cuda", local_rank=int(next(iter(env.values())))) == torch.device("cuda", index)


def test_gpu_by_number(clean_env):
    clean_env.setattr(torch.cuda, "device_count", lambda: 3)
    clean_env.setattr(torch.cuda, "set_device", lambda index: None)
    assert utils.pick_device("cuda:2") == torch.device("cuda", 2)


def test_missing_gpu_is_a_clear_error(clean_env, capsys):
    clean_env.setenv("LOCAL_RANK", "1")  # only such a rank can meet it, so it must speak
    clean_env.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="needs GPU 1, but torch sees 1") as error:
        utils.pick_device("cuda", local_rank=1)
    assert report(error.value) == 2 and "needs GPU 1" in capsys.readouterr().err


def test_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    utils.save_on_master({"epoch": 1}, path)

    def dies_halfway(state, file):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", dies_halfway)
    with pytest.raises(OSError, match="no space"):
        utils.save_on_master({"epoch": 2}, path)
    assert torch.load(path, weights_only=True) == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth"]


def test_restart_is_strict(tmp_path):
    path, model = tmp_path / "checkpoint.pth", nn.Linear(2, 2)
    assert utils.restart_from_checkpoint(path, student=model) == 0
    torch.save({"student": {"module.weight": torch.ones(2, 2), "module.bias": torch.zeros(2)}, "epoch": 3}, path)
    assert utils.restart_from_checkpoint(path, student=model) == 3
    assert (model.weight == 1).all()
    with pytest.raises(ValueError, match="student.*does not fit.*size mismatch"):
        utils.restart_from_checkpoint(path, student=nn.Linear(3, 2))
    with pytest.raises(ValueError, match="has no 'teacher'"):
        utils.restart_from_checkpoint(path, teacher=model)
