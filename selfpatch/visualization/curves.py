"""The picture of visualize.py that shows how runs went: curves from log.txt and steps.jsonl."""
import argparse
import importlib.util
import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from selfpatch.errors import ConfigError
from selfpatch.evaluation.tables import check_png, tell_apart
from selfpatch.pretraining.logs import parse_row, rows_until

# title, name in steps.jsonl, name in log.txt, name of its ln K in steps.jsonl
CURVES = (("loss", "loss", "train_loss", ""),
          ("image loss", "image_loss", "train_clsloss", "image_ln_k"),
          ("patch loss", "patch_loss", "train_patchloss", "patch_ln_k"),
          ("entropy of the teacher's image assignments", "image_entropy", "train_cls_entropy", "image_ln_k"),
          ("entropy of the teacher's patch assignments", "patch_entropy", "train_patch_entropy", "patch_ln_k"),
          ("learning rate", "lr", "train_lr", ""),
          ("largest gradient norm", "gradient_norm", "", ""),
          ("images/s", "images_per_second", "", ""),
          ("share of time that waited for data", "data_wait", "", ""),
          ("k-NN top-1, %", "", "knn_top1", ""))


COLOURS = 10  # of matplotlib's cycle


class Panel(NamedTuple):
    """One chart: for each run a line, points [N, 2] of epoch and value (None where it has none), and dashed levels.

    levels: value -> label.
    """
    title: str
    lines: list[np.ndarray | None]
    levels: dict[float, str]


def read_run(folder: Path) -> tuple[list[dict], list[dict]]:
    """The rows of steps.jsonl and of log.txt, each up to its last whole line.

    Raises:
        ConfigError: the folder has neither.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; give the --output_dir of a run")
    steps, log = folder / "steps.jsonl", folder / "log.txt"
    try:
        step_rows = [json.loads(line) for line in rows_until(steps.read_bytes(), math.inf)] if steps.is_file() else []
        text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be read ({error.strerror})") from None
    epoch_rows = {}
    for row in filter(None, map(parse_row, text.splitlines())):
        if row["epoch"] == 0:  # another run began where an older one had written
            epoch_rows = {}
        epoch_rows[row["epoch"]] = row
    if not step_rows and not epoch_rows:
        raise ConfigError(f"{folder}: no rows in log.txt or steps.jsonl; give the --output_dir of a run that has "
                          "trained for a while")
    return step_rows, [epoch_rows[epoch] for epoch in sorted(epoch_rows)]


def points(rows: list[dict], name: str, shift: int = 0) -> np.ndarray | None:
    """[N, 2] of epoch and value, None if no row has a number of that name.

    Args:
        shift: added to the epoch.
    """
    found = [(row["epoch"] + shift, row[name]) for row in rows
             if isinstance(row.get(name), (int, float)) and math.isfinite(row[name])]
    return np.array(found, dtype=float) if found else None


def make_panels(runs: list[tuple[list[dict], list[dict]]]) -> list[Panel]:
    """One panel for each of CURVES that a run has; by steps where the run has them, else by epochs."""
    panels = []
    for title, step_name, epoch_name, level_name in CURVES:
        lines, levels = [], {}
        for step_rows, epoch_rows in runs:
            # a mean over epoch 0 stands where that ends
            by_step, by_epoch = points(step_rows, step_name), points(epoch_rows, epoch_name, shift=1)
            lines.append(by_epoch if by_step is None else by_step)
            if level_name and step_rows and level_name in step_rows[-1]:
                levels[step_rows[-1][level_name]] = "ln K"
        used = any(line is not None and line[:, 1].any() for line in lines)  # DINO's patch loss is 0 throughout
        if used:
            panels.append(Panel(title, lines, levels))
    return panels


def draw_panels(panels: list[Panel], labels: list[str]):
    """A matplotlib Figure of the panels, three in a row, below one legend.

    Args:
        labels: of the runs, in the order of each panel's lines; runs of the same label have one colour.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    distinct = list(dict.fromkeys(labels))
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.8 * columns, 3 * rows + 0.4), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, panel in zip(axes, panels, strict=False):
        axis.set_title(panel.title, loc="left", fontsize="medium")
        axis.grid(color="0.87")
        for i, line in enumerate(panel.lines):
            if line is not None:
                # earlier lines are wider, and show beneath later ones that are equal; few points can each be seen
                place = distinct.index(labels[i])
                width = 1.5 + 1.5 * min(len(distinct) - 1 - place, 3)
                axis.plot(*line.T, f"C{place}", linewidth=width, marker="o" if len(line) <= 30 else "", markersize=3)
        for level, label in panel.levels.items():
            axis.axhline(level, color="0.4", linestyle="--", linewidth=1)
            axis.annotate(label, (1, level), xycoords=axis.get_yaxis_transform(), ha="right", va="top")
    for axis in axes[len(panels):]:
        axis.set_axis_off()
    for axis in axes[max(len(panels) - columns, 0):len(panels)]:
        axis.set_xlabel("epoch")
    figure.legend([Line2D([], [], color=f"C{i}") for i in range(len(distinct))], distinct, loc="outside upper left",
                  ncols=len(distinct), frameon=False)
    return figure


def draw_curves(args: argparse.Namespace) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("visualize.py curves needs the package matplotlib: pip install matplotlib")
    output = check_png(args.output, args.overwrite)
    if len(args.runs) > COLOURS:
        raise ConfigError(f"{len(args.runs)} runs: give at most {COLOURS}, or their colours repeat")
    labels = args.labels or tell_apart([Path(run).resolve().name for run in args.runs])
    if len(labels) != len(args.runs):
        raise ConfigError(f"--labels: {len(labels)} given for {len(args.runs)} runs")
    runs = [read_run(Path(run)) for run in args.runs]
    panels = make_panels(runs)
    if not panels:
        raise ConfigError(f"{', '.join(args.runs)}: no losses or rates in log.txt or steps.jsonl")
    draw_panels(panels, labels).savefig(output, dpi=150)
    print(f"wrote {output}: " + ", ".join(f"{label} ({len(steps)} rows of steps, {len(epochs)} of epochs)" for
                                          label, (steps, epochs) in zip(labels, runs, strict=True)))


def add_curves(subparsers) -> None:
    parser = subparsers.add_parser("curves", help="losses, rates and k-NN of runs, from log.txt and steps.jsonl")
    parser.add_argument("runs", nargs="+", type=os.path.expanduser, metavar="RUN", help="folders of runs")
    parser.add_argument("--labels", nargs="+", help="their labels; default: the folders' names")
    parser.add_argument("--output", default="curves.png", type=os.path.expanduser, help="PNG to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output file")
    parser.set_defaults(func=draw_curves)
