"""Pictures of results on videos: frames with tinted objects, as GIF, MP4 or PNGs, and a bar chart of their scores.

    pictures = overlay_frames(frames, [masks], ["ours"], width=427)      # frames and masks: lists of paths
    write_video(pictures, Path("overlay.gif"), fps=12)
"""
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image

from selfpatch.data.files import load_rgb
from selfpatch.errors import ConfigError
from selfpatch.video.davis import DAVIS_PALETTE, VOID, DataError, read_mask
from selfpatch.video.scores import summarise
from selfpatch.visualization.curves import plain_text
from selfpatch.visualization.features import labelled_panels
from selfpatch.whole_files import whole_file, whole_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# ---------------------------------------------------------------- masks over frames

def overlay(frame: np.ndarray, mask: np.ndarray, palette: bytes) -> np.ndarray:
    """Tint each object of a frame with its colour, and outline it in full colour.

    Args:
        frame: RGB, uint8 [H, W, 3].
        mask: ids, uint8 [H, W]; background (0) and void (255) stay as they are.
        palette: 3 bytes per id.

    Returns:
        RGB, uint8 [H, W, 3].
    """
    colours = np.frombuffer(palette.ljust(3 * 256, b"\0"), np.uint8).reshape(256, 3)  # it may have fewer than 256
    objects = (mask != 0) & (mask != VOID)
    drawn = np.where(objects[..., None], frame // 2 + colours[mask] // 2, frame)
    for i in np.unique(mask[objects]):
        outlines, _ = cv2.findContours((mask == i).view(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(drawn, outlines, -1, colours[i].tolist(), thickness=2)
    return drawn


def overlay_frames(frames: list[Path], masks: list[list[Path]], labels: list[str], width: int) -> Iterator[Image.Image]:
    """Draw each frame of a video beside copies tinted by one or several sets of masks.

    Args:
        frames: image files.
        masks: for each label the mask files of all frames.
        width: of each panel in pixels.

    Raises:
        DataError: a mask has another size than its frame.
        UnreadableImage: a file cannot be read.
    """
    binary = [read_mask(paths[0]).binary for paths in masks]  # decides for the whole video whether 255 is an object
    for frame, *paths in zip(frames, *masks, strict=True):
        panels = [np.asarray(load_rgb(frame))]
        for path, is_binary in zip(paths, binary, strict=True):
            mask, palette, *_ = read_mask(path, is_binary)
            if mask.shape != panels[0].shape[:2]:
                raise DataError(f"{path}: is {mask.shape[1]}×{mask.shape[0]}, not of its frame's size")
            panels.append(overlay(panels[0], mask, palette))
        size = (width, round(width * panels[0].shape[0] / panels[0].shape[1]))
        images = [Image.fromarray(panel).resize(size, Image.Resampling.BOX) for panel in panels]
        yield labelled_panels(list(zip(["video", *labels], images, strict=True)), columns=len(images))


# ---------------------------------------------------------------- video files

def write_video(pictures: Iterable[Image.Image], output: Path, fps: float) -> None:
    """Write pictures of one size as .gif or .mp4, or as numbered PNGs in a folder; all of them or nothing.

    Raises:
        ConfigError: this OpenCV cannot write MP4.
        WriteError: the disk is full or cannot be written.
    """
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
    """Quantise all pictures to one palette: 208 colours of the first, middle and last, and those of 48 objects."""
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


# ---------------------------------------------------------------- scores

def group_scores(scores: list[dict[str, tuple[np.ndarray, np.ndarray]]],
                 absent: dict[str, list[int]]) -> dict[str, list[float]]:
    """J&F of several results: the mean over all objects, then of each sequence over its objects and frames.

    Args:
        scores: for each result J and F [objects, T - 2] by sequence (see video.scores.score_folder).
        absent: ids to leave out, by sequence.

    Returns:
        One value per result by row: "all objects", and the names of the sequences.
    """
    groups = {"all objects": [summarise(one, absent)[0]["J&F-Mean"] for one in scores]}
    for name, (js, _) in scores[0].items():
        rows = [i for i in range(len(js)) if i + 1 not in absent.get(name, ())]
        groups[name] = [float(np.mean([values[rows] for values in one[name]])) for one in scores]
    return groups


def bar_chart(groups: dict[str, list[float]], labels: list[str], title: str) -> "Figure":
    """Draw values in 0 … 1 as horizontal bars: one row per group, and in it one bar per label.

    Args:
        groups: row name -> one value per label.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + len(groups) * (0.12 + 0.18 * len(labels))), layout="constrained")
    axis, rows, height = figure.subplots(), np.arange(len(groups)), 0.8 / len(labels)
    for i, label in enumerate(labels):
        places = rows + (i - (len(labels) - 1) / 2) * height
        bars = axis.barh(places, [values[i] for values in groups.values()], 0.9 * height, label=plain_text(label))
        axis.bar_label(bars, fmt="%.3f", padding=3, fontsize="small")
    axis.set(xlim=(0, 1.08), xticks=np.arange(0, 1.1, 0.2), ylim=(len(groups) - 0.5, -0.5), yticks=rows,
             yticklabels=[plain_text(name) for name in groups])
    axis.set_title(plain_text(title), loc="left")
    axis.grid(axis="x", color="0.87")
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(left=False)
    figure.legend(loc="outside upper right", ncols=len(labels), frameon=False)
    return figure
