"""Helpers under DINO's names; most are defined in modules by subject."""
import argparse
import random
from pathlib import Path

import numpy as np
import torch

from checkpoint_files import CheckpointError, read_checkpoint, write_checkpoint
from distributed import get_rank, get_world_size, init_distributed_mode, is_main_process  # noqa: F401
from errors import ConfigError
from logger import MetricLogger, SmoothedValue  # noqa: F401
from optim import LARS, cancel_gradients_last_layer, clip_gradients, get_params_groups  # noqa: F401
from schedules import cosine_scheduler  # noqa: F401


def bool_flag(text: str) -> bool:
    """The word of a boolean option: true, 1 or on; false, 0 or off."""
    if text.lower() in ("true", "1", "on"):
        return True
    if text.lower() in ("false", "0", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true/1/on nor false/0/off")


def fix_random_seeds(*seed: int) -> None:
    """Seed torch, numpy and random from one or several numbers, such as (seed, rank, epoch)."""
    mixed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    torch.manual_seed(mixed)
    np.random.seed(mixed)
    random.seed(mixed)


def save_on_master(state: dict, path: str | Path) -> None:
    """Write a checkpoint from rank 0, whole or not at all."""
    if is_main_process():
        write_checkpoint(state, path)


def restart_from_checkpoint(path: str | Path, run) -> bool:
    """Load the checkpoint at path into run, an object with load_state_dict; False where there is no such file.

    Raises:
        ConfigError: the file is damaged or does not fit; the message names it.
    """
    if not Path(path).is_file():
        return False
    try:
        run.load_state_dict(read_checkpoint(path))
    except CheckpointError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    return True
