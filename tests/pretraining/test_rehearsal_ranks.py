"""Two ranks, each on a GPU that computes nothing: what they send each other, and the whole job.

    REHEARSE -m pytest -n0 tests/pretraining/test_rehearsal_ranks.py
"""
import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

null = pytest.importorskip("null_cuda", reason="not under a CUDA runtime that counts")

from networks import shrink_job  # noqa: E402
from rehearse_gpu import make_way, take_step  # noqa: E402
from small_job import SMALL, load  # noqa: E402

import main_selfpatch  # noqa: E402
from selfpatch.errors import run_main  # noqa: E402

RANKS = 2
ARGS = argparse.Namespace(arch="vit_tiny", patch_size=16, batch_size=2, local_crops_number=2, precision="bf16",
                          compile="off", checkpoint_activations="", pack_crops="auto")
TIMED_STEPS = 10  # by DistributedDataParallel, which waits for its own events in these and in every 100th


def start_ranks(*words) -> None:
    """Run this file as two ranks, which have to succeed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}", null.__file__]
    env = os.environ | {"NULL_DEVICES": str(RANKS), "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, *launcher, __file__, *map(str, words)], capture_output=True, text=True,
                            env=env, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr


def size(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def count_step(accum_steps: int, folder: Path) -> None:
    """A rank: write what a settled step asked for, and what the networks say that it should."""
    way = make_way(ARGS, accum_steps=accum_steps)
    for _ in range(TIMED_STEPS + 1):
        take_step(way)
    torch.cuda.set_sync_debug_mode("error")
    null.reset()
    take_step(way)
    counts, student = null.counts(), way.run.student
    counts |= {"buckets": student._get_ddp_logging_data()["rebuilt_bucket_sizes"],
               "gradient_bytes": size(p for p in student.parameters() if p.requires_grad),
               "center_bytes": size(way.run.dino_loss.buffers())}
    (folder / f"{accum_steps}-{os.environ['RANK']}.json").write_text(json.dumps(counts))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Each rank's counts of a step of one and of four small batches."""
    folder = tmp_path_factory.mktemp("ranks")
    for accum_steps in (1, 4):
        start_ranks("count_step", accum_steps, folder)
    return {accum_steps: [json.loads((folder / f"{accum_steps}-{rank}.json").read_text()) for rank in range(RANKS)]
            for accum_steps in (1, 4)}


@pytest.mark.parametrize("accum_steps", [1, 4])
def test_a_step_sends_every_gradient_and_centre_once(steps, accum_steps):
    """Also of several small batches, whose gradients are summed before they are sent; the centres are one message."""
    for counts in steps[accum_steps]:
        buckets = list(map(int, counts["buckets"].split(",")))
        assert sum(buckets) == counts["gradient_bytes"]
        assert counts["all_reduces"] == len(buckets) + 1
        assert counts["all_reduced_bytes"] == counts["gradient_bytes"] + counts["center_bytes"]


@pytest.mark.parametrize("accum_steps", [1, 4])
def test_no_rank_waits_for_its_device(steps, accum_steps):
    """Once DistributedDataParallel times itself no longer; an operation that waits would have ended the rank."""
    assert [counts["waits"] for counts in steps[accum_steps]] == [0, 0]


def test_the_whole_job_on_two_ranks(image_folder, tmp_path):
    start_ranks("train", *SMALL, "--device", "cuda", "--compile", "off", "--batch_size_per_gpu", 2, "--data_path",
                image_folder, "--output_dir", tmp_path, "--epochs", 1, "--num_workers", 1)
    checkpoint = load(tmp_path / "checkpoint.pth")
    assert checkpoint["epoch"] == 1 and all(name.startswith("module.") for name in checkpoint["student"])
    last = json.loads((tmp_path / "steps.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 12 // (2 * RANKS)


def train(*words) -> None:
    """A rank: main_selfpatch.py, with a small network."""
    patch, start = pytest.MonkeyPatch(), torch.distributed.init_process_group
    shrink_job(patch)
    patch.setattr("selfpatch.pretraining.loop.check_weights", lambda _: None)  # whose answer is 0 here, which means no
    # what ranks tell each other in words goes by the CPU, as nothing arrives from a GPU that computes nothing
    patch.setattr("torch.distributed.init_process_group",
                  lambda backend, **meeting: start(f"cpu:gloo,cuda:{backend}", **meeting))
    patch.setattr("sys.argv", ["main_selfpatch.py", *words])
    run_main(main_selfpatch.main)


if __name__ == "__main__":
    what, *words = sys.argv[1:]
    if what == "count_step":
        count_step(int(words[0]), Path(words[1]))
    else:
        train(*words)
