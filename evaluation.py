"""What the evaluations of frozen features share: the options of backbones and speed, the table and the JSON file."""
import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoints import load_backbone
from distributed import Launch, join, keep_freed_memory, pick_device, read_launcher
from errors import ConfigError, user_path

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_backbone_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("backbones, each a column of the table")
    group.add_argument("--pretrained_weights", nargs="+", default=[], type=os.path.expanduser, metavar="FILE",
                       help="checkpoints of any kind")
    group.add_argument("--random_weights", action="store_true",
                       help="an untrained network as well, for comparison; alone or after the checkpoints")
    group.add_argument("--checkpoint_key", default="teacher", help="network of a training run: teacher or student")
    group.add_argument("--arch", help="default: the checkpoint's own; vit_small without one")
    group.add_argument("--patch_size", type=int, help="default: the checkpoint's own; 16 without one")
    group.add_argument("--layer", type=int, default=-1,
                       help="block that the features are taken from: 0 is the first, -1 the last; dense features are "
                            "often better before the last one")
    group.add_argument("--seed", type=int, default=0, help="of the untrained network and of everything random")


def add_run_options(parser: argparse.ArgumentParser, batch_size: int) -> None:
    group = parser.add_argument_group("speed and output")
    group.add_argument("--bs", type=int, default=batch_size, help="images per batch and process")
    group.add_argument("--num_workers", type=int, default=2, help="processes that read images, for each process")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps; auto is the GPU if there is one")
    group.add_argument("--precision", default="auto", choices=["auto", *DTYPES],
                       help="of the backbone; auto: bf16 on a GPU that supports it, otherwise fp32")
    group.add_argument("--output", type=user_path, help="JSON file to write the table to")
    group.add_argument("--overwrite", action="store_true", help="replace an existing output file")


def start(args: argparse.Namespace) -> tuple[Launch, torch.device, torch.dtype]:
    """This process, its device, and the type that its backbones compute in; checks the common options.

    Raises:
        ConfigError: an option is out of range, there is no backbone, or the output cannot be written.
    """
    for name, least in (("bs", 1), ("num_workers", 0), ("patch_size", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name} {value}: give {least} or more")
    if not args.pretrained_weights and not args.random_weights:
        raise ConfigError("--pretrained_weights is missing: give one or several checkpoints, or --random_weights to "
                          "evaluate an untrained network")
    check_output(args.output, args.overwrite)
    launch = read_launcher()
    name = "cpu" if args.device == "auto" and not torch.cuda.is_available() else args.device
    device = pick_device(name, launch.local_rank % max(torch.cuda.device_count(), 1))
    if device.type == "cpu":
        keep_freed_memory()
    precision = args.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    join(launch, "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    return launch, device, DTYPES[precision]


def check_output(output: Path | None, overwrite: bool, suffix: str = ".json") -> None:
    """Refuse, before the work, an output file that exists or cannot be written."""
    if output is None:
        return
    if output.suffix.lower() != suffix:
        raise ConfigError(f"--output {output}: give a name that ends in {suffix}")
    if not output.parent.is_dir():
        raise ConfigError(f"--output {output}: {output.parent} is not a folder, create it first")
    if output.exists() and not overwrite:
        raise ConfigError(f"--output {output} exists: give another name, or --overwrite")


class Backbone(NamedTuple):
    """A network to evaluate, and the name of its column."""
    name: str
    model: torch.nn.Module


def load_backbones(args: argparse.Namespace, launch: Launch) -> list[Backbone]:
    """All backbones of the options, on the CPU, so that a bad file ends the job at once; rank 0 prints one line each.

    Raises:
        ConfigError: see checkpoints.load_backbone; or a backbone has no block --layer.
    """
    files = [(name, path, False) for name, path in zip(short_names(args.pretrained_weights), args.pretrained_weights,
                                                       strict=True)]
    files += [("random", "", True)] if args.random_weights else []
    backbones, arch, patch_size = [], args.arch, args.patch_size
    for name, path, random in files:
        torch.manual_seed(args.seed)
        with contextlib.redirect_stdout(sys.stdout if launch.rank == 0 else None):
            model = load_backbone(path, args.checkpoint_key, arch, patch_size, random)
        depth = len(model.blocks)
        if not -depth <= args.layer < depth:
            raise ConfigError(f"--layer {args.layer}: {name} has the blocks 0 to {depth - 1}, or -{depth} to -1")
        backbones.append(Backbone(name, model.eval().requires_grad_(False)))
    return backbones


def short_names(paths: list[str]) -> list[str]:
    """File names without the folders that all of them are in, or that add nothing."""
    stems = [Path(path).stem for path in paths]
    return [stem if stems.count(stem) == 1 and stem != "checkpoint" else str(Path(path).with_suffix(""))
            for stem, path in zip(stems, paths, strict=True)]


Table = dict[str, dict[str, float | str]]


def format_table(title: str, table: Table) -> str:
    """Figures by backbone and row as text: a column for every backbone; floats are shares, printed in per cent."""
    def cell(value: float | str | None) -> str:
        return "-" if value is None else f"{100 * value:.2f}" if isinstance(value, float) else str(value)

    rows = list(dict.fromkeys(row for column in table.values() for row in column))
    left = max(map(len, [*rows, title]))
    widths = [max(len(name), *(len(cell(column.get(row))) for row in rows)) for name, column in table.items()]
    lines = [title.ljust(left) + "".join(f"  {name:>{width}}" for name, width in zip(table, widths, strict=True))]
    lines += [row.ljust(left) + "".join(f"  {cell(column.get(row)):>{width}}" for column, width in
                                        zip(table.values(), widths, strict=True)) for row in rows]
    return "\n".join(lines)


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


def evaluate_each(args: argparse.Namespace, title: str, launch: Launch, backbones: list[Backbone],
                  evaluate: Callable[[torch.nn.Module], dict[str, float | str]], device: torch.device) -> Table:
    """Figures of every backbone by `evaluate`; rank 0 prints the table and writes the JSON file.

    Returns:
        Figures by backbone and row.
    """
    table = {}
    for name, model in backbones:
        table[name] = evaluate(model.to(device))
        model.to("cpu")  # one network at a time on the device
    if launch.rank == 0:
        print(format_table(title, table))
        if args.output:
            write_json(args.output, {"job": title, "options": vars(args), "results": table})
            print(f"wrote {args.output}")
    return table


@contextlib.contextmanager
def autocast(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """No gradients, and half precision unless dtype is float32."""
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        yield
