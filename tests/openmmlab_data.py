"""Helpers of the tests of detection/ and segmentation/: check for packages, tiny datasets, running scripts."""
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from repository import ROOT


def skip_without_packages() -> None:
    """Skip the calling module unless all packages that openmmlab/jobs.py imports are installed."""
    for package in ("mmcv.ops", "mmdet", "mmseg"):
        pytest.importorskip(package, exc_type=ImportError,
                            reason="OpenMMLab's packages are not all installed: run ./install_openmmlab.sh")


def write_coco(root: Path, split: str, categories: list[str]) -> None:
    """4 noise images of 96×64 with two bright boxes each, whose masks are polygons."""
    rng, images, annotations = np.random.default_rng(0), [], []
    (root / f"{split}2017").mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    for i in range(4):
        image = Image.fromarray(rng.integers(0, 80, (64, 96, 3), dtype=np.uint8))
        for j in range(2):
            x, y, w, h = 8 + 44 * j, int(rng.integers(4, 20)), 36, 36
            ImageDraw.Draw(image).rectangle([x, y, x + w, y + h], fill=(255, 60 * i, 200 * j))
            annotations.append({"id": len(annotations) + 1, "image_id": i, "category_id": j + 1, "iscrowd": 0,
                                "bbox": [x, y, w, h], "area": w * h,
                                "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]})
        image.save(root / f"{split}2017" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 96, "height": 64})
    listed = [{"id": i + 1, "name": name} for i, name in enumerate(categories)]
    (root / "annotations" / f"instances_{split}2017.json").write_text(
        json.dumps({"info": {}, "images": images, "annotations": annotations, "categories": listed}))


def write_ade(root: Path) -> None:
    """4 training and 2 validation pairs of 80×64: id 1 in the dark left half, 150 in the bright right one, 0 below."""
    rng = np.random.default_rng(0)
    for split, count in (("training", 4), ("validation", 2)):
        for folder in ("images", "annotations"):
            (root / folder / split).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 60, (64, 80, 3), dtype=np.uint8)
            pixels[:, 40:] += 150
            Image.fromarray(pixels).save(root / "images" / split / f"{i}.jpg", quality=95)
            ids = np.full((64, 80), 1, np.uint8)
            ids[:, 40:] = 150
            ids[48:] = 0
            Image.fromarray(ids).save(root / "annotations" / split / f"{i}.png")


def check_stored_pixels(load: Callable[[dict], dict], folder: Path, tag: int) -> None:
    """Check that a transform reads a JPEG with an EXIF orientation tag with its pixels as stored."""
    pixels, exif = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8), Image.Exif()
    exif[0x0112] = tag
    Image.fromarray(pixels).save(folder / "plain.jpg")
    Image.fromarray(pixels).save(folder / "tagged.jpg", exif=exif)
    plain, tagged = (load({"img_path": str(folder / f"{name}.jpg")})["img"] for name in ("plain", "tagged"))
    assert plain.shape == (48, 64, 3) and np.array_equal(plain, tagged)


def start(*words, **environment) -> str:
    """Run a command without GPUs and without a launcher's variables; return its output."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    result = subprocess.run(
        [*map(str, words)], text=True, timeout=300, capture_output=True,
        env=inherited | {"CUDA_VISIBLE_DEVICES": ""} | {k: str(v) for k, v in environment.items()})
    assert result.returncode == 0, result.stderr + result.stdout
    return result.stdout + result.stderr


def script_error(capsys: pytest.CaptureFixture, script: str, *options) -> str:
    """Run a script in this process with options that it must refuse; return its only line on stderr.

    Args:
        script: path relative to the repository's root.
    """
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", [script, *map(str, options)])
        patch.setattr(sys, "path", list(sys.path))
        patch.setenv("LOCAL_RANK", "0")  # --launcher sets it
        runpy.run_path(str(ROOT / script), run_name="__main__")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.endswith("\n") and error.count("\n") == 1, error
    assert error.startswith(f"{Path(script).name}: error: ")
    return error
