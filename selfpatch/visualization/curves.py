"""Curves of training runs, from their log.txt and steps.jsonl.

    panels = make_panels([read_run(Path("runs/small"))])
    draw_panels(panels, ["small"]).savefig("curves.png")
"""
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from selfpatch.errors import ConfigError
from selfpatch.pretraining.logs import parse_row, rows_until

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# title, key in steps.jsonl, key in log.txt, key of its ln K in steps.jsonl
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
NUM_COLOURS = 10  # in matplotlib's cycle


class Panel(NamedTuple):
    """One chart: for each run its points [N, 2] of (epoch, value), or None; and dashed levels, value -> label."""
    title: str
    lines: list[np.ndarray | None]
    levels: dict[float, str]


def read_run(folder: Path) -> tuple[list[dict], list[dict]]:
    """Read the rows of steps.jsonl and of log.txt, each up to its last whole line.

    Raises:
        ConfigError: the folder does not exist, has no rows, or cannot be read.
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
        if row["epoch"] == 0:  # a new run wrote into the folder of an older one
            epoch_rows = {}
        epoch_rows[row["epoch"]] = row
    if not step_rows and not epoch_rows:
        raise ConfigError(f"{folder}: no rows in log.txt or steps.jsonl; give the --output_dir of a run that has "
                          "trained for a while")
    return step_rows, [epoch_rows[epoch] for epoch in sorted(epoch_rows)]


def points(rows: list[dict], name: str, shift: int = 0) -> np.ndarray | None:
    """Collect (epoch + shift, value) of all rows with a finite number under this name: [N, 2], or None."""
    found = [(row["epoch"] + shift, row[name]) for row in rows
             if isinstance(row.get(name), (int, float)) and math.isfinite(row[name])]
    return np.array(found, dtype=float) if found else None


def make_panels(runs: list[tuple[list[dict], list[dict]]]) -> list[Panel]:
    """Make a panel for each of CURVES that occurs in a run (rows of steps, rows of epochs), by steps where it can."""
    panels = []
    for title, step_name, epoch_name, level_name in CURVES:
        lines, levels = [], {}
        for step_rows, epoch_rows in runs:
            # the mean over epoch 0 is drawn at its end
            by_step, by_epoch = points(step_rows, step_name), points(epoch_rows, epoch_name, shift=1)
            lines.append(by_epoch if by_step is None else by_step)
            if level_name and step_rows and level_name in step_rows[-1]:
                levels[step_rows[-1][level_name]] = "ln K"
        used = any(line is not None and line[:, 1].any() for line in lines)  # DINO's patch loss is 0 throughout
        if used:
            panels.append(Panel(title, lines, levels))
    return panels


def plain_text(label: str) -> str:
    """A label that matplotlib shows as it is: no formula between $ signs, and not left out for a _ at its beginning."""
    return ("\u200b" if label.startswith("_") else "") + label.replace("$", r"\$")


def draw_panels(panels: list[Panel], labels: list[str]) -> "Figure":
    """Draw the panels, three in a row, below one legend.

    Args:
        labels: of the runs, in the order of each panel's lines; runs with the same label share a colour.
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
                # earlier lines are wider, to show beneath equal later ones; single points are marked if they are few
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
    figure.legend([Line2D([], [], color=f"C{i}") for i in range(len(distinct))],
                  [plain_text(label) for label in distinct], loc="outside upper left",
                  ncols=len(distinct), frameon=False)
    return figure
