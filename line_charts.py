"""Line charts as PIL images: panels with axes, one line per run."""
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from drawing import COLOURS

LINE_COLOURS = COLOURS[:8]  # the others cannot be seen on white
WIDTH, HEIGHT = 480, 300  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 72, 18, 34, 40  # around its plot
SCALE = 2  # drawn larger, then reduced: smooth lines


class Panel(NamedTuple):
    """One chart: for each run a line, points [N, 2] of x and y (None where it has none), and levels to compare with.

    levels: y -> label, drawn as dashed lines.
    """
    title: str
    lines: list[np.ndarray | None]
    levels: dict[float, str] = {}


def ticks(low: float, high: float, count: int) -> list[float]:
    """At most count + 1 round numbers from low to high, a multiple of 1, 2 or 5 times a power of ten apart."""
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= count)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def limits(values: np.ndarray, margin: float) -> tuple[float, float]:
    """The least and the largest value and a margin, a share of what lies between; never an empty range."""
    low, high = float(values.min()), float(values.max())
    space = margin * (high - low)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        space = 0.05 * abs(high) or 1.0
    return low - space, high + space


def thin_out(points: np.ndarray, columns: int) -> np.ndarray:
    """Points [N, 2] with ascending x; of those that would fall into the same column of pixels the mean."""
    x = points[:, 0]
    if len(points) <= columns or x[-1] <= x[0]:
        return points
    place = ((x - x[0]) / (x[-1] - x[0]) * (columns - 1)).astype(int)
    counts = np.bincount(place)
    sums = np.stack([np.bincount(place, column) for column in points.T], 1)
    return sums[counts > 0] / counts[counts > 0, None]


def format_tick(value: float, largest: float) -> str:
    """A tick's label; in powers of ten where even the largest tick of its axis is small."""
    if value == 0 or largest >= 0.01:
        return f"{value:,.6g}"
    digits, exponent = f"{value:.3e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def draw_axes(draw: ImageDraw.ImageDraw, panel: Panel, x_limits: tuple[float, float], y_limits: tuple[float, float],
              x_label: str, place) -> None:
    """Title, grid, ticks and the dashed levels of a panel."""
    font, small = ImageFont.load_default(15 * SCALE), ImageFont.load_default(12 * SCALE)
    (left, bottom), (right, top) = place(x_limits[0], y_limits[0]), place(x_limits[1], y_limits[1])
    draw.text((left, top - 8 * SCALE), panel.title, "black", font, anchor="ls")
    y_ticks = ticks(*y_limits, 5)
    for value in y_ticks:
        y = place(0, value)[1]
        draw.line((left, y, right, y), "#dddddd", SCALE)
        draw.text((left - 6 * SCALE, y), format_tick(value, max(map(abs, y_ticks))), "black", small, anchor="rm")
    for value in ticks(*x_limits, 6):
        x = place(value, 0)[0]
        draw.line((x, bottom, x, bottom + 4 * SCALE), "black", SCALE)
        draw.text((x, bottom + 6 * SCALE), format_tick(value, 1), "black", small, anchor="mt")
    draw.text((right, bottom + 22 * SCALE), x_label, "black", small, anchor="rt")
    draw.line((left, top, left, bottom, right, bottom), "black", SCALE)
    for value, label in panel.levels.items():
        y = place(0, value)[1]
        for x in range(round(left), round(right), 10 * SCALE):
            draw.line((x, y, min(x + 5 * SCALE, right), y), "#666666", SCALE)
        draw.text((right - 2 * SCALE, y - 2 * SCALE), label, "#444444", small, anchor="rb")


def draw_panel(panel: Panel, x_limits: tuple[float, float], x_label: str) -> Image.Image:
    image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), "white")
    draw, drawn = ImageDraw.Draw(image), [line for line in panel.lines if line is not None]
    y_limits = limits(np.concatenate([*(line[:, 1] for line in drawn), list(panel.levels)]), 0.08)
    plot_width, plot_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        """Pixels of a point."""
        across, up = (x - x_limits[0]) / (x_limits[1] - x_limits[0]), (y - y_limits[0]) / (y_limits[1] - y_limits[0])
        return SCALE * (LEFT + across * plot_width), SCALE * (TOP + (1 - up) * plot_height)

    draw_axes(draw, panel, x_limits, y_limits, x_label, place)
    for i, line in enumerate(panel.lines):
        if line is None:
            continue
        points = [place(x, y) for x, y in thin_out(line, plot_width)]
        colour = LINE_COLOURS[i % len(LINE_COLOURS)]
        # earlier lines are wider, and show beneath later ones that are equal
        draw.line(points, colour, 2 * SCALE + 2 * min(len(panel.lines) - 1 - i, 3), joint="curve")
        if len(points) <= 30:  # where there are few, each can be seen
            for x, y in points:
                draw.circle((x, y), 3 * SCALE, colour)
    return image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def line_charts(panels: Sequence[Panel], labels: list[str], x_label: str, columns: int = 3) -> Image.Image:
    """Panels row by row below one legend; all have the same x axis.

    Args:
        labels: of the runs, in the order of each panel's lines.
    """
    font, columns = ImageFont.load_default(16), min(columns, len(panels))
    legend, x, y = [], LEFT, 20
    for label in labels:
        width = 40 + round(font.getlength(label))
        if x > LEFT and x + width > columns * WIDTH:
            x, y = LEFT, y + 26
        legend.append((x, y))
        x += width + 24
    top, rows = y + 24, -(-len(panels) // columns)
    image = Image.new("RGB", (columns * WIDTH, top + rows * HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    for i, ((x, y), label) in enumerate(zip(legend, labels, strict=True)):
        draw.line((x, y, x + 24, y), LINE_COLOURS[i % len(LINE_COLOURS)], 4)
        draw.text((x + 32, y), label, "black", font, anchor="lm")
    every_x = np.concatenate([line[:, 0] for panel in panels for line in panel.lines if line is not None])
    x_limits = limits(np.append(every_x, 0), 0)
    for i, panel in enumerate(panels):
        image.paste(draw_panel(panel, x_limits, x_label), (i % columns * WIDTH, top + i // columns * HEIGHT))
    return image
