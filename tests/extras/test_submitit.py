"""A job under submitit's local executor that is asked to stop is requeued, and finishes."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from repository import ROOT

pytest.importorskip("submitit", reason="submitit is not installed")
pytestmark = pytest.mark.long
SECONDS = 500  # for three starts of Python with torch on a busy machine
# 12 images, of which the 17th read, in the second epoch, waits until the test has sent its signal
IMAGES = """
import itertools, time
from pathlib import Path

def open_images(folder):
    folder, reads = Path(folder), itertools.count(1)

    def read(name):
        if next(reads) == 17:
            (folder / "reached").touch()
            while not (folder / "asked").exists():
                time.sleep(0.05)
        return (folder / "images" / name).read_bytes()

    return [str(path.relative_to(folder / "images")) for path in folder.glob("images/*/*")], read
"""


def read(folder, suffix):
    return "".join(path.read_text() for path in folder.glob(f"*{suffix}"))


def test_asked_to_stop_requeued_and_finished(image_folder, tmp_path):
    (tmp_path / "images.py").write_text(IMAGES)
    (tmp_path / "images").symlink_to(image_folder)
    words = ["--arch", "vit_pico", "--patch_size", 8, "--global_crops_size", 40, "--local_crops_number", 0,
             "--out_dim", 32, "--out_dim_selfpatch", 16, "--head_hidden_dim", 16, "--batch_size_per_gpu", 2,
             "--num_workers", 0, "--device", "cpu", "--epochs", 2, "--warmup_epochs", 1, "--data_path",
             f"images.py:{tmp_path}", "--output_dir", tmp_path]
    job = subprocess.Popen(
        [sys.executable, ROOT / "run_with_submitit.py", "--cluster", "local", "--ngpus", "0", "--timeout", "60",
         "--wait", *map(str, words)], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    logs, end = tmp_path / "submitit", time.monotonic() + SECONDS
    try:
        line = job.stdout.readline()
        assert line.startswith("submitted job "), job.stderr.read()
        controller = line.split()[2].rstrip(";")
        while not (tmp_path / "reached").exists():
            assert job.poll() is None and time.monotonic() < end, read(logs, ".out") + read(logs, ".err")
            time.sleep(0.1)
        task = Path(f"/proc/{controller}/task/{controller}/children").read_text().split()[0]
        os.kill(int(task), signal.SIGUSR2)  # as submitit does before the time is up
        (tmp_path / "asked").touch()
        _, errors = job.communicate(timeout=SECONDS)
    finally:
        job.kill()
    assert job.returncode == 0, errors + read(logs, ".err")
    assert f"Requeued job {controller}" in read(logs, ".out") + read(logs, ".err")
    assert "resuming in epoch 1 after step" in read(logs, ".out")
    rows = [json.loads(line)["epoch"] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert rows == [0, 1]
