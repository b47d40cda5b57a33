"""Stopped within an epoch by a signal, and continued: to the bit what the run that was never stopped gives."""
import os
import shutil
import signal

import pytest
import torch
from networks import assert_same
from small_job import load, options

from main_selfpatch import train_dino
from selfpatch.data.loader import RankSampler
from selfpatch.distributed.stopping import STOP, Interruption
from selfpatch.errors import CONTINUE_STATUS, ConfigError, RunStopped, TrainingError
from selfpatch.pretraining import engine

pytestmark = [pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning"),
              pytest.mark.usefixtures("small_network")]


def signal_at(monkeypatch, step, number=signal.SIGUSR1):
    """Send this process a signal while it does its step-th step, counted from 0."""
    train_step = engine.train_step

    def signalled(run, batches):
        if run.step == step:
            os.kill(os.getpid(), number)
        return train_step(run, batches)

    monkeypatch.setattr(engine, "train_step", signalled)


def stop_and_continue(monkeypatch, step, *words, then=()):
    with monkeypatch.context() as patch, pytest.raises(RunStopped) as stopped:
        signal_at(patch, step)
        train_dino(options(*words))
    assert stopped.value.status == CONTINUE_STATUS and stopped.value.signal_number == signal.SIGUSR1
    torch.manual_seed(1234)  # whatever has been drawn since must not matter
    train_dino(options(*words, *then))


@pytest.fixture(scope="module")
def whole_runs(image_folder, tmp_path_factory):
    """Runs of two epochs, three steps each, that nothing interrupts, by their options."""
    runs = {}

    def whole(*words):
        if words not in runs:
            runs[words] = tmp_path_factory.mktemp("whole")
            train_dino(options("--epochs", 2, "--data_path", image_folder, "--output_dir", runs[words], *words))
        return runs[words]

    return whole


@pytest.mark.parametrize("step, words, then", [
    *((step, ("--num_workers", 0), ()) for step in (0, 1, 2, 4)), (1, ("--num_workers", 0), ("--num_workers", 2)),
    (1, ("--num_workers", 2), ("--num_workers", 0)),
    (1, ("--num_workers", 2, "--augment", "pil"), ("--num_workers", 1)),
    (1, ("--batch_size_per_gpu", 2, "--accum_steps", 2), ())])
def test_stopped_run_equals_the_whole_one(whole_runs, image_folder, tmp_path, monkeypatch, step, words, then):
    """Also with another number of workers."""
    whole = whole_runs(*words)
    stop_and_continue(monkeypatch, step, "--epochs", 2, "--data_path", image_folder, "--output_dir", tmp_path, *words,
                      then=then)
    ours, other = load(tmp_path / "checkpoint.pth"), load(whole / "checkpoint.pth")
    del ours["args"], other["args"]  # they name the folders
    assert_same(ours, other)
    assert (tmp_path / "log.txt").read_bytes() == (whole / "log.txt").read_bytes()


def test_a_run_stopped_by_an_earlier_version_continues(whole_runs, image_folder, tmp_path, monkeypatch, capsys):
    """Whose checkpoint holds the workers' random states, too."""
    words = ["--epochs", 2, "--data_path", image_folder, "--output_dir", tmp_path]
    with monkeypatch.context() as patch, pytest.raises(RunStopped):
        signal_at(patch, 1)
        train_dino(options(*words))
    state = load(tmp_path / "checkpoint.pth")
    del state["args"]["crop_seeds"]
    state["ranks"] = [{"loader": {"batch": 2, "batch_size": 4, "rng": rank["rng"], "num_workers": 2,
                                  "worker_rng": {0: bytes(5056), 1: bytes(5056)}}, "meters": rank["meters"]}
                      for rank in state["ranks"]]
    torch.save(state, tmp_path / "checkpoint.pth")
    capsys.readouterr()
    train_dino(options(*words))
    assert capsys.readouterr().out.count("crops are drawn anew") == 1
    assert_same(load(tmp_path / "checkpoint.pth")["student"], load(whole_runs("--num_workers", 0) / "checkpoint.pth")[
        "student"])


def test_saves_every_so_many_steps_change_nothing(whole_runs, image_folder, tmp_path):
    whole = whole_runs("--num_workers", 0)
    train_dino(options("--epochs", 2, "--data_path", image_folder, "--output_dir", tmp_path, "--save_every_steps", 2))
    previous = load(tmp_path / "previous.pth")
    assert (previous["epoch"], previous["step_of_epoch"]) == (1, 1)
    assert_same(load(tmp_path / "checkpoint.pth")["student"], load(whole / "checkpoint.pth")["student"])


