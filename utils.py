"""What every job needs: processes and devices, schedules, parameter groups, the optimiser's extras, logging."""
import argparse
import ctypes
import math
import os
import random
import re
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from checkpoint_files import read_checkpoint, write_checkpoint

# ----------------------------------------------------------------------------------------------------------------------
# Options and errors


def bool_flag(text: str) -> bool:
    """An option's word as a boolean: true/1/on or false/0/off."""
    if text.lower() in ("true", "1", "on"):
        return True
    if text.lower() in ("false", "0", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true/1/on nor false/0/off")


def fail(message: str, every_rank: bool = False) -> None:
    """End the job before it starts: one line on stderr (from each machine's first process), exit status 2."""
    if every_rank or os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, whose errors are the one line that matters, without the page of usage before it."""

    def error(self, message: str) -> None:
        fail(f"{message} (--help lists the options)")


# ----------------------------------------------------------------------------------------------------------------------
# Processes and devices


def init_distributed_mode(args: argparse.Namespace) -> None:
    """Find out from the environment who we are, and join the other processes where there are any.

    torchrun and torch.distributed.launch give RANK, WORLD_SIZE and LOCAL_RANK (an old launch gives the last one as
    --local_rank only), Slurm's srun gives SLURM_*. Sets args.rank, args.world_size, args.local_rank, args.device.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        args.rank, args.world_size = int(env["RANK"]), int(env["WORLD_SIZE"])
        args.local_rank = int(env.get("LOCAL_RANK", args.local_rank))
    elif "SLURM_PROCID" in env and ("SLURM_STEP_NUM_TASKS" in env or env.get("ENVIRONMENT") != "BATCH"):
        # the script that sbatch runs has SLURM_PROCID too, but there plain python is one process alone
        args.rank = int(env["SLURM_PROCID"])
        args.world_size = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", 1)))
        args.local_rank = int(env.get("SLURM_LOCALID", 0))
        env.setdefault("MASTER_ADDR", first_slurm_host())
    else:
        args.rank, args.world_size, args.local_rank = 0, 1, 0
    args.device = pick_device(args.device, args.local_rank)
    if args.world_size > 1:
        # what a launcher has set stays: under `torchrun --standalone` the port is its own
        env.setdefault("MASTER_ADDR", "127.0.0.1")
        env.setdefault("MASTER_PORT", str(args.port))
        dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo", init_method=args.dist_url,
                                rank=args.rank, world_size=args.world_size)


