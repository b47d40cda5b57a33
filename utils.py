"""Helpers under DINO's names, for code outside this project: nothing in it imports them from here."""
from pathlib import Path

from selfpatch.checkpoints.files import CheckpointError, read_checkpoint, write_checkpoint
from selfpatch.distributed.processes import get_rank, get_world_size, init_distributed_mode, is_main_process  # noqa: F401
from selfpatch.errors import ConfigError
from selfpatch.method.optim import LARS, cancel_gradients_last_layer, clip_gradients, get_params_groups  # noqa: F401
from selfpatch.method.schedules import cosine_scheduler  # noqa: F401
from selfpatch.pretraining.meters import MetricLogger, SmoothedValue  # noqa: F401
from selfpatch.pretraining.options import bool_flag  # noqa: F401
from selfpatch.pretraining.resuming import fix_random_seeds  # noqa: F401


def save_on_master(state: dict, path: str | Path) -> None:
    """Write a checkpoint from rank 0, whole or not at all."""
    if is_main_process():
        write_checkpoint(state, path)


def restart_from_checkpoint(path: str | Path, run) -> bool:
    """Load the checkpoint at path into run, an object with load_state_dict; False if there is no such file.

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
