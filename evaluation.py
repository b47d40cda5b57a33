"""What the evaluations of frozen features share: processes, options of speed and output, table and JSON file."""
import argparse
import contextlib
import json
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch

from distributed import Launch, join, keep_freed_memory, pick_device, read_launcher
from errors import ConfigError, user_path
from model_options import Candidate, add_model_options

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_evaluation_options(parser: argparse.ArgumentParser, batch_size: int = 1, batch: str | None = None) -> None:
    """Add the options of backbones (several), speed and output.

    Args:
        batch_size: the default of --bs.
        batch: what --bs counts; None for a job without it.
    """
    add_model_options(parser.add_argument_group("backbones, each a column of the table"), several=True)
    group = parser.add_argument_group("speed and output")
    if batch:
        group.add_argument("--bs", type=int, default=batch_size, help=batch)
    group.add_argument("--num_workers", type=int, default=2, help="processes that read images, for each process")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps; auto is the GPU if there is one")
    group.add_argument("--precision", default="auto", choices=["auto", *DTYPES],
                       help="of the backbone; auto: bf16 on a GPU that supports it, otherwise fp32")
    group.add_argument("--seed", type=int, default=0, help="of the untrained network and of everything random")
    group.add_argument("--output", type=user_path, help="JSON file to write the table to")
    group.add_argument("--overwrite", action="store_true", help="replace existing output")


class Machine(NamedTuple):
    """This process among all, its device, and the type that backbones compute in."""
    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """No gradients, and half precision unless dtype is float32."""
        with torch.no_grad(), torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            yield


def check_options(args: argparse.Namespace, **least: int) -> None:
    """Raise ConfigError if a number is under its least value, or the output cannot be written.

    Args:
        least: of the job's own options, by name; those of add_evaluation_options are checked as well.
    """
    for name, minimum in {"bs": 1, "num_workers": 0, "patch_size": 1, "seed": 0, **least}.items():
        value = getattr(args, name, None)
        if value is not None and value < minimum:
            raise ConfigError(f"--{name} {value}: give {minimum} or more")
    output = args.output
    if output is None:
        return
    if output.suffix.lower() != ".json":
        raise ConfigError(f"--output {output}: give a name that ends in .json")
    if not output.parent.is_dir():
        raise ConfigError(f"--output {output}: {output.parent} is not a folder, create it first")
    if output.exists() and not args.overwrite:
        raise ConfigError(f"--output {output} exists: give another name, or --overwrite")


def pick_machine(args: argparse.Namespace, launch: Launch) -> Machine:
    """Device and precision of the options; more processes than GPUs share them, an Apple GPU only if asked for."""
    name = "cpu" if args.device == "auto" and not torch.cuda.is_available() else args.device
    device = pick_device(name, launch.local_rank % max(torch.cuda.device_count(), 1))
    if device.type == "cpu":
        keep_freed_memory()
    precision = args.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return Machine(launch.rank, launch.world_size, device, DTYPES[precision])


def start(args: argparse.Namespace) -> tuple[Launch, Machine]:
    """This process by its launcher, and its machine; meet the others with meet() once all inputs are checked."""
    launch = read_launcher()
    return launch, pick_machine(args, launch)


def meet(launch: Launch, machine: Machine) -> None:
    """Join the other processes of the job, if there are any."""
    join(launch, "nccl" if machine.device.type == "cuda" else "gloo", timeout=timedelta(hours=2))


Column = dict[str, float | int | str]


def evaluate_each(candidates: list[Candidate], evaluate: Callable[[Candidate], Column],
                  device: torch.device) -> dict[str, Column]:
    """evaluate(candidate) of every candidate, by name; one network at a time is on the device."""
    table = {}
    for candidate in candidates:
        candidate.model.to(device).requires_grad_(False)
        table[candidate.name] = evaluate(candidate)
        candidate.model.to("cpu")
    return table


def format_table(title: str, table: dict[str, Column]) -> str:
    """Figures as text, a column for every backbone; floats are shares, printed in per cent."""
    def cell(value: float | int | str | None) -> str:
        return "-" if value is None else f"{100 * value:.2f}" if isinstance(value, float) else str(value)

    rows = list(dict.fromkeys(row for column in table.values() for row in column))
    left = max(map(len, [*rows, title]))
    widths = [max(len(name), *(len(cell(column.get(row))) for row in rows)) for name, column in table.items()]
    lines = [title.ljust(left) + "".join(f"  {name:>{width}}" for name, width in zip(table, widths, strict=True))]
    lines += [row.ljust(left) + "".join(f"  {cell(column.get(row)):>{width}}" for column, width in
                                        zip(table.values(), widths, strict=True)) for row in rows]
    return "\n".join(lines)


def report(args: argparse.Namespace, title: str, table: dict[str, Column], **more) -> None:
    """Print the table, and write it with the options, and anything more, to --output if that is given."""
    print(format_table(title, table))
    if args.output:
        write_json(args.output, {"title": title, "options": vars(args), "results": table, **more})
        print(f"wrote {args.output}")


def write_json(output: Path, content: dict) -> None:
    """Write a JSON file whole or not at all."""
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=2, default=str) + "\n")
        os.replace(temporary, output)
    except OSError as error:
        raise ConfigError(f"--output {output}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
