"""The jobs of evaluation, in this process and as two, and images of three colours that any network tells apart."""
from pathlib import Path

import numpy as np
from forked import ranks, run_program
from PIL import Image

from selfpatch.errors import ConfigError, report

SMALL = ("--device", "cpu", "--num_workers", "0", "--image_size", "32")
CLASSES = {"blue": (0, 0, 255), "green": (0, 200, 0), "red": (220, 0, 0)}


def make_class_folders(root: Path, suffix: str = ".png", **counts: int) -> Path:
    """Folders, such as train and val, of so many images of each colour, with noise."""
    rng = np.random.default_rng(0)
    for part, count in counts.items():
        for name, colour in CLASSES.items():
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(colour, 60, (40, 48, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:02}{suffix}")
    return root


def run_job(job, *words) -> int:
    """Exit status of a job."""
    try:
        return job.main(job.get_args_parser().parse_args([*map(str, words)])) or 0
    except ConfigError as error:
        return report(error)
    except SystemExit as end:
        return end.code


def run_two(job, *words) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of each of two processes of a job."""
    return run_program(job.__file__, *words, envs=ranks())
