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
EPOCHS = 12


def read(folder, suffix):
    return "".join(path.read_text() for path in folder.glob(f"*{suffix}"))


def test_asked_to_stop_requeued_and_finished(image_folder, tmp_path):
    words = ["--arch", "vit_pico", "--patch_size", 8, "--global_crops_size", 40, "--local_crops_number", 0,
             "--out_dim", 32, "--out_dim_selfpatch", 16, "--batch_size_per_gpu", 2, "--num_workers", 0, "--device",
             "cpu", "--log_every", 1, "--epochs", EPOCHS, "--data_path", image_folder, "--output_dir", tmp_path]
    job = subprocess.Popen(
        [sys.executable, ROOT / "run_with_submitit.py", "--cluster", "local", "--ngpus", "0", "--timeout", "5",
         "--wait", *map(str, words)], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        controller = job.stdout.readline().split()[2].rstrip(";")  # "submitted job 123; …"
        logs = tmp_path / "submitit"
        while "epoch 1/" not in read(logs, ".out"):
            assert job.poll() is None, job.stderr.read() + read(logs, ".err")
            time.sleep(0.2)
        task = Path(f"/proc/{controller}/task/{controller}/children").read_text().split()[0]
        os.kill(int(task), signal.SIGUSR2)  # as submitit does before the time is up
        _, errors = job.communicate(timeout=240)
    finally:
        job.kill()
    assert job.returncode == 0, errors + read(logs, ".err")
    assert f"Requeued job {controller}" in read(logs, ".out") + read(logs, ".err")
    assert "resuming" in read(logs, ".out")
    rows = [json.loads(line)["epoch"] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert rows == list(range(EPOCHS))
