"""Processes and devices: this process's rank among those the launcher started, and its device."""
import ctypes
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from selfpatch.distributed.precision import allow_tf32
from selfpatch.errors import ConfigError, TrainingError, program_name, try_print

T = TypeVar("T")


class Process(NamedTuple):
    """This process: its rank among all of a job and on its machine, and its device."""
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")
    variables: tuple[str, ...] = ()  # of the environment, which give rank and world size


def init_distributed_mode(device: str = "auto", local_rank: int = 0, port: int = 29500, dist_url: str = "env://",
                          timeout: timedelta = timedelta(minutes=30), notice_after: float = 10) -> Process:
    """Join the other processes of the launcher, if the environment names any.

    torchrun and torch.distributed.launch set RANK, WORLD_SIZE and LOCAL_RANK; Slurm's srun sets SLURM_*.

    Args:
        device: auto, cuda, cpu or mps, see pick_device.
        local_rank: used if the launcher gives it only as the option --local_rank (torch before 2.0).
        port: of rank 0, if the launcher sets no MASTER_PORT.
        dist_url: how the processes find each other, see torch.distributed.init_process_group.
        timeout: how long to wait for the other processes, here and in every exchange with them.
        notice_after: seconds of waiting after which a line on stderr says for whom.

    Raises:
        ConfigError: the device does not exist, the environment is inconsistent, or other processes do not join.
    """
    process = read_launcher(local_rank)
    process = process._replace(device=pick_device(device, process.local_rank))
    join(process, "nccl" if process.device.type == "cuda" else "gloo", port, dist_url, timeout, notice_after)
    return process


def read_launcher(local_rank: int = 0) -> Process:
    """Rank and world size from the variables of torchrun or srun; a single process if there are none.

    Raises:
        ConfigError: a variable is not a number, or the rank is not below the number of processes.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        variables, local = ("RANK", "WORLD_SIZE"), "LOCAL_RANK"
    elif "SLURM_PROCID" in env and not is_interactive_step() and (
            "SLURM_STEP_NUM_TASKS" in env or env.get("ENVIRONMENT") != "BATCH"):
        # a batch script has SLURM_PROCID too, but plain python in it is a single process
        count = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
        variables, local, local_rank = ("SLURM_PROCID", count), "SLURM_LOCALID", 0
    elif others := [name for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE") if read_number(name, 1) > 1]:
        raise ConfigError(f"{assignments(tuple(others))}: mpirun's processes cannot join each other here: start them "
                          f"with torchrun or srun, or unset {others[0]} to run a single process", every_rank=True)
    else:
        return Process()
    rank, world_size = read_number(variables[0], 0), read_number(variables[1], 1)
    if not rank < world_size:
        raise ConfigError(f"{assignments(variables)}: the rank must be less than the number of processes; to run a "
                          f"single process, unset {' '.join(variables)}", every_rank=True)
    return Process(rank, world_size, read_number(local, local_rank), variables=variables)


def read_number(name: str, default: int) -> int:
    """The environment variable as a number from 0, or the default where it is not set."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ConfigError(f"the environment variable {name} is {text!r}, not a number from 0: unset it, or start this "
                          "job with torchrun or srun", every_rank=True)
    return int(text)


def is_interactive_step() -> bool:
    """Whether this is the shell of `srun --pty bash`, whose SLURM_* count all tasks though plain python is one process.

    An srun started in that shell passes SLURM_PTY_PORT on to its tasks, but they have no terminal. A task that srun
    itself has started in a terminal is one of several.
    """
    return "SLURM_PTY_PORT" in os.environ and has_terminal() and parent_name() != "slurmstepd"


def parent_name() -> str:
    """Name of the program that started this process; empty where there is no /proc."""
    try:
        with open(f"/proc/{os.getppid()}/comm") as file:
            return file.read().strip()
    except OSError:
        return ""


