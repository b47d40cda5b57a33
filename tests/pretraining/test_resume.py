"""Resuming, to the bit, and runs that must not be saved."""
import argparse
import copy
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from networks import assert_same, shrink_job, small_wrapper
from repository import ROOT
from small_job import load, options

from main_selfpatch import train_dino
from selfpatch.errors import ConfigError, TrainingError
from selfpatch.method.fused_loss import FusedDINOLoss
from selfpatch.method.optim import build_optimizer
from selfpatch.method.training_run import TrainingRun, build_schedules
from selfpatch.pretraining import engine, loop
from selfpatch.pretraining.engine import check_logged_steps, train_step
from selfpatch.pretraining.meters import MetricLogger

EARLIER_RUN = ROOT / "tests" / "earlier_run"
pytestmark = [pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning"),
              pytest.mark.usefixtures("small_network")]


@pytest.mark.parametrize("workers, augment", [(0, "auto"), (1, "device"), (1, "pil")])
def test_one_epoch_resumed_equals_two(image_folder, two_epochs, tmp_path, workers, augment, capsys):
    """Stochastic depth, crops and order of images come out as in the run that was never interrupted."""
    whole, words = two_epochs, ["--data_path", image_folder, "--num_workers", workers, "--augment", augment]
    if workers:
        whole = tmp_path / "whole"
        train_dino(options("--epochs", 2, "--output_dir", whole, *words))
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copy(whole / "checkpoint0000.pth", resumed / "checkpoint.pth")
    first_line = (whole / "log.txt").read_text().splitlines()[0]
    (resumed / "log.txt").write_text(first_line + '\n{"train_lo')  # killed while it wrote the second
    torch.manual_seed(1234)  # whatever has been drawn since must not matter
    train_dino(options("--epochs", 2, "--output_dir", resumed, *words))
    assert "resuming after epoch 0" in capsys.readouterr().out
    ours, other = load(resumed / "checkpoint.pth"), load(whole / "checkpoint.pth")
    del ours["args"], other["args"]  # they name the folders
    assert_same(ours, other)
    assert (resumed / "log.txt").read_text() == (whole / "log.txt").read_text()


def test_finished_run_is_left_alone(image_folder, two_epochs, tmp_path):
    shutil.copytree(two_epochs, tmp_path / "copy")
    before = (tmp_path / "copy" / "checkpoint.pth").read_bytes()
    train_dino(options("--epochs", 2, "--data_path", image_folder, "--output_dir", tmp_path / "copy"))
    assert (tmp_path / "copy" / "checkpoint.pth").read_bytes() == before
    assert len((tmp_path / "copy" / "log.txt").read_text().splitlines()) == 2


def test_published_checkpoint_is_resumed(image_folder, two_epochs, tmp_path):
    """args as a Namespace, the student's keys with DDP's prefix, numpy rates, an optimizer that was not fused."""
    state = load(two_epochs / "checkpoint0000.pth")
    for group in state["optimizer"]["param_groups"]:
        group["lr"] = np.float64(group["lr"])
        del group["fused"]
    del state["fp16_scaler"]
    state["args"] = argparse.Namespace(**state["args"])
    state["student"] = {f"module.{k}": v for k, v in state["student"].items()}
    torch.save(state, tmp_path / "checkpoint.pth")
    train_dino(options("--epochs", 2, "--data_path", image_folder, "--output_dir", tmp_path))
    assert_same(load(tmp_path / "checkpoint.pth")["student"], load(two_epochs / "checkpoint.pth")["student"])


def test_half_precision_resumes_from_float32(image_folder, two_epochs, tmp_path):
    """An empty scaler state, and one that is there the next time."""
    shutil.copy(two_epochs / "checkpoint0000.pth", tmp_path / "checkpoint.pth")
    words = ["--epochs", 3, "--data_path", image_folder, "--output_dir", tmp_path, "--precision", "fp16"]
    train_dino(options(*words))
    state = load(tmp_path / "checkpoint0001.pth")
    assert state["fp16_scaler"]["scale"] > 0
    torch.save(state | {"fp16_scaler": state["fp16_scaler"] | {"scale": 8.0}}, tmp_path / "checkpoint.pth")
    train_dino(options(*words))
    assert load(tmp_path / "checkpoint.pth")["fp16_scaler"]["scale"] == 8.0


def test_weights_that_are_not_finite_are_not_saved(image_folder, two_epochs, tmp_path, monkeypatch):
    shutil.copy(two_epochs / "checkpoint0000.pth", tmp_path / "checkpoint.pth")
    epoch = loop.train_one_epoch

    def spoiled(run, *args):
        stats = epoch(run, *args)
        run.student.backbone.pos_embed.data[0, 0, 0] = float("inf")
        return stats

    monkeypatch.setattr(loop, "train_one_epoch", spoiled)
    with pytest.raises(TrainingError, match="weights NaN or infinite"):
        train_dino(options("--epochs", 2, "--data_path", image_folder, "--output_dir", tmp_path))
    assert load(tmp_path / "checkpoint.pth")["epoch"] == 1


