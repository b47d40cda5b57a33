"""Pictures of patch features: principal components as colours, similarity to one patch, boxes."""
import math

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from selfpatch.visualization.drawing import COLOURS, PANEL_WIDTH, heat, labelled_panels

BACKGROUND = (24, 24, 24)  # of patches that are no foreground


# ---------------------------------------------------------------- principal components

def principal_components(features: torch.Tensor, count: int = 3) -> torch.Tensor:
    """Projections of features [M, D] on their first principal components, float32 [M, count].

    A component's sign is arbitrary; here its weight of the largest absolute value is positive, so that colours do not
    change from one run to the next.
    """
    centred = features.double() - features.double().mean(0)
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -count:].flip(1)
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return (centred @ (directions * largest.sign())).float()


def split_foreground(first: torch.Tensor, grids: list[tuple[int, int]]) -> torch.Tensor:
    """Which patches are foreground by the first principal component [M] of images with these grids: bool [M].

    The component splits the patches in two, see upper_side. Of the two signs of a background, that it has most of the
    border and that it has more of the border than of all patches, the first fails for an object that fills its image,
    the second for one in a corner: the stronger one decides.
    """
    upper, border = upper_side(first), torch.cat([border_patches(grid) for grid in grids])
    of_border, of_all = float(upper[border].float().mean()), float(upper.float().mean())
    return ~upper if (of_border - 0.5) + (of_border - of_all) > 0 else upper


def upper_side(values: torch.Tensor) -> torch.Tensor:
    """Which values [M] lie above the cut for which the variance between the two sides is largest (Otsu 1979), bool [M].

    The mean as a cut would go through the noise of the larger side where the other one is small. The outermost 2 % of
    the values at either end count as the next ones, as a few patches far from all others are no side.
    """
    low, high = (values.double().quantile(q) for q in (0.02, 0.98))
    levels = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).mul(255).round().byte().cpu().numpy()
    cut, _ = cv2.threshold(levels, 0, 255, cv2.THRESH_OTSU)
    return torch.from_numpy(levels > cut).to(values.device)


def border_patches(grid: tuple[int, int]) -> torch.Tensor:
    """The outermost patches of a grid, bool [N]."""
    inside = torch.zeros(grid, dtype=torch.bool)
    inside[1:-1, 1:-1] = True
    return ~inside.flatten()


def component_colours(features: torch.Tensor, grids: list[tuple[int, int]],
                      foreground: bool = True) -> tuple[list[np.ndarray], torch.Tensor]:
    """Colours of patches by three principal components, fitted over all images together.

    Args:
        features: [M, D] of all images' patches, one image after the other.
        grids: rows and columns of each image.
        foreground: colour the foreground alone, by components fitted to it: as DINOv2's figures (Oquab et al. 2023,
            Sec. 7.5); False colours all patches.

    Returns:
        RGB, uint8 [rows, columns, 3] of each image, and which patches are coloured, bool [M].
    """
    coloured = torch.ones(len(features), dtype=torch.bool)
    if foreground:
        chosen = split_foreground(principal_components(features, 1)[:, 0], grids)
        coloured = chosen if chosen.sum() > 3 else coloured
    components = principal_components(features[coloured])
    low, high = components.quantile(0.02, 0), components.quantile(0.98, 0)  # a few outliers would grey all others
    colours = torch.tensor(BACKGROUND, dtype=torch.uint8).repeat(len(features), 1)
    colours[coloured] = ((components - low) / (high - low).clamp(min=1e-12) * 255).clamp(0, 255).byte()
    parts = colours.split([rows * columns for rows, columns in grids])
    return [part.reshape(*grid, 3).numpy() for part, grid in zip(parts, grids, strict=True)], coloured


def component_panels(images: list[Image.Image], colours: list[np.ndarray]) -> Image.Image:
    """Each image beside its patches' colours; images of different shapes are centred on panels of one size."""
    height = max(round(PANEL_WIDTH * image.height / image.width) for image in images)
    height = min(height, 2 * PANEL_WIDTH)
    panels = []
    for number, (image, colour) in enumerate(zip(images, colours, strict=True), start=1):
        flat = Image.fromarray(colour).resize(image.size, Image.Resampling.NEAREST)
        name = f"image {number}" if len(images) > 1 else "image"
        panels += [(name, fit(image, height)), ("principal components", fit(flat, height, Image.Resampling.NEAREST))]
    return labelled_panels(panels, columns=2 if len(images) < 4 else 4)


