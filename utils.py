"""The helpers that people who know DINO look for here; most live in modules by subject."""
import argparse
import os
import random
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from checkpoint_files import read_checkpoint, write_checkpoint
from distributed import (  # noqa: F401
    first_slurm_host,
    get_rank,
    get_world_size,
    is_distributed,
    is_main_process,
    keep_freed_memory,
    peak_memory_gb,
    pick_device,
)
from errors import ArgumentParser  # noqa: F401
from logger import MetricLogger, SmoothedValue  # noqa: F401
from optim import (  # noqa: F401
    LARS,
    all_finite,
    cancel_gradients_last_layer,
    clip_gradients,
    get_params_groups,
    load_optimizer,
    update_teacher,
)
from schedules import cosine_scheduler  # noqa: F401


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


def fix_random_seeds(*seed: int) -> None:
    """Seed torch, numpy and random from one or several numbers, such as (seed, rank, epoch)."""
    mixed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    torch.manual_seed(mixed)
    np.random.seed(mixed)
    random.seed(mixed)


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