def test_nan_is_found_however_seldom_the_log_is_read():
    logger = MetricLogger(window=50)
    for step in range(50):
        logger.update(total=torch.tensor(float("nan") if step == 3 else 1.0))
    logger.read()
    with pytest.raises(TrainingError, match=r"step 103 of epoch 2 \(iteration 503\)"):
        check_logged_steps(SimpleNamespace(step=550, steps_per_epoch=200, skipped_steps=torch.zeros(()),
                                  scaler=torch.amp.GradScaler("cpu", enabled=False)), logger)


def test_loss_that_is_not_finite_stops_and_names_the_step(image_folder, tmp_path, monkeypatch):
    step, count = engine.train_step, iter(range(100))

    def poisoned(*args, **kwargs):
        losses = step(*args, **kwargs)
        return losses._replace(total=losses.total * float("nan")) if next(count) == 4 else losses

    monkeypatch.setattr(engine, "train_step", poisoned)
    with pytest.raises(TrainingError, match=r"step 1 of epoch 1 \(iteration 4\)"):
        train_dino(options("--epochs", 3, "--data_path", image_folder, "--output_dir", tmp_path))
    assert load(tmp_path / "checkpoint.pth")["epoch"] == 1


def test_a_run_of_an_earlier_version_continues(image_folder, tmp_path, monkeypatch, capsys):
    """Its state is taken over; its crops are drawn anew. A checkpoint written in November 2026, commit 326003a.

    vit_tiny 12 wide, 1 deep, heads of 16 and 8; otherwise tests/small_job.py's options with --epochs 2.
    """
    shrink_job(monkeypatch, width=12, depth=1, hidden_dim=16, bottleneck_dim=8)
    shutil.copy(EARLIER_RUN / "checkpoint.pth", tmp_path)
    begun, epoch = [], loop.train_one_epoch
    monkeypatch.setattr(loop, "train_one_epoch", lambda run, *args: (
        begun.append(copy.deepcopy(run.state_dict())), epoch(run, *args))[1])
    train_dino(options("--epochs", 2, "--data_path", image_folder, "--output_dir", tmp_path, "--out_dim", 16,
                       "--out_dim_selfpatch", 8))
    earlier = load(EARLIER_RUN / "checkpoint.pth")
    for name in ("student", "teacher", "dino_loss", "epoch"):
        assert_same(begun[0][name], earlier[name])
    assert_same(begun[0]["optimizer"]["state"], earlier["optimizer"]["state"])
    ours = json.loads((tmp_path / "log.txt").read_text())  # of the second epoch alone: there was no log of the first
    theirs = json.loads((EARLIER_RUN / "log.txt").read_text().splitlines()[1])
    for name in ("train_lr", "train_wd", "epoch"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-6)
    assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=0.3)  # of other crops
    assert capsys.readouterr().out.count("crops are drawn anew: those of ") == 1
    assert load(tmp_path / "checkpoint.pth").keys() == load(EARLIER_RUN / "checkpoint.pth").keys()


def test_a_run_saved_within_an_epoch_continues_at_its_step():
    """Seven steps of five an epoch, then three more, are as ten in one go, to the bit."""
    def new_run():
        torch.manual_seed(0)
        student, teacher = small_wrapper(), small_wrapper().requires_grad_(False)
        return TrainingRun(student, teacher, FusedDINOLoss(12, 10, 3), build_optimizer(student),
                           build_schedules(2, 5, lr=0.1, warmup_epochs=1))

    batches = [[torch.randn(2, 3, 32, 32) for _ in range(3)] for _ in range(10)]
    whole, first, second = new_run(), new_run(), new_run()
    for batch in batches:
        train_step(whole, [batch])
    for batch in batches[:7]:
        train_step(first, [batch])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.step == 7 and "step" not in whole.state_dict()
    for batch in batches[7:]:
        train_step(second, [batch])
    assert_same(second.state_dict(), whole.state_dict())


@pytest.mark.parametrize("change, message", [
    ({"student": None}, "student is a NoneType"), ({"epoch": "x"}, "epoch is 'x'"),
    ({"optimizer": {"param_groups": [], "state": {}}}, "optimizer does not fit"),
    ({"teacher": {}}, "teacher does not fit")])
def test_states_that_do_not_fit_are_config_errors(change, message):
    student, teacher = small_wrapper(), small_wrapper().requires_grad_(False)
    run = TrainingRun(student, teacher, FusedDINOLoss(12, 10, 3), build_optimizer(student), build_schedules(1, 2))
    with pytest.raises(ConfigError, match=message):
        run.load_state_dict(run.state_dict() | change)
