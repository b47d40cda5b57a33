"""Several processes of which one differs, is missing or is stopped."""
import os
import shutil
import signal
import time
from datetime import timedelta

import pytest
from forked import free_port, ranks, run_program
from processes import Job, run

from selfpatch.data.loader import RankSampler
from selfpatch.distributed.rank_watch import RankWatch

pytestmark = pytest.mark.slow


@pytest.fixture
def words(image_folder, tmp_path):
    return ["--data_path", image_folder, "--batch_size_per_gpu", 1, "--output_dir", tmp_path / "run", "--epochs", 1,
            "--log_every", 1, "--warmup_epochs", 0]


@pytest.mark.parametrize("option, says", [
    ("--lr=0.1", "rank 1 has --lr 0.1, rank 0 0.0005: start all processes with the same options"),
    pytest.param("--data_path={other}", "rank 1 has data: 11 images", marks=pytest.mark.long),
    pytest.param("--k_num=9", "--k_num: it is 9", marks=pytest.mark.long)])
def test_a_rank_with_other_options_is_named(image_folder, words, tmp_path, option, says):
    shutil.copytree(image_folder, tmp_path / "other")
    next((tmp_path / "other").rglob("*.jpg")).unlink()
    status, errors = run(tmp_path, *words, ranks=2, RANK_OPTIONS="1:" + option.format(other=tmp_path / "other"))
    assert status == 1 and len(errors) == 1 and says in errors[0], errors  # torchrun's status is 1 whatever a rank's is
    assert not (tmp_path / "run" / "checkpoint.pth").exists()


@pytest.mark.long
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


@pytest.fixture
def start_without_launcher(words, tmp_path):
    """Starts two ranks that no torchrun would end; they are killed after the test."""
    jobs = []

    def start(*more, **env):
        port = free_port()
        jobs.extend(Job(make(tmp_path / f"rank{rank}"), *words, "--epochs", 400, "--num_workers", 0, *more,
                        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_PORT=port, **env)
                    for rank in (0, 1))
        return jobs

    yield start
    for job in jobs:
        job.process.kill()


@pytest.mark.long
def test_rank_0_is_named_when_it_is_stopped_and_the_store_with_it(start_without_launcher):
    ranks = start_without_launcher(NOTICE_AFTER="3")
    ranks[0].wait_for("step 3/6")
    ranks[0].process.send_signal(signal.SIGSTOP)
    ranks[1].wait_for("rank 0 on 127.0.0.1 has not answered for 3 s; the other ranks wait for it, 30 minutes at most",
                      stream="err")
    ranks[0].process.send_signal(signal.SIGCONT)
    ranks[1].wait_for("rank 0 on 127.0.0.1 is back", stream="err")
    for job in ranks:
        job.process.send_signal(signal.SIGTERM)
    assert [job.wait(60) for job in ranks] == [75, 75] and not [line for line in ranks[0].errors() if "rank 1" in line]


@pytest.mark.parametrize("failing", [1, pytest.param(0, marks=pytest.mark.long)])
def test_the_error_of_one_rank_is_told_to_the_other(image_folder, start_without_launcher, tmp_path, failing):
    """More unreadable images than are allowed, all in one rank's share. Rank 0 has the store."""
    shutil.copytree(image_folder, tmp_path / "images")
    paths = sorted((tmp_path / "images").rglob("*.jpg"))
    for i in list(RankSampler(paths, 2, failing, shuffle=True, seed=0))[2:]:
        paths[i].write_bytes(b"")
    ranks = start_without_launcher("--data_path", tmp_path / "images", NOTICE_AFTER="12")
    assert [job.wait(60) for job in ranks] == [1, 1]
    own, told = ranks[failing].errors(), ranks[1 - failing].errors()
    assert len(own) == 1 and "more than --max_bad_images" in own[0]
    if failing:
        assert f"error: rank 1 (process {ranks[1].process.pid} on " in told[0] and len(told) == 1
        assert own[0].split("error: ")[1] in told[0]
    else:
        assert not told  # of a machine, the first rank speaks, and it has


BLOCKED = """
import sys, time
from datetime import timedelta
from selfpatch.distributed.processes import init_distributed_mode
from selfpatch.errors import TrainingError
from selfpatch.distributed.rank_watch import RankWatch
rank = init_distributed_mode("cpu").rank
with RankWatch(rank, 2, timedelta(minutes=30), notice_after=6):
    if rank == int(sys.argv[1]):
        raise TrainingError("no more images")
    time.sleep(60)
"""


def test_a_process_ends_also_where_it_cannot_say_why(monkeypatch):
    watch, ended, stderr = RankWatch(0, 2, timedelta(minutes=30)), [], open("/dev/full", "w")
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setattr(os, "_exit", ended.append)
    watch.end_process()
    with pytest.raises(OSError, match="No space"):
        stderr.close()
    assert ended == [1]


@pytest.mark.parametrize("failing", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_blocked_rank_is_ended_when_another_has_told_its_error(failing):
    outputs = run_program(BLOCKED, failing, envs=ranks(), seconds=50)
    status, _, errors = outputs[1 - failing]
    if failing:  # of a machine, the first rank speaks
        assert f"error: rank {failing} (process" in errors and "no more images" in errors
    assert status == 1


@pytest.mark.long
def test_a_rank_that_is_killed_ends_the_others_in_one_line(start_without_launcher):
    ranks = start_without_launcher()
    ranks[0].wait_for("step 3/6")
    ranks[1].process.kill()
    start = time.monotonic()
    assert ranks[0].wait(60) == 1 and time.monotonic() - start < 30
    assert len(ranks[0].errors()) == 1 and "lost contact with another process" in ranks[0].errors()[0]


@pytest.mark.long
def test_a_rank_that_never_starts_is_named(words, tmp_path):
    status, errors = run(tmp_path, *words, "--dist_timeout", 0.25, RANK="0", WORLD_SIZE="3", LOCAL_RANK="0",
                         MASTER_PORT=free_port())
    assert status == 2 and "missing: ranks 1, 2;" in errors[0]
    assert "not all of them joined within 0.25 minutes (--dist_timeout), ranks 1, 2 did not" in errors[1]


def make(folder):
    folder.mkdir()
    return folder


def rank_of(pid):
    with open(f"/proc/{pid}/environ") as file:
        return dict(entry.partition("=")[::2] for entry in file.read().split("\0")).get("RANK")


@pytest.mark.long
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_stays_stopped_is_an_error_after_the_timeout(start_without_launcher, stopped):
    ranks = start_without_launcher("--dist_timeout", 0.2, NOTICE_AFTER="6")
    ranks[0].wait_for("step 3/6")
    ranks[stopped].process.send_signal(signal.SIGSTOP)
    other = ranks[1 - stopped]
    assert other.wait(90) == 1 and "lost contact with another process" in other.errors()[-1]


BOTH = """
import sys
from datetime import timedelta
from selfpatch.distributed.processes import init_distributed_mode
from selfpatch.errors import TrainingError, run_main
from selfpatch.distributed.rank_watch import RankWatch
def main():
    with RankWatch(init_distributed_mode("cpu").rank, 2, timedelta(minutes=30)):
        raise TrainingError("the loss is not finite")
run_main(main)
"""


def test_ranks_that_fail_alike_do_not_wait_for_each_other():
    start = time.monotonic()
    assert all("the loss is not finite" in stderr for _, _, stderr in run_program(BOTH, envs=ranks(), seconds=60))
    assert time.monotonic() - start < 25  # half of the 60 s after which a silent rank is named would be 30
