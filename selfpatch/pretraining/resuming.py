"""Continue a run: check that it is still the same run, and restore the state within an epoch."""
import argparse
import os
import random
import re
import zlib
from pathlib import Path

import numpy as np
import torch

from selfpatch.checkpoints.files import read_checkpoint
from selfpatch.data.dataset import TrainingImages
from selfpatch.data.loader import CropLoader
from selfpatch.data.seeds import mixed_seed
from selfpatch.distributed.processes import Process, gather_objects, is_main_process
from selfpatch.errors import ConfigError, try_print
from selfpatch.method.training_run import TrainingRun
from selfpatch.method.vision_transformer import ARCHS
from selfpatch.pretraining.meters import MetricLogger
from selfpatch.pretraining.run_folder import RunFolder

# Changing any of these makes it a different run; "batch" is the images of a step, "data" the images themselves,
# "data_sizes" those of their files, where the data say them.
# With a different network or optimizer the checkpoint does not fit at all.
NETWORK = ("arch", "patch_size", "out_dim", "out_dim_selfpatch", "head_hidden_dim", "use_bn_in_head")
FIXED = ("k_num", "norm_last_layer", "patch_loss_weight", "global_crops_scale", "global_crops_size",
         "local_crops_number", "local_crops_scale", "local_crops_size", "seed", "batch", "data", "data_sizes")
# these say where files are and how the work is done, not what is computed
IRRELEVANT = {"data_path", "image_suffix", "output_dir", "init_weights", "saveckp_freq", "save_every_minutes",
              "save_every_steps", "log_every", "log_with", "tensorboard", "peak_tflops", "num_workers",
              "max_bad_images", "loader_timeout", "allow_changed", "knn_data", "knn_val_labels", "knn_every", "device",
              "dist_url", "dist_timeout", "port", "local_rank", "world_size", "batch_size_per_gpu", "accum_steps",
              "fused_loss", "compile", "checkpoint_activations", "pack_crops"}
# paths of one folder on different machines, and what each process or machine has for itself; "data" is compared
MAY_DIFFER_BETWEEN_RANKS = {"data_path", "data_sizes", "knn_data", "knn_val_labels", "num_workers", "device",
                            "dist_url", "port", "local_rank"}


def fix_random_seeds(*seed: int) -> None:
    """Seed torch, numpy and random from one or several numbers, e.g. (seed, rank, epoch)."""
    mixed = mixed_seed(*seed)
    torch.manual_seed(mixed)
    np.random.seed(mixed)
    random.seed(mixed)


def plain_args(options: dict, world_size: int, dataset: TrainingImages | None = None) -> dict:
    """The options as plain values, which torch.load(weights_only=True) reads, and what identifies images and crops."""
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    plain |= {"world_size": world_size, "crop_seeds": "(seed, epoch, index)"}
    if not dataset:
        return plain
    plain["data"] = describe_images(dataset)
    if (sizes := dataset.images.sizes()) is not None:
        plain["data_sizes"] = f"checksum {zlib.crc32(sizes.numpy().tobytes()):08x}"
    return plain


def describe_images(dataset: TrainingImages) -> str:
    """Number of images and checksum of their names: the same for every form of the same data."""
    checksum = 0
    for name in dataset.images.names:
        checksum = zlib.crc32(name.encode(errors="surrogateescape"), checksum)
    return f"{len(dataset)} images, checksum {checksum:08x}"


def with_batch(args: dict) -> dict:
    """The options with "batch", the images of a step, if the number of processes is known."""
    counts = [args.get(name) for name in ("batch_size_per_gpu", "world_size")]
    return args if None in counts else args | {"batch": counts[0] * counts[1] * args.get("accum_steps", 1)}