def test_another_division_of_the_batch_continues_with_the_same_images(image_folder, tmp_path, monkeypatch, capsys):
    """And the epoch's means are over the steps before the stop as well."""
    stop_and_continue(monkeypatch, 0, "--epochs", 1, "--data_path", image_folder, "--output_dir", tmp_path,
                      then=["--num_workers", 1, "--batch_size_per_gpu", 2, "--accum_steps", 2, "--log_every", 1])
    out = capsys.readouterr().out
    assert "resuming in epoch 0 after step 1" in out and "step 2/3" in out
    assert load(tmp_path / "checkpoint.pth")["optimizer"]["state"][0]["step"] == 3


@pytest.mark.parametrize("then", [["--batch_size_per_gpu", 2, "--accum_steps", 2], ["--num_workers", 1]])
def test_every_image_is_seen_once_whatever_divides_the_batch(image_folder, tmp_path, monkeypatch, then):
    """Four images a step, stopped after one step, and continued in halves or by a worker."""
    read, words = [], ["--epochs", 1, "--data_path", image_folder, "--output_dir", tmp_path, "--num_workers", 0]
    order = RankSampler.__iter__

    def recorded(sampler):
        for i in order(sampler):
            read.append(i)
            yield i

    monkeypatch.setattr(RankSampler, "__iter__", recorded)
    with monkeypatch.context() as patch, pytest.raises(RunStopped):
        signal_at(patch, 0)
        train_dino(options(*words))
    first = read[:4]
    read.clear()
    train_dino(options(*words, *then))
    assert sorted(first + read) == list(range(12))


def test_another_batch_within_an_epoch_is_refused_where_it_does_not_fit(image_folder, tmp_path, monkeypatch):
    words = ["--epochs", 1, "--data_path", image_folder, "--output_dir", tmp_path]
    with pytest.raises(ConfigError, match="images in a step: 6 .there 4.*--allow_changed batch"):
        stop_and_continue(monkeypatch, 0, *words, then=["--batch_size_per_gpu", 6])
    with pytest.raises(ConfigError, match="4 images into an epoch, which is no whole number of steps of 6"):
        train_dino(options(*words, "--batch_size_per_gpu", 6, "--allow_changed", "batch"))
    train_dino(options(*words, "--batch_size_per_gpu", 2, "--allow_changed", "batch"))
    assert load(tmp_path / "checkpoint.pth")["optimizer"]["state"][0]["step"] == 5  # one of 4 images, then four of 2


def test_bad_images_are_listed_by_a_stop_within_an_epoch(image_folder, tmp_path, monkeypatch):
    shutil.copytree(image_folder, tmp_path / "images")
    for path in (tmp_path / "images" / "class0").iterdir():
        path.write_bytes(b"")
    with pytest.raises(RunStopped):
        signal_at(monkeypatch, 1)
        train_dino(options("--epochs", 1, "--data_path", tmp_path / "images", "--output_dir", tmp_path / "run",
                           "--max_bad_images", 1))
    lines = (tmp_path / "run" / "bad_images.txt").read_text().splitlines()
    assert lines and all("class0" in line for line in lines)


def test_the_whole_list_is_written_where_bad_images_end_the_run(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "images")
    for path in (tmp_path / "images" / "class0").iterdir():
        path.write_bytes(b"")
    with pytest.raises(TrainingError, match=r"of 12 images, which is more than --max_bad_images 0.2\)"):
        train_dino(options("--epochs", 1, "--data_path", tmp_path / "images", "--output_dir", tmp_path / "run",
                           "--max_bad_images", 0.2))
    assert len((tmp_path / "run" / "bad_images.txt").read_text().splitlines()) >= 3


@pytest.mark.parametrize("signals, expected", [
    ([signal.SIGTERM, signal.SIGUSR2], signal.SIGUSR2), ([signal.SIGUSR1, signal.SIGTERM], signal.SIGUSR1),
    ([signal.SIGINT, signal.SIGTERM], signal.SIGINT)])
def test_which_signal_a_run_is_stopped_by(signals, expected):
    with Interruption() as interruption:
        for number in signals:
            os.kill(os.getpid(), number)
        assert interruption.signal == expected and interruption.agree() == STOP


def test_handlers_are_restored(image_folder, tmp_path, monkeypatch):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD)]
    with pytest.raises(RunStopped):
        signal_at(monkeypatch, 1, signal.SIGTERM)
        train_dino(options("--epochs", 1, "--data_path", image_folder, "--output_dir", tmp_path, "--num_workers", 1))
    assert before == [signal.getsignal(number) for number in (
        signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD)]
    assert not (tmp_path / "run.lock").exists()
