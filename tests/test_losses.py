"""The loss against its definition, written out view by view, and what its extremes look like."""
import math

import pytest
import torch

from losses import DINOLoss

B, V, K, KP = 3, 5, 11, 7
GRIDS = (9, 9, 4, 4, 4)  # patches of each view


def make_loss(**kwargs):
    options = {"warmup_teacher_temp": 0.04, "teacher_temp": 0.07, "warmup_teacher_temp_epochs": 3, "nepochs": 10}
    return DINOLoss(K, KP, V, **options | kwargs)


def make_output(scale=1.0):
    """Image logits [V·B, K], patch logits of 2 global and 3 local views."""
    return (torch.randn(V * B, K) * scale, [torch.randn(2 * B, 9, KP) * scale, torch.randn(3 * B, 4, KP) * scale])


def views(output):
    image, (big, small) = output
    return image.unflatten(0, (V, B)), [*big.unflatten(0, (2, B)), *small.unflatten(0, (3, B))]


def cross_entropy(teacher, center, student, temp):
    """H(softmax((t − center)/temp), softmax(s/0.1)) of each row."""
    return -(((teacher - center) / temp).softmax(-1) * (student / 0.1).log_softmax(-1)).sum(-1)


@pytest.mark.parametrize("epoch, temp", [(0, 0.04), (1, 0.055), (2, 0.07), (9, 0.07)])
def test_definition(epoch, temp):
    student, teacher, loss = make_output(), make_output(), make_loss()
    loss.center.normal_()
    loss.patch_center.normal_()
    (s_image, s_patch), (t_image, t_patch) = views(student), views(teacher)
    pairs = [cross_entropy(t_image[a], loss.center[0, 0], s_image[v], temp).mean()
             for a in (0, 1) for v in range(V) if v != a]
    assert len(pairs) == 2 * (V - 1)
    image = torch.stack(pairs).mean()
    patch = torch.stack([cross_entropy(t, loss.patch_center, s, temp).mean()
                         for t, s in zip(t_patch, s_patch, strict=True)]).mean()
    out = loss(student, teacher, epoch)
    torch.testing.assert_close(torch.stack(out[:3]), torch.stack([image + 0.1 * patch, image, patch]))


def test_centres_move_by_the_mean_over_all_views_and_patches():
    teacher, loss = make_output(), make_loss()
    loss.center.fill_(1)
    loss.patch_center.fill_(2)
    t_image, t_patch = views(teacher)
    loss(make_output(), teacher, 0)
    torch.testing.assert_close(loss.center, 0.9 + 0.1 * t_image.mean((0, 1))[None, None])
    rows = torch.cat([t.flatten(0, 1) for t in t_patch])
    torch.testing.assert_close(loss.patch_center, 1.8 + 0.1 * rows.mean(0)[None])


def test_state_holds_the_centres():
    assert {k: tuple(v.shape) for k, v in make_loss().state_dict().items()} == {
        "center": (1, 1, K), "patch_center": (1, KP)}


def test_uniform_student_sits_on_ln_k():
    student = (torch.zeros(V * B, K), [torch.zeros(2 * B, 9, KP), torch.zeros(3 * B, 4, KP)])
    out = make_loss()(student, make_output(), 0)
    assert out.image.item() == pytest.approx(math.log(K), rel=1e-6)
    assert out.patch.item() == pytest.approx(math.log(KP), rel=1e-6)


def test_entropies_tell_collapse_and_uniformity():
    one = (torch.eye(K)[:1].expand(V * B, K) * 10, [torch.eye(KP)[0].expand(n * B, g, KP) * 10
                                                    for n, g in ((2, 9), (3, 4))])
    out = make_loss()(make_output(), one, 0)
    assert out.image_entropy.item() == pytest.approx(0, abs=1e-6)
    assert out.patch_entropy.item() == pytest.approx(0, abs=1e-6)
    flat = (torch.zeros(V * B, K), [torch.zeros(2 * B, 9, KP), torch.zeros(3 * B, 4, KP)])
    out = make_loss()(make_output(), flat, 0)
    assert out.image_entropy.item() == pytest.approx(math.log(K)) and out.patch_entropy.item() == pytest.approx(
        math.log(KP))


def test_weight_0_is_dino_with_the_teachers_two_views():
    student, (t_image, _) = make_output(), make_output()
    loss, full = make_loss(patch_loss_weight=0), make_loss()
    out = loss((student[0], []), (t_image[:2 * B], []), 0)
    torch.testing.assert_close(out.total, full(student, (t_image, make_output()[1]), 0).image)
    torch.testing.assert_close(loss.center[0, 0], 0.1 * t_image[:2 * B].mean(0))
    assert out.patch == 0 and not loss.patch_center.any()


def test_gradients_reach_the_student_only():
    student, teacher = make_output(), make_output()
    leaves = [student[0], *student[1]]
    for leaf in [*leaves, teacher[0], *teacher[1]]:
        leaf.requires_grad_()
    # as in a step, the teacher's logits come without a graph
    make_loss()(student, (teacher[0].detach(), [t.detach() for t in teacher[1]]), 0).total.backward()
    for v, grad in enumerate(student[0].grad.unflatten(0, (V, B))):
        assert grad.abs().sum() > 0, v
    assert all(leaf.grad.abs().sum() > 0 for leaf in leaves) and teacher[0].grad is None


def test_half_precision_logits_are_taken_to_float32():
    student, teacher = make_output(0.3), make_output(0.3)
    halves = [(image.bfloat16(), [p.bfloat16() for p in patches]) for image, patches in (student, teacher)]
    rounded = [(image.float(), [p.float() for p in patches]) for image, patches in halves]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = make_loss()(*halves, 0)
    assert out.total.dtype == torch.float32
    torch.testing.assert_close(out.total, make_loss()(*rounded, 0).total)


@pytest.mark.parametrize("warmup, epochs", [(0, 5), (5, 5), (2, 5)])
def test_temperature_schedule_covers_the_run(warmup, epochs):
    schedule = make_loss(warmup_teacher_temp_epochs=warmup, nepochs=epochs).teacher_temp_schedule
    assert len(schedule) == epochs
    assert schedule[-1] == pytest.approx(0.07) and schedule[0] == pytest.approx(0.04 if warmup else 0.07)
