"""What visualize.py's pictures are made of, and those of attention maps and positives, as PIL images."""
import math

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from selfpatch.errors import ConfigError

COLOURS = ("#ff3b30", "#34c759", "#0a84ff", "#ffcc00", "#ff2dce", "#00e5ff", "#ff9500", "#af7cff", "#ffffff")
PANEL_WIDTH, LABEL_HEIGHT, GAP = 416, 30, 6
MIN_CELL, MAX_CELL = 24, 40  # side in pixels of a drawn patch: room for a digit


def fit_patches(image: Image.Image, short_side: int, patch_size: int) -> Image.Image:
    """The image, scaled to short_side and cropped at the right and bottom to whole patches."""
    if short_side < 3 * patch_size:
        raise ConfigError(f"--image_size {short_side} is under 3 patches of {patch_size}: give {3 * patch_size} or "
                          "more")
    if max(image.size) > 16 * min(image.size):
        raise ConfigError(f"the image is {image.width}×{image.height}: with one side more than 16 times the other it "
                          "has too many patches, crop it")
    scale = short_side / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
    return image.crop((0, 0, *(side // patch_size * patch_size for side in image.size)))


def labelled_panels(panels: list[tuple[str, Image.Image]], columns: int) -> Image.Image:
    """Panels of one size on a white sheet, row by row, each below its label."""
    width, height = panels[0][1].size
    rows = -(-len(panels) // columns)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + LABEL_HEIGHT + GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(20)
    for i, (label, panel) in enumerate(panels):
        x, y = GAP + i % columns * (width + GAP), i // columns * (height + LABEL_HEIGHT + GAP)
        draw.text((x + 2, y + LABEL_HEIGHT // 2), label, "black", font, anchor="lm")
        sheet.paste(panel, (x, y + LABEL_HEIGHT))
    return sheet


def heat(values: np.ndarray, size: tuple[int, int], limits: tuple[float, float] | None = None) -> Image.Image:
    """Values [rows, columns] as colours, dark at their minimum and bright at their maximum; a flat cell per patch.

    Args:
        size: width and height of the picture.
        limits: the least and the largest value of all, instead of these values' own.
    """
    low, high = limits or (values.min(), values.max())
    levels = np.uint8(255 * (values - low) / (high - low if high > low else 1))
    colours = cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
    return Image.fromarray(colours).resize(size, Image.Resampling.NEAREST)


def attention_maps(image: Image.Image, maps: np.ndarray, patch: tuple[int, int] | None, patch_size: int) -> Image.Image:
    """The image, the mean map and one map per head, each scaled to its own minimum and maximum.

    Args:
        maps: attention [heads, rows, columns].
        patch: row and column of the query, marked in every panel; None if that is the class token.
    """
    size = (PANEL_WIDTH, round(PANEL_WIDTH * image.height / image.width))
    panels = [("image", image.resize(size, Image.Resampling.BICUBIC)), ("mean of the heads", heat(maps.mean(0), size))]
    panels += [(f"head {i + 1}", heat(values, size)) for i, values in enumerate(maps)]
    if patch is not None:
        cell = patch_size * size[0] / image.width
        y, x = patch[0] * cell, patch[1] * cell
        for _, panel in panels:
            ImageDraw.Draw(panel).rectangle((x - 2, y - 2, x + cell + 1, y + cell + 1), outline="#00e5ff", width=2)
    return labelled_panels(panels, columns=math.ceil((1.5 * len(panels)) ** 0.5))


def positives(image: Image.Image, patch_size: int, patches: list[tuple[int, int]],
              chosen: list[list[tuple[int, int]]]) -> Image.Image:
    """The image enlarged, each patch in a thick frame and its positives numbered in the same colour, best first.

    Args:
        patches: (row, column) of the matched patches.
        chosen: (row, column) of the positives of each, best first.
    """
    rows, columns = image.height // patch_size, image.width // patch_size
    cell = min(max(1600 // columns, MIN_CELL), MAX_CELL)
    canvas = image.resize((columns * cell, rows * cell), Image.Resampling.BICUBIC)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(0.65 * cell)
    for i, (patch, picks) in enumerate(zip(patches, chosen, strict=True)):
        colour = COLOURS[i % len(COLOURS)]
        for number, (row, column) in enumerate(picks, start=1):
            x, y = column * cell, row * cell
            draw.rectangle((x + 2, y + 2, x + cell - 3, y + cell - 3), outline=colour, width=2)
            draw.text((x + cell / 2, y + cell / 2), str(number), "white", font, anchor="mm",
                      stroke_width=2, stroke_fill="black")
        x, y = patch[1] * cell, patch[0] * cell
        draw.rectangle((x - 1, y - 1, x + cell, y + cell), outline="black", width=6)
        draw.rectangle((x, y, x + cell - 1, y + cell - 1), outline=colour, width=4)
    return canvas
