"""A loss or gradient that is not finite: named, not taken, and the state before it kept."""
import copy

import pytest
import torch
from networks import assert_same, constant_run, small_wrapper
from small_job import load, options

from main_selfpatch import train_dino
from selfpatch.errors import TrainingError
from selfpatch.method.fused_loss import FusedDINOLoss
from selfpatch.pretraining import engine
from selfpatch.pretraining.engine import NotFiniteError, check_logged_steps, train_step
from selfpatch.pretraining.meters import MetricLogger

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
CROPS = [[torch.randn(2, 3, 32, 32) for _ in range(3)]]


def make_run(**kwargs):
    torch.manual_seed(0)
    student, teacher = small_wrapper(), small_wrapper().requires_grad_(False)
    return constant_run(student, teacher, FusedDINOLoss(12, 10, 3), "adamw", steps_per_epoch=10, **kwargs)


def poison(run, name="backbone.blocks.1.norm1.weight"):
    """Make one gradient of the next backward pass infinite."""
    parameter = dict(run.student.named_parameters())[name]
    handle = parameter.register_hook(lambda grad: torch.full_like(grad, float("inf")))
    return handle


def state(run):
    return copy.deepcopy(run.state_dict())


def test_a_gradient_that_is_not_finite_changes_nothing():
    run = make_run()
    train_step(run, CROPS)
    before, handle = state(run), poison(run)
    with pytest.raises(NotFiniteError, match=r"the loss was [0-9.]+ .image [0-9.]+, patch [0-9.]+. and 1 of \d+ "
                                             r"gradients were not finite, first that of "
                                             r"backbone.blocks.1.norm1.weight, at step 1"):
        train_step(run, CROPS)
    assert_same(state(run), before)
    handle.remove()
    train_step(run, CROPS)
    assert run.step == 2


def test_where_nobody_waits_for_the_device_the_steps_after_it_change_nothing_either():
    """The way of a GPU, on the CPU."""
    run, logger = make_run(), MetricLogger(window=4)
    run.reads_are_free = False
    logger.update(**train_step(run, CROPS)._asdict())
    before, handle = state(run), poison(run)
    logger.update(**train_step(run, CROPS)._asdict())
    handle.remove()
    for _ in range(2):
        logger.update(**train_step(run, CROPS)._asdict())
    logger.read()
    with pytest.raises(NotFiniteError, match=r"1 of \d+ gradients were not finite, first that of "
                                             r"backbone.blocks.1.norm1.weight, at step 1 of epoch 0"):
        check_logged_steps(run, logger)
    for part in ("student", "optimizer", "dino_loss"):
        assert_same(state(run)[part], before[part], part)


def test_both_ways_train_alike():
    first, second = make_run(), make_run()
    second.reads_are_free = False
    for run in (first, second):
        for _ in range(3):
            train_step(run, CROPS)
    assert_same(state(second), state(first))


def test_steps_that_float16_skips_move_neither_teacher_nor_centres():
    run = make_run(dtype=torch.float16)
    before, handle = state(run), poison(run)
    train_step(run, CROPS)
    for part in ("student", "teacher", "dino_loss"):
        assert_same(state(run)[part], before[part], part)
    handle.remove()
    for _ in range(20):  # until the scale is small enough
        train_step(run, CROPS)
    assert not torch.equal(state(run)["teacher"]["backbone.pos_embed"], before["teacher"]["backbone.pos_embed"])


@pytest.mark.parametrize("has_bfloat16, use", [(True, "bf16 or fp32"), (False, "fp32")])
def test_float16_that_never_takes_a_step_ends_the_run(monkeypatch, has_bfloat16, use):
    monkeypatch.setattr("selfpatch.pretraining.engine.has_bfloat16", lambda device: has_bfloat16)
    run, logger = make_run(dtype=torch.float16), MetricLogger(window=1)
    poison(run)
    with pytest.raises(NotFiniteError, match=f"overflow at every scale.*use --precision {use}$"):
        for _ in range(40):
            logger.update(**train_step(run, CROPS)._asdict())
            logger.read()
            check_logged_steps(run, logger)


def test_the_run_ends_and_keeps_the_state_before_the_step(image_folder, tmp_path, monkeypatch, small_network):
    step = engine.train_step

    def poisoned(run, batches):
        if run.step == 4:
            torch.save(run.state_dict(), tmp_path / "before.pth")
            poison(run, "backbone.blocks.0.norm1.weight")
        return step(run, batches)

    monkeypatch.setattr(engine, "train_step", poisoned)
    with pytest.raises(TrainingError, match="first that of backbone.blocks.0.norm1.weight, at step 1 of epoch 1"
                                            ".*state before that step is in .*nan.pth"):
        train_dino(options("--epochs", 3, "--data_path", image_folder, "--output_dir", tmp_path / "run"))
    kept, before = load(tmp_path / "run" / "nan.pth"), load(tmp_path / "before.pth")
    for part in ("student", "teacher", "dino_loss", "epoch", "step_of_epoch"):
        assert_same(kept[part], before[part], part)
    assert_same(kept["optimizer"]["state"], before["optimizer"]["state"])
    assert load(tmp_path / "run" / "checkpoint.pth")["epoch"] == 1