def has_terminal() -> bool:
    """Whether the process has a controlling terminal, be its input and output redirected or not."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def assignments(variables: tuple[str, ...]) -> str:
    return " ".join(f"{name}={os.environ.get(name, '')}" for name in variables)


def join(process: Process, backend: str, port: int = 29500, dist_url: str = "env://",
         timeout: timedelta = timedelta(minutes=30), notice_after: float = 10,
         option: str = " (--dist_timeout)") -> None:
    """Call torch.distributed.init_process_group if there are several processes; print a line if it has to wait long.

    Args:
        option: what sets the timeout, for messages.

    Raises:
        ConfigError: the processes did not all join.
    """
    if process.world_size == 1:
        return
    if process.variables[0].startswith("SLURM"):
        os.environ.setdefault("MASTER_ADDR", first_slurm_host())
    if dist_url == "env://":  # keep what a launcher has set: `torchrun --standalone` picks a port of its own
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(port))
    more = f"{process.world_size - 1} other process{'es' * (process.world_size > 2)}"
    place = f"{os.environ['MASTER_ADDR']}:{read_number('MASTER_PORT', 0)}" if dist_url == "env://" else dist_url
    who = f"rank {process.rank} ({assignments(process.variables)})"
    alone = f"to run a single process, unset {' '.join(process.variables)}"
    limit, start, missing = f"{format_duration(timeout)}{option}", datetime.now(), []

    def notice() -> None:
        absent = f"missing: {name_ranks(missing)}; " if missing else ""
        try_print(f"{program_name()}: {who} waits for {more} at {place} until {start + timeout:%Y-%m-%d %H:%M}, "
                  f"{limit} in all; {absent}{alone}", sys.stderr)

    timer = threading.Timer(notice_after, notice)
    timer.daemon = True
    timer.start()
    try:
        meeting = {"init_method": dist_url}
        if dist_url == "env://":
            missing[:] = [0] if process.rank else []
            meeting = {"store": connect_store(timeout, server=process.rank == 0)}
            call_roll(meeting["store"], process, timeout, missing)
        dist.init_process_group(backend, rank=process.rank, world_size=process.world_size, timeout=timeout, **meeting)
    except (RuntimeError, ValueError, OSError) as error:
        waited = datetime.now() - start >= 0.9 * timeout
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        absent = f", {name_ranks(missing)} did not" if missing else ""
        reason = f"not all of them joined within {limit}{absent}" if waited else first_line
        raise ConfigError(f"{who} could not join {more} at {place}: {reason}; {alone}", every_rank=True) from None
    finally:
        timer.cancel()


def call_roll(store: dist.Store, process: Process, timeout: timedelta, missing: list[int]) -> None:
    """Wait until every rank has joined; `missing` lists those that have not, at any time."""
    store.set(f"here/{process.rank}", "")
    deadline = time.monotonic() + timeout.total_seconds()
    missing[:] = range(process.world_size)
    while True:
        missing[:] = [rank for rank in missing if not store.check([f"here/{rank}"])]
        if not missing:
            return
        if time.monotonic() > deadline:
            raise TimeoutError("some processes are missing")
        time.sleep(0.05)


def name_ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"


def format_duration(duration: timedelta) -> str:
    minutes = duration.total_seconds() / 60
    return f"{minutes / 60:g} hours" if minutes >= 120 else f"{minutes:.3g} minutes"


def connect_store(timeout: timedelta, server: bool = False) -> dist.Store | None:
    """A connection to the store at MASTER_ADDR:MASTER_PORT; None where the processes met by another --dist_url.

    Args:
        timeout: of every operation.
        server: be the store as well, on rank 0, unless torchrun is.
    """
    env = os.environ
    if not env.get("MASTER_PORT", "").isdecimal():
        return None
    world_size, of_torchrun = read_launcher().world_size, env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), world_size, server and not of_torchrun,
                          timeout, wait_for_workers=False)
    # torchrun starts all processes again after a failure, with the same store
    return dist.PrefixStore(f"selfpatch/{env.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


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

    On a GPU float32 is float32, without TF32, until allow_tf32 says otherwise.

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
        allow_tf32(False)
        return torch.device("cuda", index)
    if name == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("--device mps: torch sees no Apple GPU here, use --device cpu")
    if name not in ("mps", "cpu"):
        raise ConfigError(f"--device {name}: there is no such device: use auto, cuda, cuda:1, cpu or mps")
    return torch.device(name)


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def leave_processes() -> None:
    """Leave the group of processes, if there is one."""
    if is_distributed():
        # torch 2.6: a thread of gloo may need the GIL to free its last tensor, while destroy_process_group
        # holds it and waits for the thread
        time.sleep(0.1)
        dist.destroy_process_group()


def get_rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def get_world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def is_main_process() -> bool:
    return get_rank() == 0


def gather_objects(value: T) -> list[T]:
    """The values of all ranks, by rank. Every rank must call it."""
    values = [value] * get_world_size()
    if is_distributed():
        dist.all_gather_object(values, value)
    return values


def together(function: Callable[[], T]) -> T:
    """Call function on every rank; if it raises on any, raise the first error on all.

    A rank that ended alone would leave the others waiting for it.
    """
    result, error = None, None
    try:
        result = function()
    except (ConfigError, TrainingError) as raised:
        error = raised
    error = next(filter(None, gather_objects(error)), None)
    if error and is_distributed():
        error.every_rank, error.on_all_ranks = False, True
        time.sleep(0.5)  # a process that ends now would reset connections from which others still receive
    if error:
        raise error
    return result


def on_main_process(function: Callable[[], T]) -> T:
    """Call function on rank 0, and return its result, or raise its error, on every rank."""
    result = together(lambda: function() if is_main_process() else None)
    if is_distributed():
        results = [result]
        dist.broadcast_object_list(results)
        result = results[0]
    return result


def is_lost_contact(error: Exception) -> bool:
    """Whether a collective failed because another process has ended or does not answer."""
    return isinstance(error, dist.DistNetworkError) or isinstance(error, RuntimeError | OSError) and any(
        words in str(error) for words in (
            "Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe [",
            "remote process", "Application timeout caused pair closure"))


def keep_freed_memory() -> None:
    """Let malloc keep the memory of freed tensors in this process (glibc on Linux; no effect elsewhere).

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
