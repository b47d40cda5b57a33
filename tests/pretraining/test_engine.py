"""One step in every way: plain and fused, in small batches, activations checkpointed, compiled, in half precision."""
import shutil

import pytest
import torch
from golden_rules import set_weights
from networks import constant_run, small_wrapper

from selfpatch.method.fused_loss import FusedDINOLoss
from selfpatch.method.losses import DINOLoss
from selfpatch.method.optim import build_optimizer
from selfpatch.method.selfpatch_head import PackedMultiCropWrapper
from selfpatch.method.training_run import Schedules, TrainingRun
from selfpatch.pretraining import engine
from selfpatch.pretraining.engine import health_warnings, train_one_epoch, train_step


def make_batch(images=6):
    return [torch.randn(images, 3, size, size) for size in (32, 32, 24, 24, 24)]


def run_step(batches, drop_path_rate=0.0, prepare=lambda *_: None, fast=True, clip_grad=0, steps=1,
             depth=2, **options):
    """Losses, gradients and centres of a step on a list of batches, the last of several; the teacher is not a copy of
    the student."""
    device = batches[0][0].device
    student = set_weights(small_wrapper(drop_path_rate=drop_path_rate, depth=depth), salt=0, tag="student.").to(device)
    teacher = set_weights(small_wrapper(depth=depth), salt=0, tag="teacher.").requires_grad_(False).to(device)
    student.ca_head.fast = teacher.ca_head.fast = fast
    dino_loss = (FusedDINOLoss if fast else DINOLoss)(12, 10, 5).to(device)
    torch.manual_seed(1)
    prepare(student, teacher, dino_loss)
    run = constant_run(student, teacher, dino_loss, clip_grad=clip_grad, accum_steps=len(batches), **options)
    for _ in range(steps):
        losses = train_step(run, batches)
    return {"losses": torch.stack(losses), **{name: p.grad for name, p in student.named_parameters()
                                              if p.grad is not None}, **dino_loss.state_dict()}


def assert_same(ours, expected, rtol=1e-5, atol=1e-5):
    assert ours.keys() == expected.keys() and len(ours) > 50
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def split(batch):
    return [[crop[i:i + 2] for crop in batch] for i in (0, 2, 4)]


@pytest.mark.parametrize("small_batches", [False, True])
def test_the_plain_form_gives_the_same_step(small_batches):
    """Losses, entropies, every gradient and centre through the paper's plain loss and head."""
    batches = split(make_batch()) if small_batches else [make_batch()]
    assert_same(run_step(batches), run_step(batches, fast=False))


def test_small_batches_equal_a_large_one():
    batch = make_batch()
    ours, expected = run_step(split(batch)), run_step([batch])
    ours["losses"], expected["losses"] = ours["losses"][:3], expected["losses"][:3]  # entropies are of small batches
    assert_same(ours, expected)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_what_cuda_graphs_gave_may_be_overwritten_from_the_next_step_on(cuda_graphs, monkeypatch):
    """Not within a step, of however many small batches."""
    marks = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    run_step(split(make_batch()), cuda_graphs=cuda_graphs)
    assert len(marks) == cuda_graphs


def test_too_few_small_batches_are_an_error():
    student, teacher = small_wrapper(), small_wrapper().requires_grad_(False)
    run = constant_run(student, teacher, FusedDINOLoss(12, 10, 5), accum_steps=3)
    with pytest.raises(ValueError, match="2 small batches for a step of 3"):
        train_step(run, [make_batch(2)] * 2)
    assert run.step == 0


@pytest.mark.parametrize("part, times", [("block", 4), ("mlp", 4), ("attention", 2)])
def test_checkpointed_activations_give_the_same_gradients(part, times):
    """With stochastic depth, whose draws the second computation has to repeat."""
    kept, runs = [], []

    def prepare(student, *_):
        student.backbone.checkpoint_activations = part
        student.backbone.blocks[1].mlp.fc1.register_forward_hook(lambda *_: runs.append(1))

    batch = make_batch()
    expected = run_step([batch], drop_path_rate=0.5, prepare=lambda student, *_: kept.append(student))
    assert_same(run_step([batch], drop_path_rate=0.5, prepare=prepare), expected)
    assert len(runs) == times  # two resolutions, each forward and maybe again in the backward pass


