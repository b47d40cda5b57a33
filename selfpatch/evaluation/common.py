"""What the evaluations of frozen features share: common options, this process's machine, one table."""
import argparse
import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from selfpatch.checkpoints.backbones import Backbone
from selfpatch.distributed.precision import autocast, choose_dtype
from selfpatch.distributed.processes import get_rank, init_distributed_mode, is_distributed, keep_freed_memory
from selfpatch.errors import ConfigError, user_path
from selfpatch.evaluation.image_features import ImageFeature
from selfpatch.evaluation.model_options import (
    Candidate,
    add_model_options,
    add_run_options,
    check_run_options,
)
from selfpatch.evaluation.tables import check_output, format_table, write_json


def add_image_options(parser: argparse.ArgumentParser, use: str) -> None:
    """Add --data_path, --train_path, --val_path, --val_share (see image_features.open_pair) and --image_size.

    Args:
        use: what the training images are for, in words.
    """
    data = parser.add_argument_group("images")
    data.add_argument("--data_path", type=user_path, help="folder with train/ and val/ in it, of class folders")
    data.add_argument("--train_path", type=user_path, help=f"class folders to {use}, instead of --data_path")
    data.add_argument("--val_path", type=user_path, help="class folders to test, instead of --data_path")
    data.add_argument("--val_share", type=float,
                      help="--data_path itself has class folders, and this share of each class is tested, such as 0.1")
    data.add_argument("--image_size", type=int, default=224, help="side of the images; rounded to whole patches")


def add_evaluation_options(parser: argparse.ArgumentParser, batch_size: int | None = None) -> None:
    """Add the options of backbones (several), of output and of running.

    Args:
        batch_size: the default of --batch_size_per_gpu; None for a job that has no use for it.
    """
    add_model_options(parser.add_argument_group("backbones, compared in one table"), several=True)
    output = parser.add_argument_group("output")
    output.add_argument("--output", type=user_path, help="JSON file for the figures")
    output.add_argument("--overwrite", action="store_true", help="replace existing files")
    add_run_options(parser.add_argument_group("running"), batch_size)


def add_patch_feature(parser: argparse.ArgumentParser, default: str) -> None:
    """Add --feature, which patch_features looks at."""
    parser.add_argument("--feature", choices=["keys", "patches"], default=default,
                        help="of a patch: keys of the block's attention, or its output; default, as published: "
                             f"{default}")


def check_options(args: argparse.Namespace, positive: Sequence[str] = (), **least: int) -> None:
    """Raise ConfigError if a number is under its least value, or the output cannot be written.

    Args:
        positive: names of the job's own options that must be above 0, and finite.
        least: least values of others, by name.
    """
    check_run_options(args)
    for name, minimum in least.items():
        if (value := min(as_list(getattr(args, name)))) < minimum:
            raise ConfigError(f"--{name} {value}: give {minimum} or more")
    for name in positive:
        for value in as_list(getattr(args, name)):
            if not 0 < value < math.inf:
                raise ConfigError(f"--{name} {value:g}: give more than 0" + (", and finite" if value > 0 else ""))
    check_output(args.output, args.overwrite)


def as_list(value: int | float | list) -> list:
    """An option's values: itself if it takes several."""
    return value if isinstance(value, list) else [value]


class Machine(NamedTuple):
    """This process among all, its device, and the type that backbones compute in."""
    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """No gradients, and half precision unless dtype is float32."""
        with torch.no_grad(), autocast(self.device, self.dtype):
            yield


def start(args: argparse.Namespace) -> Machine:
    """Join the other processes, if there are any; the device and precision of the options.

    Raises:
        ConfigError: there is no such device, or the other processes do not join.
    """
    processes = init_distributed_mode(args.device, timeout=timedelta(minutes=args.dist_timeout))
    if processes.device.type == "cpu":
        keep_freed_memory()
    return Machine(processes.rank, processes.world_size, processes.device,
                   choose_dtype(args.precision, processes.device))


def patch_features(model: Backbone, images: torch.Tensor, args: argparse.Namespace, machine: Machine) -> torch.Tensor:
    """Features [B, N, D] of the patches of normalised images [B, 3, H, W]: those of --feature and --layer."""
    with machine.frozen():
        found = model.features(images, args.layer, keys=args.feature == "keys")
    return getattr(found, args.feature)


def patch_width(model: Backbone, args: argparse.Namespace, machine: Machine) -> int:
    """D of patch_features: keys of grouped-query attention are narrower than the network."""
    if args.feature == "patches":
        return model.embed_dim
    image = torch.zeros(1, 3, 2 * model.patch_size, 2 * model.patch_size, device=machine.device)
    return patch_features(model, image, args, machine).shape[2]


def image_feature(candidate: Candidate, args: argparse.Namespace, dtype: torch.dtype) -> ImageFeature:
    """The ImageFeature of --feature and --layer.

    Raises:
        ConfigError: the network does not offer it; the message names the network.
    """
    try:
        return ImageFeature(candidate.model, args.feature, args.layer, candidate.head, dtype)
    except ConfigError as error:
        raise ConfigError(f"{candidate.name}: {error}") from None


Column = dict[str, float | int]


Result = TypeVar("Result")


def evaluate_each(candidates: list[Candidate], evaluate: Callable[[Candidate], Result],
                  device: torch.device) -> dict[str, Result]:
    """evaluate(candidate) of every candidate, by name; one network at a time, with its head, is on the device.

    Raises:
        ConfigError: evaluate raises it, or another process has ended, as it does after an error of its own.
    """
    table = {}
    for candidate in candidates:
        modules = [module for module in (candidate.model, candidate.head) if module is not None]
        for module in modules:
            module.to(device).requires_grad_(False)
        try:
            table[candidate.name] = evaluate(candidate)
        except RuntimeError as error:
            if not (is_distributed() and "gloo/transport" in str(error)):  # where gloo finds a connection closed
                raise
            raise ConfigError("another process of this job has ended: its own message says why") from None
        for module in modules:
            module.to("cpu")
    return table


def side_by_side(title: str, table: dict[str, Column]) -> str:
    """A column for every backbone; floats are shares, printed in per cent, and integers counts."""
    def cell(value: float | int | None) -> str:
        return "-" if value is None else f"{100 * value:.2f}" if isinstance(value, float) else str(value)

    rows = dict.fromkeys(row for column in table.values() for row in column)
    return format_table([title, *table], [[row, *(cell(column.get(row)) for column in table.values())] for row in rows])


def leave() -> bool:
    """End the exchange with other processes; whether this is the first of them, which reports."""
    first = get_rank() == 0
    if is_distributed():
        dist.destroy_process_group()
    return first


def finish(args: argparse.Namespace, title: str, candidates: list[Candidate], table: dict[str, Column],
           **more) -> None:
    """End the processes' exchange; the first one prints the table and writes the JSON file.

    Args:
        more: what else the JSON file gets.
    """
    if not leave():
        return
    print(side_by_side(title, table))
    if args.output:
        options = {name: value if isinstance(value, int | float | str | list | None) else str(value)
                   for name, value in vars(args).items()}
        networks = [candidate.summary() | {"figures": table[candidate.name]} for candidate in candidates]
        write_json({"evaluation": title, "options": options, "networks": networks, **more}, args.output)
