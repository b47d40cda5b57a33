"""Pictures of what a backbone sees: principal components, similarity to a patch, attention, positives, boxes.

    colours, _ = component_colours(features, [grid])           # features [N, D] of an image's patches
    component_panels([image], colours).save("pca.png")
"""
import math

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

from selfpatch.checkpoints.backbones import Backbone
from selfpatch.errors import ConfigError
from selfpatch.method.selfpatch_head import SelfPatchHead

COLOURS = ("#ff3b30", "#34c759", "#0a84ff", "#ffcc00", "#ff2dce", "#00e5ff", "#ff9500", "#af7cff", "#ffffff")
MARK = COLOURS[5]  # the frame around a chosen patch
BACKGROUND = (24, 24, 24)  # patches outside the foreground
PANEL_WIDTH, LABEL_HEIGHT, GAP = 416, 30, 6
MIN_CELL, MAX_CELL = 24, 40  # side in pixels of a drawn patch: room for a digit


# ---------------------------------------------------------------- panels

def fit_patches(image: Image.Image, short_side: int, patch_size: int) -> Image.Image:
    """Scale an image to a short side in pixels, and crop it at the right and bottom to whole patches.

    Raises:
        ConfigError: fewer than 3 patches in a row, or one side is more than 16 times the other.
    """
    if short_side < 3 * patch_size:
        raise ConfigError(f"--image_size {short_side} is under 3 patches of {patch_size}: give {3 * patch_size} or "
                          "more")
    if max(image.size) > 16 * min(image.size):
        raise ConfigError(f"it is {image.width}×{image.height}: with one side more than 16 times the other it "
                          "has too many patches, crop it")
    scale = short_side / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
    return image.crop((0, 0, *(side // patch_size * patch_size for side in image.size)))


def panel_height(images: list[Image.Image]) -> int:
    """Height of panels that hold all images at PANEL_WIDTH, at most twice the width."""
    return min(max(round(PANEL_WIDTH * image.height / image.width) for image in images), 2 * PANEL_WIDTH)


def fit_panel(image: Image.Image, height: int, resample: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    """Scale an image into PANEL_WIDTH × height pixels, centred on white."""
    return ImageOps.pad(image, (PANEL_WIDTH, height), resample, "white")


def labelled_panels(panels: list[tuple[str, Image.Image]], columns: int) -> Image.Image:
    """Arrange (label, panel) pairs of one size on a white sheet, row by row, each label above its panel."""
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
    """Map values [rows, columns] to colours, from dark (minimum) to bright (maximum), one flat cell per patch.

    Args:
        size: width and height of the picture in pixels.
        limits: minimum and maximum of the scale; default: those of the values.
    """
    low, high = limits or (values.min(), values.max())
    levels = np.uint8(255 * (values - low) / (high - low if high > low else 1))
    colours = cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
    return Image.fromarray(colours).resize(size, Image.Resampling.NEAREST)


# ---------------------------------------------------------------- principal components

def principal_components(features: torch.Tensor, count: int = 3) -> torch.Tensor:
    """Project features [M, D] on their first principal components: float32 [M, count].

    Each component's sign makes its largest weight positive, so that colours are the same in every run.
    """
    centred = features.double() - features.double().mean(0)
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -count:].flip(1)
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return (centred @ (directions * largest.sign())).float()


def split_foreground(first: torch.Tensor, grids: list[tuple[int, int]]) -> torch.Tensor:
    """Tell foreground from background by the first principal component [M]: bool [M], True for foreground.

    Otsu's threshold splits the patches in two (upper_side). The background is the side that has most of the images'
    border, or more of the border than of all patches. The first criterion fails for an object that fills its image, the
    second for an object in a corner, so the stronger of the two decides.

    Args:
        grids: rows and columns of each image; their patches follow one another in first.
    """
    upper, border = upper_side(first), torch.cat([border_patches(grid) for grid in grids])
    of_border, of_all = float(upper[border].float().mean()), float(upper.float().mean())
    return ~upper if (of_border - 0.5) + (of_border - of_all) > 0 else upper


def upper_side(values: torch.Tensor) -> torch.Tensor:
    """Values [M] above Otsu's threshold, which maximises the variance between the two sides (1979): bool [M].

    The mean would cut through the noise of the larger side where the other is small. The outer 2 % of the values at
    each end are clipped, so that a few outliers do not become a side of their own.
    """
    low, high = (values.double().quantile(q) for q in (0.02, 0.98))
    levels = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).mul(255).round().byte().cpu().numpy()
    cut, _ = cv2.threshold(levels, 0, 255, cv2.THRESH_OTSU)
    return torch.from_numpy(levels > cut).to(values.device)


def border_patches(grid: tuple[int, int]) -> torch.Tensor:
    """Mask of the outermost patches of a grid of (rows, columns), bool [N]."""
    inside = torch.zeros(grid, dtype=torch.bool)
    inside[1:-1, 1:-1] = True
    return ~inside.flatten()


def component_colours(features: torch.Tensor, grids: list[tuple[int, int]],
                      foreground: bool = True) -> tuple[list[np.ndarray], torch.Tensor]:
    """Colour patches by three principal components, fitted to all images together.

    Args:
        features: [M, D], the patches of all images, one image after the other.
        grids: rows and columns of each image.
        foreground: fit the components to the foreground and colour nothing else, as in DINOv2's figures (Oquab et al.
            2023, Sec. 7.5). False: fit and colour all patches.

    Returns:
        For each image RGB, uint8 [rows, columns, 3]; and the mask of the coloured patches, bool [M].
    """
    coloured = torch.ones(len(features), dtype=torch.bool)
    if foreground:
        chosen = split_foreground(principal_components(features, 1)[:, 0], grids)
        coloured = chosen if chosen.sum() > 3 else coloured
    components = principal_components(features[coloured])
    low, high = components.quantile(0.02, 0), components.quantile(0.98, 0)  # outliers would grey the rest
    colours = torch.tensor(BACKGROUND, dtype=torch.uint8).repeat(len(features), 1)
    colours[coloured] = ((components - low) / (high - low).clamp(min=1e-12) * 255).clamp(0, 255).byte()
    parts = colours.split([rows * columns for rows, columns in grids])
    return [part.reshape(*grid, 3).numpy() for part, grid in zip(parts, grids, strict=True)], coloured


def component_panels(images: list[Image.Image], colours: list[np.ndarray]) -> Image.Image:
    """Draw each image beside its patches' colours; images of different shapes are centred on panels of one size."""
    height, panels = panel_height(images), []
    for number, (image, colour) in enumerate(zip(images, colours, strict=True), start=1):
        flat = Image.fromarray(colour).resize(image.size, Image.Resampling.NEAREST)
        name = f"image {number}" if len(images) > 1 else "image"
        panels += [(name, fit_panel(image, height)),
                   ("principal components", fit_panel(flat, height, Image.Resampling.NEAREST))]
    return labelled_panels(panels, columns=2 if len(images) < 4 else 4)


# ---------------------------------------------------------------- similarity to a patch

def similarity(query: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of one patch's feature [D] to features [N, D]: float32 [N]."""
    return F.normalize(features.float(), dim=-1) @ F.normalize(query.float(), dim=0)


def similarity_panels(images: list[Image.Image], maps: list[np.ndarray], patch: tuple[int, int],
                      patch_size: int) -> Image.Image:
    """Draw each image beside its map of cosines [rows, columns]; all maps share one colour scale.

    Args:
        images: the image of the chosen patch, then others.
        patch: row and column of the chosen patch, framed in the first image and its map.
    """
    low, high = min(map(np.min, maps)), max(map(np.max, maps))
    height, panels = panel_height(images), []
    for number, (image, values) in enumerate(zip(images, maps, strict=True)):
        pictures = [image.copy(), heat(values, image.size, (low, high))]
        if number == 0:
            x, y = patch[1] * patch_size, patch[0] * patch_size
            width = max(2, round(2 * image.width / PANEL_WIDTH))
            for picture in pictures:
                ImageDraw.Draw(picture).rectangle((x - width, y - width, x + patch_size + width - 1,
                                                   y + patch_size + width - 1), outline=MARK, width=width)
        name = f"image {number + 1}" + (f", patch {patch[0]},{patch[1]}" if number == 0 else "")
        scale = f"cosine {values.min():.2f} to {values.max():.2f}"
        panels += [(name, fit_panel(pictures[0], height)),
                   (scale, fit_panel(pictures[1], height, Image.Resampling.NEAREST))]
    return labelled_panels(panels, columns=2)


# ---------------------------------------------------------------- attention and positives

def attention_weights(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Attention of one query [heads, d] over keys [heads, M, d]: [heads, M], rows sum to 1."""
    return (k @ q[:, :, None] * q.shape[-1] ** -0.5)[..., 0].softmax(-1)


def self_attention(backbone: Backbone, x: torch.Tensor, query: int, layer: int = -1) -> torch.Tensor:
    """A block's attention from token `query` to the N patches of an image [1, 3, H, W]: [heads, N]."""
    q, k = backbone.queries_and_keys(x, layer)
    return attention_weights(q[0, :, query], k[0])[:, backbone.num_prefix_tokens:]


def head_attention(backbone: Backbone, head: SelfPatchHead, x: torch.Tensor, layer: int = -1) -> torch.Tensor:
    """Attention of the SelfPatch head's second block from its class token to the N patches of x: [heads, N]."""
    patches, (first, second) = backbone.features(x, layer).patches, head.cls_blocks
    u = second.norm1(torch.cat([first(head.cls_token[0], patches), patches[0]]))
    q, k = (project(u).unflatten(-1, (backbone.num_heads, -1)).transpose(0, 1)
            for project in (second.attn.q, second.attn.k))
    return attention_weights(q[:, 0], k)[:, 1:]


def attention_panels(image: Image.Image, maps: np.ndarray, patch: tuple[int, int] | None,
                     patch_size: int) -> Image.Image:
    """Draw the image, the mean attention map and one map per head, each with a colour scale of its own.

    Args:
        maps: attention [heads, rows, columns].
        patch: row and column of the query, framed in every panel; None for the class token.
    """
    size = (PANEL_WIDTH, round(PANEL_WIDTH * image.height / image.width))
    panels = [("image", image.resize(size, Image.Resampling.BICUBIC)), ("mean of the heads", heat(maps.mean(0), size))]
    panels += [(f"head {i + 1}", heat(values, size)) for i, values in enumerate(maps)]
    if patch is not None:
        cell = patch_size * size[0] / image.width
        y, x = patch[0] * cell, patch[1] * cell
        for _, panel in panels:
            ImageDraw.Draw(panel).rectangle((x - 2, y - 2, x + cell + 1, y + cell + 1), outline=MARK, width=2)
    return labelled_panels(panels, columns=math.ceil((1.5 * len(panels)) ** 0.5))


def positives_over(image: Image.Image, patch_size: int, patches: list[tuple[int, int]],
                   chosen: list[list[tuple[int, int]]]) -> Image.Image:
    """Enlarge the image, frame each patch thickly, and number its positives in the same colour.

    Args:
        patches: (row, column) of the matched patches.
        chosen: for each patch the (row, column) of its positives, best first.
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


# ---------------------------------------------------------------- boxes

def boxes_over(image: Image.Image, boxes: dict[str, list[tuple[float, float, float, float]]]) -> Image.Image:
    """Draw sets of boxes on an image, each set in its own colour, with their names in a line above.

    Args:
        boxes: (xmin, ymin, xmax, ymax) in pixels, by name; the set named "true" is dashed white.
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
            if name == "true":
                dashed_rectangle(draw, corners, width)
            else:
                draw.rectangle(corners, outline=colour, width=width)
    return canvas


def dashed_rectangle(draw: ImageDraw.ImageDraw, corners: tuple[float, float, float, float], width: int) -> None:
    """Draw a dashed white rectangle."""
    left, top, right, bottom = corners
    for start, end in (((left, top), (right, top)), ((left, bottom), (right, bottom)), ((left, top), (left, bottom)),
                       ((right, top), (right, bottom))):
        points = np.linspace(start, end, 1 + max(1, round(math.dist(start, end) / (6 * width))))
        for a, b in zip(points[::2], points[1::2], strict=False):
            draw.line((*a, *b), "white", width)