def first_slurm_host() -> str:
    """Name of the first node of a Slurm step, where rank 0 runs."""
    nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    try:
        return subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True,
                              check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        # no scontrol on the node: the list is 'a,b' or 'n[01-04,7]-rack', and its first name is enough
        return re.sub(r"\[(\w+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device called auto, cuda, cuda:1, cpu or mps; cuda is the local rank's own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if name == "mps" and "WORLD_SIZE" in os.environ:
            name = "cpu"  # several processes cannot share tensors on MPS
    kind, _, number = name.partition(":")
    if kind == "cuda" and (number.isdecimal() or not number):
        gpus, local_rank = torch.cuda.device_count(), int(number or local_rank)
        # Slurm can show each task its own GPU only (--gpus-per-task): that one is number 0, whatever the local rank
        index = 0 if gpus == 1 and "SLURM_LOCALID" in os.environ and "LOCAL_RANK" not in os.environ else local_rank
        if index >= gpus:
            fail(f"--device {name}: this process needs GPU {index}, but torch sees {gpus}: "
                 "start as many processes as there are GPUs, or use --device cpu", every_rank=True)
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    if name == "mps" and not torch.backends.mps.is_available():
        fail("--device mps: torch sees no Apple GPU here, use --device cpu")
    if name not in ("mps", "cpu"):
        fail(f"--device {name}: there is no such device: use auto, cuda, cuda:1, cpu or mps")
    return torch.device(name)


def keep_freed_memory() -> None:
    """Let this process reuse the memory of freed tensors, on Linux: giving it back and faulting it in again at every
    layer is 4 % of a training step on a CPU."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # glibc
            libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: tensors up to 32 MiB, its maximum, come from the heap
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: which is not cut


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def get_world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def is_main_process() -> bool:
    return get_rank() == 0


def fix_random_seeds(*seed: int) -> None:
    """Seed torch, numpy and random from one or several numbers, such as (seed, rank, epoch)."""
    mixed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    torch.manual_seed(mixed)
    np.random.seed(mixed)
    random.seed(mixed)


# ----------------------------------------------------------------------------------------------------------------------
# Schedules, parameter groups, gradients


def cosine_scheduler(base_value: float, final_value: float, epochs: int, niter_per_ep: int,
                     warmup_epochs: int = 0, start_warmup_value: float = 0) -> np.ndarray:
    """One value an iteration, [epochs·niter_per_ep]: a linear warm-up, then half a cosine.

    The warm-up ends on base_value and the cosine begins on it, so the peak stands twice, as in DINO.
    """
    warmup = np.linspace(start_warmup_value, base_value, warmup_epochs * niter_per_ep)
    steps = np.arange(epochs * niter_per_ep - len(warmup))
    cosine = final_value + 0.5 * (base_value - final_value) * (1 + np.cos(np.pi * steps / max(len(steps), 1)))
    return np.concatenate((warmup, cosine))


def get_params_groups(model: nn.Module) -> list[dict]:
    """Trainable parameters in two groups: with weight decay, and (biases and one-dimensional ones) without."""
    decayed, not_decayed = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (not_decayed if name.endswith(".bias") or p.ndim == 1 else decayed).append(p)
    return [{"params": decayed}, {"params": not_decayed, "weight_decay": 0.0}]


@torch.no_grad()
def clip_gradients(model: nn.Module, clip: float) -> None:
    """Scale each gradient tensor on its own to norm clip at most, as DINO does, without asking the device for it."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    factors = (clip / (torch.stack(torch._foreach_norm(grads)) + 1e-6)).clamp(max=1)
    torch._foreach_mul_(grads, list(factors.unbind()))


def cancel_gradients_last_layer(epoch: int, model: nn.Module, freeze_last_layer: int) -> None:
    """Take the gradients of the heads' last layers away while epoch < freeze_last_layer: no step, decay or moments."""
    if epoch < freeze_last_layer:
        for name, p in model.named_parameters():
            if "last_layer" in name:
                p.grad = None


@torch.no_grad()
def update_teacher(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """teacher ← momentum·teacher + (1 − momentum)·student, over all parameters, frozen ones too (DINO, Sec. 3.1)."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


@torch.no_grad()
def all_finite(model: nn.Module) -> bool:
    """Whether no weight is NaN or infinite."""
    return bool(torch.stack(torch._foreach_norm(list(model.parameters()))).isfinite().all())


class LARS(torch.optim.Optimizer):
    """SGD with layer-wise adaptive rates (You et al. 2017), as DINO has it.

    The trust ratio eta·|p|/|g| and the weight decay are for parameters with more than one dimension.
    """

    def __init__(self, params, lr: float = 0.0, weight_decay: float = 0.0, momentum: float = 0.9, eta: float = 0.001):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad.clone() for p in params]
            matrices = [(p, g) for p, g in zip(params, grads, strict=True) if p.ndim > 1]
            if matrices:
                ps, gs = map(list, zip(*matrices, strict=True))
                torch._foreach_add_(gs, ps, alpha=group["weight_decay"])
                ratios = [torch.where((pn > 0) & (gn > 0), group["eta"] * pn / gn, torch.ones_like(pn))
                          for pn, gn in zip(torch._foreach_norm(ps), torch._foreach_norm(gs), strict=True)]
                torch._foreach_mul_(gs, ratios)
            for p in params:
                if "mu" not in self.state[p]:
                    self.state[p]["mu"] = torch.zeros_like(p)
            momenta = [self.state[p]["mu"] for p in params]
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, grads)
            torch._foreach_add_(params, momenta, alpha=-group["lr"])


# ----------------------------------------------------------------------------------------------------------------------
# Going on


def save_on_master(state: dict, path: str | Path) -> None:
    if is_main_process():
        write_checkpoint(state, path)


def restart_from_checkpoint(path: str | Path, **objects) -> int:
    """Load path's entries into the objects of the same names, strictly; the epoch to go on with, 0 without a file.

    A student saved under DDP loads without it and the other way about; so do runs with and without a GradScaler.

    Raises:
        ValueError: an entry is missing or does not fit; nothing that could be trained on silently.
    """
    if not Path(path).is_file():
        return 0
    checkpoint = read_checkpoint(path)
    for name, target in objects.items():
        if isinstance(target, torch.amp.GradScaler):
            if checkpoint.get(name) and target.is_enabled():  # empty where the run was not in float16
                target.load_state_dict(checkpoint[name])
            continue
        if name not in checkpoint:
            raise ValueError(f"{path} has no {name!r}, only {', '.join(checkpoint)}")
        try:
            if isinstance(target, torch.optim.Optimizer):
                load_optimizer(target, checkpoint[name])
            else:
                target.load_state_dict({k.removeprefix("module."): v for k, v in checkpoint[name].items()})
        except (RuntimeError, ValueError, KeyError) as error:
            lines = str(error).splitlines()
            raise ValueError(f"the {name} in {path} does not fit this run's options: "
                             f"{'; '.join(line.strip() for line in lines[:4])}") from None
    return checkpoint["epoch"]


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load state and keep how this run computes (fused, foreach), which differs between devices and torch versions.

    Raises:
        ValueError: the state is another kind of optimizer's.
    """
    kinds = {"betas", "momentum", "eta"}  # what tells AdamW, SGD and LARS apart
    ours, saved = (kinds.intersection(groups[0]) for groups in (optimizer.param_groups, state["param_groups"]))
    if ours != saved:
        raise ValueError(f"it is another kind of optimizer, one with {' and '.join(sorted(saved))}")
    groups = [group | {name: own[name] for name in ("fused", "foreach", "capturable") if name in own}
              for group, own in zip(state["param_groups"], optimizer.param_groups, strict=True)]
    optimizer.load_state_dict(state | {"param_groups": groups})


# ----------------------------------------------------------------------------------------------------------------------
# Logging


class SmoothedValue:
    """A series of numbers: mean of the last window ones, and of all. Tensors stay on the device until read."""

    def __init__(self, window: int):
        self.recent, self.total, self.count, self.pending = deque(maxlen=window), 0.0, 0, []

    def update(self, value: float | torch.Tensor) -> None:
        self.pending.append(value)

    def read(self) -> None:
        """Fetch what has come since the last call: the one moment that waits for the device."""
        if self.pending and isinstance(self.pending[0], torch.Tensor):
            self.pending = torch.stack(self.pending).tolist()
        for value in self.pending:
            self.recent.append(value)
            self.total += value
            self.count += 1
        self.pending = []

    @property
    def avg(self) -> float:
        return sum(self.recent) / max(len(self.recent), 1)

    @property
    def global_avg(self) -> float:
        return self.total / max(self.count, 1)


class MetricLogger:
    """SmoothedValues by name, and the pace of the loop they come from."""

    def __init__(self, window: int):
        self.meters: dict[str, SmoothedValue] = {}
        self.window, self.steps, self.last_read, self.seconds_per_step = window, 0, time.time(), 0.0

    def update(self, **values: float | torch.Tensor) -> None:
        for name, value in values.items():
            self.meters.setdefault(name, SmoothedValue(self.window)).update(value)
        self.steps += 1

    def read(self) -> None:
        """Fetch all values, and take the pace since the last time: on a GPU only now is that work done."""
        for meter in self.meters.values():
            meter.read()
        if self.steps:
            self.seconds_per_step = (time.time() - self.last_read) / self.steps
        self.steps, self.last_read = 0, time.time()

    def __getitem__(self, name: str) -> SmoothedValue:
        return self.meters[name]

    def synchronize_between_processes(self, device: torch.device) -> None:
        """Make every global_avg the mean over all ranks."""
        self.read()
        if is_distributed():
            sums = torch.tensor([[m.total, m.count] for m in self.meters.values()], dtype=torch.float32, device=device)
            dist.all_reduce(sums)
            for meter, (total, count) in zip(self.meters.values(), sums.tolist(), strict=True):
                meter.total, meter.count = total, count


def peak_memory_gb(device: torch.device) -> float:
    """Most memory this process has held so far in GiB: the GPU's where there is one, else the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return math.nan
    import resource
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