@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.long), True], ids=["by size", "packed"])
def test_graphs_have_no_breaks(packed):
    """torch.compile takes the networks and the losses whole, and what it has traced computes the same."""
    def prepare(*parts):
        torch._dynamo.reset()
        for network in parts[:2] if packed else ():
            network.__class__ = PackedMultiCropWrapper
        for part in parts:
            part.compile(dynamic=False, fullgraph=True, backend="aot_eager")

    batch = make_batch(2)
    assert_same(run_step([batch], prepare=prepare, depth=1), run_step([batch], depth=1))


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_the_loss_that_inductor_compiles_gives_the_same_step():
    """test_train_step.py has inductor compile all of it, networks included (pytest -m long)."""
    def prepare(student, teacher, dino_loss):
        dino_loss.compile(dynamic=False)

    batch = make_batch(2)
    assert_same(run_step([batch], prepare=prepare), run_step([batch]))


def test_half_precision_stays_near():
    batch = make_batch()
    ours, expected = run_step([batch], dtype=torch.bfloat16), run_step([batch])
    torch.testing.assert_close(ours["losses"][:3], expected["losses"][:3], rtol=0.02, atol=0)
    for name, value in expected.items():
        if "attn.k.bias" not in name:  # its gradient is rounding alone
            assert (ours[name] - value).norm() < 0.1 * value.norm() + 1e-4, name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("small_batches", [False, True])
def test_cuda_graphs_give_the_same_step(small_batches):
    """The fourth step, which is replayed: the first three compile, warm up and record."""
    batch = [crop.cuda() for crop in make_batch()]
    batches = split(batch) if small_batches else [batch]
    results = []
    for mode in (None, "reduce-overhead"):
        def prepare(*parts, mode=mode):
            for part in parts:
                part.compile(dynamic=False, mode=mode)

        results.append(run_step(batches, prepare=prepare, steps=4, optimizer="adamw",
                                cuda_graphs=mode is not None))
    assert_same(*results)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_waits_for_the_gpu(dtype, compiled):
    batch = [crop.cuda() for crop in make_batch()]

    def compile_parts(*parts):
        for part in parts if compiled else ():
            part.compile(dynamic=False)

    def compile_and_watch(*parts):
        compile_parts(*parts)
        if dtype != torch.float16:  # a GradScaler copies its first factor to the GPU
            torch.cuda.set_sync_debug_mode("error")

    for prepare in (compile_parts, compile_and_watch):  # the first step compiles, and fills caches
        try:
            run = run_step([batch], prepare=prepare, optimizer="adamw", clip_grad=3.0, dtype=dtype)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert run["losses"].isfinite().all()


def test_epoch_sets_rates_decay_and_momentum_at_every_step(monkeypatch):
    """lr on both groups, weight decay on the first alone, momentum to the step, by the iteration of the whole run."""
    student, teacher = small_wrapper(), small_wrapper().requires_grad_(False)
    optimizer = build_optimizer(student)
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.999)] * 2
    schedules = Schedules(2, 3, lambda step: 0.1 * step, lambda step: 1.0 * step, lambda step: 0.9 + 0.01 * step)
    run = TrainingRun(student, teacher, FusedDINOLoss(12, 10, 3), optimizer, schedules)
    run.step, applied = 3, []  # the second epoch
    monkeypatch.setattr(engine, "update_teacher", lambda student, teacher, momentum: applied.append(
        ([g["lr"] for g in optimizer.param_groups], [g["weight_decay"] for g in optimizer.param_groups], momentum)))

    class Loader(list):
        batch_size = 2

    stats = train_one_epoch(run, Loader([[torch.randn(2, 3, 32, 32)] * 3] * 3))
    assert applied == [([0.1 * i] * 2, [1.0 * i, 0.0], 0.9 + 0.01 * i) for i in (3, 4, 5)]
    assert (stats["lr"], stats["wd"]) == (0.1 * 5, 5.0)
    assert (run.step, run.epoch) == (6, 2)


def test_health_warnings():
    loss = DINOLoss(64, 32, 10)
    healthy = {"clsloss": 3.0, "patchloss": 2.5, "cls_entropy": 3.0, "patch_entropy": 2.0}
    assert health_warnings(healthy, loss, warmed_up=True, batch_size=8) == []
    stuck = healthy | {"clsloss": 4.16}  # ln 64 = 4.159
    assert health_warnings(stuck, loss, warmed_up=False, batch_size=8) == []
    assert "image loss 4.1600 is at ln K = 4.1589" in health_warnings(stuck, loss, True, 8)[0]
    collapsed = healthy | {"patch_entropy": 1e-3}
    warnings = health_warnings(collapsed, loss, False, 8)
    assert len(warnings) == 1 and "every patch to the same prototype" in warnings[0]
    assert health_warnings(collapsed, loss, False, batch_size=1) == []  # so few may well be alike
    dino = DINOLoss(64, 32, 10, patch_loss_weight=0)
    assert health_warnings(collapsed | {"patchloss": 0.0}, dino, True, 8) == []
