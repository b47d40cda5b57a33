"""A small DAVIS folder, made here, and the job on it."""
from pathlib import Path

import cv2
import numpy as np

import eval_video_segmentation as job
from selfpatch.errors import ConfigError, report
from selfpatch.video.davis import imwrite_indexed, read_mask

UNTRAINED = ("--random_weights", "--arch", "vit_tiny", "--patch_size", 32)


def make_davis(folder: Path, *names: str, frames: int = 4) -> Path:
    """A small DAVIS folder: a bright square and a dark one move over noise."""
    rng = np.random.RandomState(0)
    for name in names:
        images, masks = (folder / kind / "480p" / name for kind in ("JPEGImages", "Annotations"))
        for path in (images, masks):
            path.mkdir(parents=True)
        for t in range(frames):
            frame, mask = rng.randint(60, 180, (60, 100, 3), np.uint8), np.zeros((60, 100), np.uint8)
            for i, (x, value) in enumerate([(10, 250), (60, 5)]):
                frame[20:40, x + 2 * t:x + 2 * t + 20], mask[20:40, x + 2 * t:x + 2 * t + 20] = value, i + 1
            cv2.imwrite(str(images / f"{t:05d}.jpg"), frame)
            imwrite_indexed(masks / f"{t:05d}.png", mask)
    (folder / "ImageSets" / "2017").mkdir(parents=True)
    (folder / "ImageSets" / "2017" / "val.txt").write_text("\n".join(names) + "\n")
    return folder


def run(data: Path, output: Path, *options) -> int:
    """Exit status of the job."""
    try:
        return job.main(job.get_args_parser().parse_args(
            ["--data_path", str(data), "--output_dir", str(output), "--device", "cpu", *map(str, options)]))
    except ConfigError as error:
        return report(error)


def rewrite(path: Path, change) -> None:
    imwrite_indexed(path, change(read_mask(path)[0].copy()))
