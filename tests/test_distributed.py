"""Who a process is, by the launcher's environment, and which device it gets."""
import os

import pytest
import torch

import distributed
from distributed import Processes, init_distributed_mode, pick_device
from errors import ConfigError, report


@pytest.fixture
def clean_env(monkeypatch):
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name)
    return monkeypatch


def test_plain_python_is_one_process(clean_env):
    assert init_distributed_mode("cpu") == Processes(0, 1, 0, torch.device("cpu"))
    assert not distributed.is_distributed()


@pytest.mark.parametrize("env, option, expected", [({"LOCAL_RANK": "2"}, 0, 2), ({}, 3, 3)])
def test_local_rank_from_either_launcher(clean_env, env, option, expected):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", **env}.items():
        clean_env.setenv(name, value)
    assert init_distributed_mode("cpu", local_rank=option).local_rank == expected


@pytest.mark.parametrize("nodes, first", [("node7", "node7"), ("a,b", "a"), ("n[01-04,7],m3", "n01"),
                                          ("rack[3]-x[2,5]", "rack3-x2")])
def test_first_slurm_host_without_scontrol(clean_env, nodes, first, tmp_path):
    clean_env.setenv("PATH", str(tmp_path))
    clean_env.setenv("SLURM_JOB_NODELIST", nodes)
    assert distributed.first_slurm_host() == first


def test_slurm_script_without_srun_is_one_process(clean_env):
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "ENVIRONMENT": "BATCH"}.items():
        clean_env.setenv(name, value)
    assert init_distributed_mode("cpu")[:2] == (0, 1)


@pytest.mark.parametrize("env, index", [({"SLURM_LOCALID": "3"}, 0), ({"LOCAL_RANK": "0"}, 0)])
def test_one_visible_gpu(clean_env, env, index):
    for name, value in env.items():
        clean_env.setenv(name, value)
    clean_env.setattr(torch.cuda, "device_count", lambda: 1)
    clean_env.setattr(torch.cuda, "set_device", lambda index: None)
    assert pick_device("cuda", local_rank=int(next(iter(env.values())))) == torch.device("cuda", index)


def test_gpu_by_number(clean_env):
    clean_env.setattr(torch.cuda, "device_count", lambda: 3)
    clean_env.setattr(torch.cuda, "set_device", lambda index: None)
    assert pick_device("cuda:2") == torch.device("cuda", 2)


def test_missing_gpu_is_a_clear_error(clean_env, capsys):
    clean_env.setenv("LOCAL_RANK", "1")  # only such a rank can meet it, so it must speak
    clean_env.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="needs GPU 1, but torch sees 1") as error:
        pick_device("cuda", local_rank=1)
    assert report(error.value) == 2 and "needs GPU 1" in capsys.readouterr().err