def fit(image: Image.Image, height: int, resample: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    """The image scaled into PANEL_WIDTH × height, centred on white."""
    scale = min(PANEL_WIDTH / image.width, height / image.height)
    size = [max(1, round(side * scale)) for side in image.size]
    panel = Image.new("RGB", (PANEL_WIDTH, height), "white")
    panel.paste(image.resize(size, resample), ((PANEL_WIDTH - size[0]) // 2, (height - size[1]) // 2))
    return panel


# ---------------------------------------------------------------- similarity to a patch

def similarity(query: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Cosine of a patch's feature [D] to all features [N, D], float32 [N]."""
    return F.normalize(features.float(), dim=-1) @ F.normalize(query.float(), dim=0)


def similarity_panels(images: list[Image.Image], maps: list[np.ndarray], patch: tuple[int, int],
                      patch_size: int) -> Image.Image:
    """Each image beside its map of cosines [rows, columns]; all maps have one scale, written in their labels.

    Args:
        images: the image of the chosen patch, then others.
        patch: row and column of the chosen patch, marked in the first image and in its map.
    """
    low, high = min(map(np.min, maps)), max(map(np.max, maps))
    height = min(max(round(PANEL_WIDTH * image.height / image.width) for image in images), 2 * PANEL_WIDTH)
    panels = []
    for number, (image, values) in enumerate(zip(images, maps, strict=True)):
        pictures = [image.copy(), heat(values, image.size, (low, high))]
        if number == 0:
            x, y = patch[1] * patch_size, patch[0] * patch_size
            width = max(2, round(2 * image.width / PANEL_WIDTH))
            for picture in pictures:
                ImageDraw.Draw(picture).rectangle((x - width, y - width, x + patch_size + width - 1,
                                                   y + patch_size + width - 1), outline=COLOURS[5], width=width)
        name = f"image {number + 1}" + (f", patch {patch[0]},{patch[1]}" if number == 0 else "")
        scale = f"cosine {values.min():.2f} to {values.max():.2f}"
        panels += [(name, fit(pictures[0], height)), (scale, fit(pictures[1], height, Image.Resampling.NEAREST))]
    return labelled_panels(panels, columns=2)


# ---------------------------------------------------------------- boxes

def boxes_over(image: Image.Image, boxes: dict[str, list[tuple[float, float, float, float]]]) -> Image.Image:
    """The image with boxes, each set in a colour of its own, named in a line above.

    Args:
        boxes: xmin, ymin, xmax, ymax by name; the name "true" gets dashed white.
    """
    size = max(12, min(image.size) // 24)
    font, width, line = ImageFont.load_default(size), max(2, min(image.size) // 160), round(1.5 * size)
    canvas = Image.new("RGB", (image.width, image.height + line), "black")
    canvas.paste(image, (0, line))
    draw, x = ImageDraw.Draw(canvas), size // 2
    colours = iter(COLOURS)
    for name, found in boxes.items():
        colour = "white" if name == "true" else next(colours)
        draw.text((x, line // 2), name, colour, font, anchor="lm")
        x += round(draw.textlength(name, font)) + size
        for xmin, ymin, xmax, ymax in found:
            corners = (xmin, ymin + line, max(xmin, xmax - 1), max(ymin, ymax - 1) + line)
            dashed(draw, corners, width) if name == "true" else draw.rectangle(corners, outline=colour, width=width)
    return canvas


def dashed(draw: ImageDraw.ImageDraw, corners: tuple[float, float, float, float], width: int) -> None:
    """A white rectangle of dashes."""
    left, top, right, bottom = corners
    for start, end in (((left, top), (right, top)), ((left, bottom), (right, bottom)), ((left, top), (left, bottom)),
                       ((right, top), (right, bottom))):
        length = math.dist(start, end)
        pieces = max(1, round(length / (6 * width)))
        for i in range(0, pieces, 2):
            a, b = i / pieces, min((i + 1) / pieces, 1)
            draw.line([tuple(s + (e - s) * part for s, e in zip(start, end, strict=True)) for part in (a, b)], "white",
                      width)
