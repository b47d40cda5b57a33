"""One step by every way there is: in small batches, with activations checkpointed, compiled, in half precision."""
import argparse

import pytest
import torch
from golden_rules import set_weights
from networks import small_wrapper

from engine import train_step
from losses import DINOLoss
from main_selfpatch import build_optimizer


def make_batch(images=6):
    return [torch.randn(images, 3, size, size) for size in (32, 32, 24, 24, 24)]


def run_step(batches, drop_path_rate=0.0, prepare=lambda *_: None, optimizer="sgd", clip_grad=0, **options):
    """Losses, gradients and centres of one step on a list of batches; the teacher is no copy of the student."""
    device = batches[0][0].device
    student = set_weights(small_wrapper(drop_path_rate=drop_path_rate), salt=0, tag="student.").to(device)
    teacher = set_weights(small_wrapper(), salt=0, tag="teacher.").requires_grad_(False).to(device)
    dino_loss = DINOLoss(12, 10, 5, 0.04, 0.04, 0, 1).to(device)
    optimizer = build_optimizer(argparse.Namespace(optimizer=optimizer, device=device), student)
    torch.manual_seed(1)
    prepare(student, teacher, dino_loss)
    losses = train_step(student, teacher, dino_loss, optimizer, batches, epoch=0, momentum=0.9, clip_grad=clip_grad,
                        freeze_last_layer=0, accum_steps=len(batches), **options)
    return {"losses": torch.stack(losses[:3]), **{name: p.grad for name, p in student.named_parameters()
                                                  if p.grad is not None}, **dino_loss.state_dict()}


def assert_same(ours, expected, rtol=1e-5, atol=1e-5):
    assert ours.keys() == expected.keys() and len(ours) > 50
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def test_small_batches_equal_a_large_one():
    batch = make_batch()
    parts = [[crop[i:i + 2] for crop in batch] for i in (0, 2, 4)]
    assert_same(run_step(parts), run_step([batch]))


def test_checkpointed_activations_give_the_same_gradients():
    """With stochastic depth, whose draws the second computation has to repeat."""
    kept, runs = [], []

    def prepare(student, *_):
        student.backbone.checkpoint_activations = True
        student.backbone.blocks[1].mlp.fc1.register_forward_hook(lambda *_: runs.append(1))

    batch = make_batch()
    expected = run_step([batch], drop_path_rate=0.5, prepare=lambda student, *_: kept.append(student))
    assert_same(run_step([batch], drop_path_rate=0.5, prepare=prepare), expected)
    assert len(runs) == 4  # two resolutions, each forward and again in the backward pass


def test_graphs_have_no_breaks():
    """torch.compile takes the networks and the losses whole, and what it has traced computes the same."""
    def prepare(*parts):
        torch._dynamo.reset()
        for part in parts:
            part.compile(dynamic=False, fullgraph=True, backend="aot_eager")

    batch = make_batch()
    assert_same(run_step([batch], prepare=prepare), run_step([batch]))


def test_half_precision_stays_near():
    batch = make_batch()
    ours, expected = run_step([batch], dtype=torch.bfloat16), run_step([batch])
    torch.testing.assert_close(ours["losses"], expected["losses"], rtol=0.02, atol=0)
    for name, value in expected.items():
        if "attn.k.bias" not in name:  # its gradient is rounding alone
            assert (ours[name] - value).norm() < 0.1 * value.norm() + 1e-4, name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_waits_for_the_gpu(dtype, compiled):
    batch, scaler = [crop.cuda() for crop in make_batch()], torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    scaler.scale(torch.ones((), device="cuda"))  # its factor is copied to the GPU with the first use

    def compile_parts(*parts):
        for part in parts if compiled else ():
            part.compile(dynamic=False)

    def compile_and_watch(*parts):
        compile_parts(*parts)
        torch.cuda.set_sync_debug_mode("error")

    for prepare in (compile_parts, compile_and_watch):  # the first step compiles, and fills caches
        try:
            run = run_step([batch], prepare=prepare, optimizer="adamw", clip_grad=3.0, dtype=dtype, scaler=scaler)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert run["losses"].isfinite().all()
