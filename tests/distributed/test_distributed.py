"""Who a process is, by the launcher's environment, and which device it gets."""
import os
import socket
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch
from forked import free_port
from repository import ROOT

from selfpatch.distributed import processes as distributed
from selfpatch.distributed.processes import Process, init_distributed_mode, pick_device
from selfpatch.errors import ConfigError, report


@pytest.fixture
def clean_env(monkeypatch):
    names = ("ENVIRONMENT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    for name in (*names, *[name for name in os.environ if name.startswith("SLURM_")]):
        monkeypatch.setenv(name, "")  # so that what the code sets is undone as well
        monkeypatch.delenv(name)
    return monkeypatch


def test_plain_python_is_one_process(clean_env):
    assert init_distributed_mode("cpu") == Process(0, 1, 0, torch.device("cpu"))
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


@pytest.mark.parametrize("terminal, processes", [(True, 1), (False, 4)])
def test_interactive_step_is_one_process(clean_env, terminal, processes):
    """`srun --pty bash` with 4 tasks; an srun inside it inherits SLURM_PTY_PORT, but has no terminal."""
    for name, value in {"SLURM_PTY_PORT": "4000", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4",
                        "SLURM_STEP_NUM_TASKS": "4"}.items():
        clean_env.setenv(name, value)
    clean_env.setattr(distributed, "has_terminal", lambda: terminal)
    assert distributed.read_launcher().world_size == processes
    clean_env.setattr(distributed, "parent_name", lambda: "slurmstepd")
    assert distributed.read_launcher().world_size == 4  # srun --pty -n4 python ...


def test_processes_of_mpirun_are_refused(clean_env):
    clean_env.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="OMPI_COMM_WORLD_SIZE=4: mpirun's processes cannot join.*torchrun or srun"):
        distributed.read_launcher()


@pytest.mark.slow
def test_terminal_of_a_shell_and_of_none():
    """Output redirected or not: a process under a pseudo-terminal has one, a process in a session of its own hasn't."""
    print_it = [sys.executable, "-c",
                "from selfpatch.distributed import processes; print('terminal:', processes.has_terminal())"]
    in_pty = [sys.executable, "-c", f"import pty; pty.spawn({print_it!r})"]
    for command, expected in ((in_pty, "terminal: True"), (print_it, "terminal: False")):
        result = subprocess.run(command, cwd=ROOT, start_new_session=True, capture_output=True,
                                stdin=subprocess.DEVNULL, text=True, timeout=120)
        assert expected in result.stdout, result


@pytest.mark.parametrize("env, says", [
    ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x', not a number"),
    ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE is '', not a number"),
    ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 WORLD_SIZE=0: the rank must be less"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "unset RANK WORLD_SIZE"),
    ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1'"),
    ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "one"}, "LOCAL_RANK is 'one'"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
    ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID=3 SLURM_STEP_NUM_TASKS=2")])
def test_malformed_variables_are_one_line(clean_env, capsys, env, says):
    for name, value in env.items():
        clean_env.setenv(name, value)
    with pytest.raises(ConfigError, match="^.*$") as error:
        init_distributed_mode("cpu")
    assert report(error.value) == 2  # from any rank: LOCAL_RANK may be left over as well
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


@pytest.mark.parametrize("env, variables", [
    ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, "RANK=0 WORLD_SIZE=4"),
    ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "RANK=1 WORLD_SIZE=2"),
    ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "127.0.0.1"},
     "SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=4")])
def test_who_waits_says_so(clean_env, capsys, tmp_path, env, variables):
    """For whom, where, until when, and why; and again at the end, from whichever rank."""
    for name, value in {**env, "MASTER_PORT": free_port(), "PATH": str(tmp_path)}.items():
        clean_env.setenv(name, value)
    with pytest.raises(ConfigError) as error:
        init_distributed_mode("cpu", timeout=timedelta(seconds=0.6), notice_after=0)
    report(error.value)
    notice, end = capsys.readouterr().err.splitlines()
    others = "1 other process at" if "=2" in variables else "3 other processes at"
    place = f"127.0.0.1:{os.environ['MASTER_PORT']}"
    assert f"({variables}) waits for {others} {place} until 20" in notice and "0.01 minutes" in notice
    unset = "unset " + " ".join(word.split("=")[0] for word in variables.split())
    assert notice.endswith(unset) and end.endswith(unset)
    assert f"could not join {others} {place}: not all of them joined within 0.01 minutes (--dist_timeout)" in end


def test_no_word_without_a_wait(clean_env, capsys):
    clean_env.setattr(torch.distributed, "init_process_group", lambda *args, **kwargs: None)
    for part in ("connect_store", "call_roll"):
        clean_env.setattr(distributed, part, lambda *_, **__: None)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        clean_env.setenv(name, value)
    assert init_distributed_mode("cpu", notice_after=0.5)[:2] == (1, 2)
    time.sleep(0.7)  # a timer that still ran would speak now
    assert capsys.readouterr().err == ""


def test_taken_port_is_one_line(clean_env):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": str(server.getsockname()[1])}.items():
            clean_env.setenv(name, value)
        with pytest.raises(ConfigError, match="could not join .*EADDRINUSE"):
            init_distributed_mode("cpu", timeout=timedelta(seconds=5))


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
