"""Several processes of which one differs, is missing or is stopped."""
import os
import shutil
import signal
import time

import pytest
from processes import Job, run

pytestmark = pytest.mark.slow


@pytest.fixture
def words(image_folder, tmp_path):
    return ["--data_path", image_folder, "--batch_size_per_gpu", 1, "--output_dir", tmp_path / "run", "--epochs", 1,
            "--log_every", 1, "--warmup_epochs", 0]


@pytest.mark.parametrize("option, says", [
    ("--lr=0.1", "rank 1 has --lr 0.1, rank 0 0.0005: start all processes with the same options"),
    pytest.param("--data_path={other}", "rank 1 has data: 11 images", marks=pytest.mark.long),
    pytest.param("--k_num=9", "--k_num is 9", marks=pytest.mark.long)])
def test_a_rank_with_other_options_is_named(image_folder, words, tmp_path, option, says):
    shutil.copytree(image_folder, tmp_path / "other")
    next((tmp_path / "other").rglob("*.jpg")).unlink()
    status, errors = run(tmp_path, *words, ranks=2, RANK_OPTIONS="1:" + option.format(other=tmp_path / "other"))
    assert status == 1 and len(errors) == 1 and says in errors[0], errors  # torchrun's status is 1 whatever a rank's is
    assert not (tmp_path / "run" / "checkpoint.pth").exists()


def test_a_stopped_rank_is_named_and_is_back(words, tmp_path):
    job = Job(tmp_path, *words, "--epochs", 400, ranks=2, NOTICE_AFTER="3")
    job.wait_for("step 3/6")
    stopped = next(pid for pid in job.children() if rank_of(pid) == "1")
    os.kill(stopped, signal.SIGSTOP)
    job.wait_for("has given no sign of life since", stream="err")
    os.kill(stopped, signal.SIGCONT)
    job.wait_for("rank 1 is back", stream="err")
    job.process.send_signal(signal.SIGTERM)
    job.wait(60)
    line = job.errors()[0]
    assert f"rank 1 (process {stopped} on " in line and "30 minutes at most (--dist_timeout)" in line


@pytest.mark.long
def test_a_rank_that_is_killed_ends_the_others_in_one_line(words, tmp_path):
    """Without a launcher that would end them."""
    ranks = [Job(make(tmp_path / f"rank{rank}"), *words, "--epochs", 400, "--num_workers", 0, RANK=str(rank),
                 WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_PORT="29731") for rank in (0, 1)]
    ranks[0].wait_for("step 3/6")
    ranks[1].process.kill()
    start = time.monotonic()
    assert ranks[0].wait(60) == 1 and time.monotonic() - start < 30
    assert len(ranks[0].errors()) == 1 and "lost contact with another process" in ranks[0].errors()[0]


@pytest.mark.long
def test_a_rank_that_never_starts_is_named(words, tmp_path):
    status, errors = run(tmp_path, *words, "--dist_timeout", 0.25, RANK="0", WORLD_SIZE="3", LOCAL_RANK="0",
                         MASTER_PORT="29732")
    assert status == 2 and "missing: ranks 1, 2;" in errors[0]
    assert "not all of them joined within 0.25 minutes (--dist_timeout), ranks 1, 2 did not" in errors[1]


def make(folder):
    folder.mkdir()
    return folder


def rank_of(pid):
    with open(f"/proc/{pid}/environ") as file:
        return dict(entry.partition("=")[::2] for entry in file.read().split("\0")).get("RANK")


@pytest.mark.long
def test_a_rank_that_stays_stopped_is_an_error_after_the_timeout(words, tmp_path):
    """Without a launcher that would end the others."""
    ranks = [Job(make(tmp_path / f"rank{rank}"), *words, "--epochs", 400, "--num_workers", 0, "--dist_timeout", 0.2,
                 RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_PORT="29733") for rank in (0, 1)]
    ranks[0].wait_for("step 3/6")
    ranks[1].process.send_signal(signal.SIGSTOP)
    try:
        assert ranks[0].wait(90) == 1
        assert len(ranks[0].errors()) == 1 and "lost contact with another process" in ranks[0].errors()[0]
    finally:
        ranks[1].process.kill()
