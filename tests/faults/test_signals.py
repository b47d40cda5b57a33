"""Signals and launchers that end: all ranks save after the same step, and the same command continues to the bit."""
import json
import os
import random
import signal
import time

import pytest
from forked import ranks, run_program
from networks import assert_same
from processes import SCRIPT, Job, run
from small_job import SMALL, load

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")]


@pytest.fixture(scope="module")
def long_options(image_folder):
    """Two epochs of many steps, one image each."""
    return ["--data_path", image_folder, "--batch_size_per_gpu", 1, "--log_every", 1, "--warmup_epochs", 0,
            "--saveckp_freq", 0]


def assert_same_run(ours, other):
    first, second = load(ours / "checkpoint.pth"), load(other / "checkpoint.pth")
    del first["args"], second["args"]
    assert_same(first, second)
    assert (ours / "log.txt").read_bytes() == (other / "log.txt").read_bytes()


@pytest.mark.parametrize("number, whole_group", [
    (signal.SIGINT, True),
    *(pytest.param(number, False, marks=pytest.mark.long)
      for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2))])
def test_one_process_saves_and_says_go_on(long_options, tmp_path, number, whole_group):
    """Ctrl-C reaches the data workers as well."""
    job = Job(tmp_path, *long_options, "--epochs", 100, "--num_workers", 2, "--output_dir", tmp_path / "run")
    job.wait_for("step 3/12")
    (os.killpg if whole_group else os.kill)(job.process.pid, number)
    assert job.wait(60) == 75
    assert len(job.err.read_text().splitlines()) == 1 and "the same command continues from there" in job.errors()[0]
    state = load(tmp_path / "run" / "checkpoint.pth")
    assert state["step_of_epoch"] > 0 or state["epoch"] > 0
    assert not (tmp_path / "run" / "run.lock").exists()


def test_a_second_ctrl_c_ends_at_once(long_options, tmp_path):
    job = Job(tmp_path, *long_options, "--epochs", 100, "--output_dir", tmp_path / "run", SLOW_SAVE="60")
    job.wait_for("step 3/12")
    job.process.send_signal(signal.SIGINT)
    job.wait_for("saving", stream="err")
    job.process.send_signal(signal.SIGINT)
    assert job.wait(20) == 130 and "interrupted twice" in job.errors()[-1]


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1])
def test_two_ranks_whose_launcher_ends(long_options, tmp_path, number):
    """torchrun passes SIGTERM on; when it is killed, or ended by SIGUSR1, its ranks notice."""
    words = [*long_options, "--epochs", 5, "--num_workers", 1]
    job = Job(tmp_path, *words, "--output_dir", tmp_path / "stopped", ranks=2)
    job.wait_for("step 2/6")
    job.process.send_signal(number)
    job.wait(60)
    job.wait_for_all()
    assert len(job.errors()) == 1 and "the same command continues from there" in job.errors()[0]
    state = load(tmp_path / "stopped" / "checkpoint.pth")
    assert state["epoch"] < 5 and len(state.get("ranks", "12")) == 2
    assert run(tmp_path / "output", *words, "--output_dir", tmp_path / "stopped", ranks=2)[0] == 0
    whole = run_program(SCRIPT, *SMALL, *words, "--output_dir", tmp_path / "whole", envs=ranks())
    assert [status for status, *_ in whole] == [0, 0], whole
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_random_moments(long_options, tmp_path, workers):
    """kill -9 twenty times, saving every three steps: no line is missing or doubled, and the end is the same."""
    words = [*long_options, "--epochs", 40, "--num_workers", workers, "--save_every_steps", 3, "--saveckp_freq", 9]
    job = Job(tmp_path, *words, "--output_dir", tmp_path / "whole")
    job.wait_for("starting")
    start = time.monotonic()
    assert job.wait() == 0
    life = (time.monotonic() - start) / 20  # so that twenty lives are about as long as the run
    rng, kills = random.Random(workers), 0
    while kills < 20:
        job = Job(tmp_path, *words, "--output_dir", tmp_path / "killed")
        job.wait_for("resuming" if kills else "starting")
        time.sleep(rng.uniform(0, 1.5 * life))
        if job.process.poll() is not None:
            break
        job.process.kill()
        job.wait()
        kills += 1
    assert run(tmp_path, *words, "--output_dir", tmp_path / "killed")[0] == 0
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    names = [{path.name for path in (tmp_path / run).iterdir()} for run in ("killed", "whole")]
    assert names[0] == names[1] and kills >= 15
    rows = [json.loads(line) for line in (tmp_path / "killed" / "log.txt").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(40))
    steps = [[json.loads(line)["step"] for line in (tmp_path / run / "steps.jsonl").read_text().splitlines()]
             for run in ("killed", "whole")]
    assert steps[0] == steps[1] == list(range(1, len(steps[1]) + 1))