def differences(ours: dict, theirs: dict) -> dict[str, tuple]:
    """name: (our value, theirs) for every option that both have and that changes what is computed."""
    def comparable(name: str, value):
        if name == "arch":
            return ARCHS.get(value, value)  # deit_small is vit_small
        if name == "data" and isinstance(value, str):
            return re.sub(r" in \d+ folders", "", value)  # written before lists of images came without folders
        return list(value) if isinstance(value, tuple) else value

    ours, theirs = with_batch(ours), with_batch(theirs)
    return {name: (ours[name], theirs[name]) for name in ours if name in theirs and name not in IRRELEVANT
            and comparable(name, ours[name]) != comparable(name, theirs[name])}


def compare_with_checkpoint(ours: dict, theirs: dict, allowed: list[str], path: Path) -> list[str]:
    """Lines about what has changed since the checkpoint was written.

    Raises:
        ConfigError: a change makes it a different run, and allowed does not name the option, or its network another.
    """
    changed = differences(ours, theirs)
    if refused := [name for name in changed if name in NETWORK or name in FIXED and name not in allowed]:
        what = ", ".join(f"{option(name)} {changed[name][0]} (there {changed[name][1]})" for name in refused)
        anyway = "" if set(NETWORK) & set(refused) else (
            f", or continue all the same with --allow_changed {' '.join(refused)}")
        raise ConfigError(f"{path} is of another run: {what}; give its values, choose another --output_dir{anyway}")
    return [f"changed since the checkpoint: {option(name)} {new} (was {old})" for name, (new, old) in changed.items()]


def unused_weights(given: str, saved: str | None, path: Path) -> str:
    """The line about --init_weights for a run that continues; empty if the option is not given.

    Args:
        saved: the weights with which the run began, "" for random ones; None if its checkpoint does not say.
    """
    if not given:
        return ""
    began = ""
    if saved is not None and (not saved or os.path.abspath(saved) != os.path.abspath(given)):
        began = f", of a run that began from {saved or 'random weights'}: for a new run choose another --output_dir"
    return f"--init_weights {given} is not used: continuing from {path}{began}"


def option(name: str) -> str:
    return {"batch": "images in a step:", "data": "data:", "data_sizes": "sizes of the images' files:"}.get(
        name, f"--{name}")


def compare_ranks(ours: dict) -> None:
    """Raise ConfigError, on every rank, if a rank's options or images differ from rank 0's."""
    everyone = gather_objects(ours)
    for rank, theirs in enumerate(everyone):
        for name in sorted((ours.keys() | theirs.keys()) - MAY_DIFFER_BETWEEN_RANKS):
            first, other = everyone[0].get(name), theirs.get(name)
            if first != other:
                raise ConfigError(f"rank {rank} has {option(name)} {other}, rank 0 {first}: start all processes with "
                                  "the same options and the same images")


# ----------------------------------------------------------------------------------------------------------------------
# The state within an epoch


def epoch_state(loader: CropLoader, logger: MetricLogger) -> dict:
    """What a checkpoint within an epoch holds besides the run's state: sums of losses and random states, by rank."""
    own = {"rng": torch.get_rng_state(), "meters": logger.state_dict()}
    if loader.device.type == "cuda":
        own["cuda_rng"] = torch.cuda.get_rng_state(loader.device)
    return {"ranks": gather_objects(own)}


