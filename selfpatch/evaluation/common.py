"""What the evaluations of frozen features share: options, the start and end of a job, one table of all backbones."""
import argparse
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TypeVar

import torch

from selfpatch.data.sources import KINDS, add_source_options
from selfpatch.distributed.precision import choose_dtype
from selfpatch.distributed.processes import (
    get_rank,
    init_distributed_mode,
    is_distributed,
    is_lost_contact,
    keep_freed_memory,
    leave_processes,
)
from selfpatch.errors import POSITIVE_INT, ConfigError, Number, OneOrSeveral, check_may_start, user_path
from selfpatch.evaluation.image_features import IMAGE_FEATURES, PATCH_FEATURES
from selfpatch.evaluation.model_options import Candidate, add_device_options, add_model_options
from selfpatch.evaluation.tables import format_table, write_json

Column = dict[str, float | int]  # a backbone's figures by the names of the table's rows
Result = TypeVar("Result")


# ---------------------------------------------------------------- options

def add_image_options(parser: argparse.ArgumentParser, use: str) -> None:
    """Add --image_size, and the options of labelled_images.Places.

    Args:
        use: what the training images are for, in words.
    """
    data = parser.add_argument_group("images", "each is " + KINDS + ", with classes")
    several = {"type": os.path.expanduser, "nargs": "+", "action": OneOrSeveral}
    data.add_argument("--data_path", **several, help="has train/ and val/ in it; hf:NAME has train and validation")
    data.add_argument("--train_path", **several, help=f"images to {use}, instead of --data_path")
    data.add_argument("--val_path", **several, help="images to test, instead of --data_path")
    data.add_argument("--val_share", type=float,
                      help="--data_path is one set of images, and this share of each class is tested, such as 0.1")
    data.add_argument("--val_labels", type=user_path, metavar="FILE",
                      help="the classes of test images that lie in one folder: a line \"name label\" for each, or a "
                           "label for each in the order of their names; labels are training class folders, or their "
                           "numbers from 0")
    add_source_options(data)
    data.add_argument("--image_size", type=Number(int, least=16), default=224,
                      help="side of the images; rounded to whole patches")


def add_image_feature(parser: argparse.ArgumentParser) -> None:
    """Add --feature, the kind of ImageFeature."""
    parser.add_argument("--feature", choices=IMAGE_FEATURES,
                        help="cls: class token; head: SelfPatch's class token; mean: mean of the patches; default: the "
                             "first of these that the checkpoint offers")


def add_patch_feature(parser: argparse.ArgumentParser, default: str) -> None:
    """Add --feature, the kind of PatchFeature."""
    parser.add_argument("--feature", choices=sorted(PATCH_FEATURES), default=default,
                        help="of a patch: keys of the block's attention, or its output; default, as published: "
                             f"{default}")


def add_evaluation_options(parser: argparse.ArgumentParser, batch_size: int | None = None) -> None:
    """Add the options of backbones (several), of output and of running.

    Args:
        batch_size: default of --batch_size_per_gpu; None leaves that option out.
    """
    add_model_options(parser.add_argument_group("backbones, compared in one table"), several=True)
    output = parser.add_argument_group("output")
    output.add_argument("--output", type=user_path, help="JSON file for the figures")
    output.add_argument("--overwrite", action="store_true", help="replace existing files")
    running = parser.add_argument_group("running")
    if batch_size is not None:
        running.add_argument("--batch_size_per_gpu", type=POSITIVE_INT, default=batch_size,
                             help="images in a forward pass of one process")
    running.add_argument("--num_workers", type=Number(int, least=0), default=min(10, os.cpu_count() or 1),
                         help="processes that load images, for each GPU; 0 loads them in this one")
    add_device_options(running)
    running.add_argument("--seed", type=Number(int, least=0), default=0, help="of random weights, crops and heads")
    running.add_argument("--dist_timeout", type=Number(float, above=0, below=1e6), default=30,
                         help="minutes to wait for other processes")


# ---------------------------------------------------------------- the job

def start(device: str, precision: str, dist_timeout: float, num_workers: int) -> tuple[torch.device, torch.dtype]:
    """Join the other processes, if there are any; this process's device and the dtype that backbones compute in.

    Args:
        dist_timeout: minutes to wait for the other processes.
        num_workers: processes that will load images.

    Raises:
        ConfigError: there is no such device, it lacks the precision, the other processes do not join, or this one may
            not start workers.
    """
    check_may_start(num_workers)
    found = init_distributed_mode(device, timeout=timedelta(minutes=dist_timeout)).device
    if found.type == "cpu":
        keep_freed_memory()
    return found, choose_dtype(precision, found)


def evaluate_each(candidates: list[Candidate], function: Callable[[Candidate], Result],
                  device: torch.device) -> dict[str, Result]:
    """function(candidate) of every candidate by name; one network at a time, with its head, is on the device.

    Raises:
        ConfigError: function raises it, or another process has ended after an error of its own.
    """
    table = {}
    for candidate in candidates:
        modules = [module for module in (candidate.model, candidate.head) if module is not None]
        for module in modules:
            module.to(device).requires_grad_(False)
        try:
            table[candidate.name] = function(candidate)
        except (RuntimeError, OSError) as error:
            if not (is_distributed() and is_lost_contact(error)):
                raise
            raise ConfigError("another process of this job has ended: its own message says why") from None
        for module in modules:
            module.to("cpu")
    return table


def leave() -> bool:
    """Leave the group of processes; whether this is the first of them, which reports."""
    first = get_rank() == 0
    leave_processes()
    return first


def comparison_table(title: str, table: dict[str, Column]) -> str:
    """A column for every backbone; floats are shares, printed in per cent, and integers counts."""
    def cell(value: float | int | None) -> str:
        return "-" if value is None else f"{100 * value:.2f}" if isinstance(value, float) else str(value)

    rows = dict.fromkeys(row for column in table.values() for row in column)
    return format_table([title, *table], [[row, *(cell(column.get(row)) for column in table.values())] for row in rows])


def finish(title: str, candidates: list[Candidate], table: dict[str, Column], options: Mapping[str, object],
           **more) -> None:
    """Leave the group of processes; the first one prints the table and writes the JSON file of --output.

    Args:
        options: the job's, for the JSON file too.
        more: further entries of the JSON file.
    """
    if not leave():
        return
    print(comparison_table(title, table))
    if output := options["output"]:
        options = {name: value if isinstance(value, int | float | str | list | None) else str(value)
                   for name, value in options.items()}
        networks = [candidate.summary() | {"figures": table[candidate.name]} for candidate in candidates]
        write_json({"evaluation": title, "options": options, "networks": networks, **more}, output)
