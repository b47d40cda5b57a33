"""Processes and devices: who we are among the processes of a launcher, and which device is ours."""
import ctypes
import math
import os
import re
import subprocess
import sys
from typing import NamedTuple

import torch
import torch.distributed as dist

from errors import ConfigError


class Processes(NamedTuple):
    """This process among all of a job: its number, how many there are, its number on this machine, its device."""
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")


def init_distributed_mode(device: str = "auto", local_rank: int = 0, port: int = 29500,
                          dist_url: str = "env://") -> Processes:
    """Join the other processes of a launcher, where the environment names any.

    torchrun and torch.distributed.launch set RANK, WORLD_SIZE and LOCAL_RANK; Slurm's srun sets SLURM_*.

    Args:
        device: auto, cuda, cpu or mps, see pick_device.
        local_rank: used where the launcher gives it as the option --local_rank only (torch before 2.0).
        port: of rank 0, where the launcher sets no MASTER_PORT.
        dist_url: how the processes find each other, see torch.distributed.init_process_group.

    Raises:
        ConfigError: the device does not exist.
    """
    env, rank, world_size = os.environ, 0, 1
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, world_size = int(env["RANK"]), int(env["WORLD_SIZE"])
        local_rank = int(env.get("LOCAL_RANK", local_rank))
    elif "SLURM_PROCID" in env and ("SLURM_STEP_NUM_TASKS" in env or env.get("ENVIRONMENT") != "BATCH"):
        # a batch script has SLURM_PROCID too, but plain python in it is a single process
        rank = int(env["SLURM_PROCID"])
        world_size = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", 1)))
        local_rank = int(env.get("SLURM_LOCALID", 0))
        env.setdefault("MASTER_ADDR", first_slurm_host())
    else:
        local_rank = 0
    processes = Processes(rank, world_size, local_rank, pick_device(device, local_rank))
    if world_size > 1:
        # keep what a launcher has set: `torchrun --standalone` picks a port of its own
        env.setdefault("MASTER_ADDR", "127.0.0.1")
        env.setdefault("MASTER_PORT", str(port))
        dist.init_process_group("nccl" if processes.device.type == "cuda" else "gloo", init_method=dist_url,
                                rank=rank, world_size=world_size)
    return processes


def first_slurm_host() -> str:
    """Name of the first node of a Slurm step, where rank 0 runs."""
    nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    try:
        return subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True,
                              check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        # no scontrol on the node: expand the first name of a list such as 'a,b' or 'n[01-04,7]-rack'
        return re.sub(r"\[(\w+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])


def pick_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """The device called auto, cuda, cuda:1, cpu or mps; plain cuda is the local rank's own GPU.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if name == "mps" and "WORLD_SIZE" in os.environ:
            name = "cpu"  # several processes cannot share tensors on MPS
    device_type, _, number = name.partition(":")
    if device_type == "cuda" and (number.isdecimal() or not number):
        gpus, local_rank = torch.cuda.device_count(), int(number or local_rank)
        # Slurm can show each task its own GPU only (--gpus-per-task): number 0, whatever the local rank
        index = 0 if gpus == 1 and "SLURM_LOCALID" in os.environ and "LOCAL_RANK" not in os.environ else local_rank
        if index >= gpus:
            raise ConfigError(f"--device {name}: this process needs GPU {index}, but torch sees {gpus}: "
                              "start as many processes as there are GPUs, or use --device cpu", every_rank=True)
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    if name == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("--device mps: torch sees no Apple GPU here, use --device cpu")
    if name not in ("mps", "cpu"):
        raise ConfigError(f"--device {name}: there is no such device: use auto, cuda, cuda:1, cpu or mps")
    return torch.device(name)


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def get_world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def is_main_process() -> bool:
    return get_rank() == 0


def keep_freed_memory() -> None:
    """Let malloc keep the memory of freed tensors for this process (Linux, glibc; elsewhere nothing happens).

    Returning it to the system and faulting it in again at every layer takes 4 % of a training step on a CPU.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: allocate up to 32 MiB, its maximum, from the heap
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never shrink the heap


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this process in GiB: allocated on the GPU where there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return math.nan
    import resource  # Unix only
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
