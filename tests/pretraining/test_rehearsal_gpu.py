"""The command for all figures of a GPU, benchmarks/gpu.py, on one that computes nothing: no part of it ends early.

    REHEARSE -m pytest -n0 -s tests/pretraining/test_rehearsal_gpu.py        # shows the closing table
"""
import json
import os
import subprocess
import sys

import pytest
from repository import ROOT

null = pytest.importorskip("null_cuda", reason="not under a CUDA runtime that counts")
import gpu  # noqa: E402


@pytest.fixture
def python(tmp_path):
    """A Python whose programs and processes are rehearsed too."""
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{null.__file__}" "{ROOT / "tests" / "rehearsed.py"}" "$@"\n')
    path.chmod(0o755)
    return path


@pytest.fixture
def many_images(image_folder, tmp_path):
    """240 names of 12 JPEGs: 60 steps of 4, and a line of progress for every 10."""
    (tmp_path / "images" / "class").mkdir(parents=True)
    for i, path in enumerate(20 * sorted(image_folder.rglob("*.jpg"))):
        os.link(path, tmp_path / "images" / "class" / f"{i:03}.jpg")
    return tmp_path / "images"


def test_all_figures_of_a_gpu(python, many_images, tmp_path):
    output = tmp_path / "figures"
    parts = [part for part in gpu.PARTS if part != "tests" and part not in gpu.MODES]  # which do compile
    words = ["--only", *parts, "--arch", "vit_tiny", "--batch_size", "4", "--workers", "2", "--steps", "1"]
    result = subprocess.run([python, "benchmarks/gpu.py", "--output", output, *words, "--compile", "off", "--data_path",
                             many_images], cwd=ROOT, capture_output=True, text=True,
                            env=os.environ | {"REHEARSED_PYTHON": str(python)})
    assert result.returncode == 0, result.stdout + result.stderr
    table = result.stdout[result.stdout.rindex("measured"):]
    print("\n" + table)
    for row in ("model-FLOPs utilisation", "speed-up", "from JPEGs", "davis, 50 frames", "head as published",
                *gpu.VARIANTS):
        assert row in table
    assert "nan" not in table and "inf" not in table
    assert "loader_images_per_second" in json.loads((output / "data.json").read_text())
    step = json.loads((output / "step.json").read_text())
    assert 0 < step["ours"]["peak_gib"] < step["plain"]["peak_gib"]