def resume(run: TrainingRun, folder: RunFolder, path: Path | None, ours: dict) -> tuple[list[int] | None, dict]:
    """Continue from the folder's checkpoint, if there is one. Every rank must call it.

    Args:
        path: what folder.find returned on rank 0.
        ours: this run's options, from plain_args.

    Returns:
        RunLog's mark of an older log, and the state within the epoch for begin_epoch, {} at the start of one.

    Raises:
        ConfigError: the checkpoint is damaged, does not fit, or is of a different run.
    """
    if path is None:
        return None, {}
    state = folder.take_state() or read_checkpoint(path)
    check_types(state, path)
    saved = state.get("args") or {}
    saved = dict(saved) if isinstance(saved, dict) else vars(saved)
    lines = compare_with_checkpoint(ours, saved, ours["allow_changed"], path)
    lines.append(unused_weights(ours["init_weights"], saved.get("init_weights"), path))
    for line in filter(None, lines if is_main_process() else ()):
        try_print(line)
    if steps := state.get("step_of_epoch"):
        old_batch, new_batch = (with_batch(args).get("batch") for args in (saved, ours))
        images = steps * (old_batch or new_batch)
        if images % new_batch:
            raise ConfigError(f"{path} lies {images} images into an epoch, which is no whole number of steps of "
                              f"{new_batch} images: continue with {old_batch} images a step until the epoch ends")
        state["step_of_epoch"] = images // new_batch
    try:
        run.load_state_dict(state)
    except ConfigError as error:
        changed = "".join(f", here {option(name)} {new} and there {old}"
                          for name, (new, old) in differences(ours, saved).items())
        raise ConfigError(f"{path}: {error}{changed}: give the options of that run, or another --output_dir") from None
    epochs = run.schedules.epochs
    if run.epoch > epochs or (run.epoch == epochs and run.step % run.steps_per_epoch):
        raise ConfigError(f"--epochs {epochs}, but {path} is in epoch {run.epoch} already: give more --epochs, or "
                          "another --output_dir")
    if "crop_seeds" not in saved and run.epoch < epochs and is_main_process():
        try_print(f"crops are drawn anew: those of {path} were not seeded by (seed, epoch, index of the image)")
    return state.get("older_log", [0, 0]), {"ranks": state["ranks"]} if "ranks" in state else {}


def check_types(state: dict, path: Path) -> None:
    """Raise ConfigError if what a checkpoint holds besides the training state is of the wrong type."""
    def ranks_ok(ranks) -> bool:
        return ranks is None or isinstance(ranks, list) and all(
            isinstance(rank, dict) and isinstance(rank.get("loader", rank), dict)
            and "rng" in rank.get("loader", rank) and isinstance(rank.get("meters"), dict) for rank in ranks)

    older = state.get("older_log", [0, 0])
    sound = {"args": isinstance(state.get("args"), dict | argparse.Namespace | None),
             "ranks": ranks_ok(state.get("ranks")),
             "step_of_epoch": isinstance(state.get("step_of_epoch", 0), int) and state.get("step_of_epoch", 0) >= 0,
             "older_log": isinstance(older, list) and [type(number) for number in older] == [int, int]}
    if wrong := [name for name, is_sound in sound.items() if not is_sound]:
        raise ConfigError(f"{path}: its {wrong[0]} is not what a training run writes: give another --output_dir")


def begin_epoch(run: TrainingRun, loader: CropLoader, logger: MetricLogger, within: dict, seed: int,
                process: Process) -> None:
    """Seed everything for the epoch that run.step is in, and place loader and logger where they were within it.

    The batches are those of the run that was not interrupted, to the bit; with the same number of processes, so are
    the draws of stochastic depth.
    """
    ranks, step = within.get("ranks", []), run.step % run.steps_per_epoch
    loader.set_epoch(run.epoch, step * run.accum_steps)
    same = len(ranks) == process.world_size
    # seeds depend on the epoch alone: a resumed run draws what the uninterrupted one would have drawn
    fix_random_seeds(seed, process.rank, run.epoch, *([] if same or not step else [step]))
    if same:
        own = ranks[process.rank]
        generators = own.get("loader", own)  # those of stochastic depth; "loader" until crops were seeded by image
        torch.set_rng_state(generators["rng"])
        if "cuda_rng" in generators and loader.device.type == "cuda":
            torch.cuda.set_rng_state(generators["cuda_rng"], loader.device)
        logger.load_state_dict(own["meters"])
    elif process.rank == 0:  # the epoch's means are over all ranks
        for name in ranks[0]["meters"] if ranks else ():
            sums = torch.tensor([rank["meters"][name] for rank in ranks], dtype=torch.float64).sum(0)
            logger.load_state_dict({name: sums.tolist()})
