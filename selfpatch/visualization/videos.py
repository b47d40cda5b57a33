"""Pictures of video masks and their scores: frames with coloured objects, side by side, and a bar chart."""
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from selfpatch.errors import ConfigError
from selfpatch.video.davis import DAVIS_PALETTE, VOID
from selfpatch.visualization.drawing import COLOURS, labelled_panels
from selfpatch.whole_files import whole_file, whole_folder

BAR_HEIGHT, BAR_LENGTH, MARGIN = 18, 600, 20


def overlay(frame: np.ndarray, mask: np.ndarray, palette: bytes) -> np.ndarray:
    """Tint each object of a frame with its colour, with a full-colour outline.

    Args:
        frame: RGB, uint8 [H, W, 3].
        mask: ids, uint8 [H, W]; 0 and void are not coloured.
        palette: 3 bytes per id.
    """
    colours = np.zeros((256, 3), np.uint8)
    entries = np.frombuffer(palette, np.uint8).reshape(-1, 3)  # a palette may have fewer than 256
    colours[:len(entries)] = entries
    objects = (mask != 0) & (mask != VOID)
    drawn = np.where(objects[..., None], frame // 2 + colours[mask] // 2, frame)
    for i in np.unique(mask[objects]):
        outlines, _ = cv2.findContours((mask == i).view(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(drawn, outlines, -1, colours[i].tolist(), thickness=2)
    return drawn


def side_by_side(panels: list[np.ndarray], labels: list[str], width: int) -> Image.Image:
    """RGB panels [H, W, 3] of one size, scaled to a width in pixels, in a row below their labels."""
    size = (width, round(width * panels[0].shape[0] / panels[0].shape[1]))
    images = [Image.fromarray(panel).resize(size, Image.Resampling.BOX) for panel in panels]
    return labelled_panels(list(zip(labels, images, strict=True)), columns=len(panels))


def write_video(pictures: Iterable[Image.Image], output: Path, fps: float) -> None:
    """Write pictures of one size as .gif or .mp4, or as numbered PNGs in a folder; all of them or nothing."""
    if output.suffix.lower() not in (".gif", ".mp4"):
        with whole_folder(output) as folder:
            for i, picture in enumerate(pictures):
                picture.save(folder / f"{i:05d}.png")
        return
    with whole_file(output, suffix=output.suffix) as temporary:
        if output.suffix.lower() == ".gif":
            first, *others = with_one_palette(list(pictures))
            first.save(temporary, save_all=True, append_images=others, duration=round(1000 / fps), loop=0)
        else:
            write_mp4(pictures, temporary, fps)


def with_one_palette(pictures: list[Image.Image]) -> list[Image.Image]:
    """Quantise all pictures to one palette: 208 colours from the first, middle and last, and those of 48 objects."""
    sample = np.concatenate([np.asarray(pictures[i]) for i in (0, len(pictures) // 2, -1)])
    palette = Image.fromarray(sample).quantize(208)
    palette.putpalette(palette.getpalette()[:3 * 208] + list(DAVIS_PALETTE[3:3 * 49]))
    return [picture.quantize(palette=palette) for picture in pictures]


def write_mp4(pictures: Iterable[Image.Image], path: Path, fps: float) -> None:
    writer = None
    for picture in pictures:
        even = picture.crop((0, 0, picture.width // 2 * 2, picture.height // 2 * 2))  # the codec needs even sides
        writer = writer or cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, even.size)
        if not writer.isOpened():
            raise ConfigError("this OpenCV cannot write MP4; give a .gif or a folder")
        writer.write(cv2.cvtColor(np.asarray(even), cv2.COLOR_RGB2BGR))
    writer.release()


def bar_chart(groups: dict[str, list[float]], labels: list[str], title: str) -> Image.Image:
    """Horizontal bars of values in 0 … 1: one group per row, in it one bar per label.

    Args:
        groups: row name -> one value per label.
    """
    font, small = ImageFont.load_default(16), ImageFont.load_default(13)
    name_width = round(max(font.getlength(name) for name in groups)) + MARGIN
    group_height = len(labels) * BAR_HEIGHT + 12
    top = 4 * MARGIN
    image = Image.new("RGB", (name_width + BAR_LENGTH + 5 * MARGIN, top + len(groups) * group_height + 2 * MARGIN),
                      "white")
    draw, left, bottom = ImageDraw.Draw(image), name_width + MARGIN, image.height - 2 * MARGIN
    draw.text((MARGIN // 2, MARGIN), title, "black", ImageFont.load_default(20), anchor="lm")
    x = left
    for i, label in enumerate(labels):
        draw.rectangle((x, 2 * MARGIN, x + 12, 2 * MARGIN + 12), COLOURS[i % len(COLOURS)], "black")
        draw.text((x + 18, 2 * MARGIN + 6), label, "black", font, anchor="lm")
        x += round(font.getlength(label)) + 2 * MARGIN + 12
    for tenth in range(0, 11, 2):
        x = left + BAR_LENGTH * tenth // 10
        draw.line((x, top, x, bottom), "#cccccc")
        draw.text((x, bottom + 4), f"{tenth / 10:.1f}", "black", small, anchor="mt")
    for row, (name, values) in enumerate(groups.items()):
        y = top + row * group_height
        draw.text((left - 8, y + group_height / 2), name, "black", font, anchor="rm")
        for i, value in enumerate(values):
            y_bar = y + 6 + i * BAR_HEIGHT
            draw.rectangle((left, y_bar, left + BAR_LENGTH * value, y_bar + BAR_HEIGHT - 4),
                           COLOURS[i % len(COLOURS)])
            draw.text((left + BAR_LENGTH * value + 5, y_bar + BAR_HEIGHT // 2 - 2), f"{value:.3f}", "black", small,
                      anchor="lm")
    return image
