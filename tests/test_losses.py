"""The loss against its definition, written out view by view, and what its extremes look like."""
import math

import pytest
import torch

import losses
from losses import DINOLoss
from vision_transformer import Logits

B, V, K, KP = 3, 5, 11, 7
GRIDS = (9, 9, 4, 4, 4)  # patches of each view


def make_loss(**kwargs):
    options = {"warmup_teacher_temp": 0.04, "teacher_temp": 0.07, "warmup_teacher_temp_epochs": 3, "nepochs": 10}
    return DINOLoss(K, KP, V, **options | kwargs)


@pytest.fixture(autouse=True, params=[10**6, 50], ids=["whole", "in parts"])
def held_at_once(request, monkeypatch):
    """Every property also where the logits come a few samples at a time, the last time fewer."""
    monkeypatch.setitem(losses.HELD_AT_ONCE, "cpu", request.param)


def make_output(scale=1.0):
    """Image logits [V·B, K], patch logits of 2 global and 3 local views."""
    image, patch = torch.randn(K, 6) * scale, torch.randn(KP, 6) * scale
    return Logits(torch.randn(V * B, 6), image), [Logits(torch.randn(n * B, g, 6), patch) for n, g in ((2, 9), (3, 4))]


def formed(image, patches):
    """Dense logits as a product with ones."""
    return Logits(image, torch.eye(K)), [Logits(p, torch.eye(KP)) for p in patches]


def leaves(output):
    return [output[0].z, output[0].weight, *(p.z for p in output[1]), output[1][0].weight]


def views(output):
    image, (big, small) = output[0].dense(), [p.dense() for p in output[1]]
    return image.unflatten(0, (V, B)), [*big.unflatten(0, (2, B)), *small.unflatten(0, (3, B))]


def cross_entropy(teacher, center, student, temp):
    """H(softmax((t − center)/temp), softmax(s/0.1)) of each row."""
    return -(((teacher - center) / temp).softmax(-1) * (student / 0.1).log_softmax(-1)).sum(-1)


@pytest.mark.parametrize("epoch, temp", [(0, 0.04), (1, 0.055), (2, 0.07), (9, 0.07)])
def test_definition(epoch, temp):
    student, teacher, loss = make_output(), make_output(), make_loss()
    loss.center.normal_()
    loss.patch_center.normal_()
    expected = definition(views(student), views(teacher), loss, temp)
    out = loss(student, teacher, epoch)
    torch.testing.assert_close(torch.stack(out[:3]), expected)


def definition(student, teacher, loss, temp):
    """Total, image and patch loss, pair by pair and view by view."""
    (s_image, s_patch), (t_image, t_patch) = student, teacher
    pairs = [cross_entropy(t_image[a], loss.center[0, 0], s_image[v], temp).mean()
             for a in (0, 1) for v in range(V) if v != a]
    assert len(pairs) == 2 * (V - 1)
    image = torch.stack(pairs).mean()
    patch = torch.stack([cross_entropy(t, loss.patch_center, s, temp).mean()
                         for t, s in zip(t_patch, s_patch, strict=True)]).mean()
    return torch.stack([image + 0.1 * patch, image, patch])


def test_gradients_are_the_definitions():
    student, teacher, loss = make_output(), make_output(), make_loss()
    loss.center.normal_()
    for leaf in leaves(student):
        leaf.requires_grad_()
    expected = torch.autograd.grad(definition(views(student), views(teacher), loss, 0.04)[0] * 3, leaves(student))
    ours = torch.autograd.grad(loss(student, teacher, 0).total * 3, leaves(student))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_centres_move_by_the_mean_over_all_views_and_patches():
    teacher, loss = make_output(), make_loss()
    loss.center.fill_(1)
    loss.patch_center.fill_(2)
    t_image, t_patch = views(teacher)
    loss(make_output(), teacher, 0)
    torch.testing.assert_close(loss.center, 0.9 + 0.1 * t_image.mean((0, 1))[None, None])
    rows = torch.cat([t.flatten(0, 1) for t in t_patch])
    torch.testing.assert_close(loss.patch_center, 1.8 + 0.1 * rows.mean(0)[None])


def test_centres_wait_for_the_last_of_several_small_batches():
    parts, loss = [make_output(), make_output()], make_loss()
    first = loss(make_output(), parts[0], 0, last=False)
    assert not loss.center.any() and not loss.patch_center.any() and first.total > 0
    loss(make_output(), parts[1], 0)
    torch.testing.assert_close(loss.center[0, 0], 0.1 * torch.cat([image.dense() for image, _ in parts]).mean(0))


def test_state_holds_the_centres():
    assert {k: tuple(v.shape) for k, v in make_loss().state_dict().items()} == {
        "center": (1, 1, K), "patch_center": (1, KP)}


def test_uniform_student_sits_on_ln_k():
    student = formed(torch.zeros(V * B, K), [torch.zeros(2 * B, 9, KP), torch.zeros(3 * B, 4, KP)])
    out = make_loss()(student, make_output(), 0)
    assert out.image.item() == pytest.approx(math.log(K), rel=1e-6)
    assert out.patch.item() == pytest.approx(math.log(KP), rel=1e-6)


def test_entropies_tell_collapse_and_uniformity():
    one = formed(torch.eye(K)[:1].expand(V * B, K) * 10, [torch.eye(KP)[0].expand(n * B, g, KP) * 10
                                                          for n, g in ((2, 9), (3, 4))])
    out = make_loss()(make_output(), one, 0)
    assert out.image_entropy.item() == pytest.approx(0, abs=1e-6)
    assert out.patch_entropy.item() == pytest.approx(0, abs=1e-6)
    flat = formed(torch.zeros(V * B, K), [torch.zeros(2 * B, 9, KP), torch.zeros(3 * B, 4, KP)])
    out = make_loss()(make_output(), flat, 0)
    assert out.image_entropy.item() == pytest.approx(math.log(K)) and out.patch_entropy.item() == pytest.approx(
        math.log(KP))


def test_weight_0_is_dino_with_the_teachers_two_views():
    student, (t_image, _) = make_output(), make_output()
    loss, full = make_loss(patch_loss_weight=0), make_loss()
    two = t_image._replace(z=t_image.z[:2 * B])
    out = loss((student[0], []), (two, []), 0)
    torch.testing.assert_close(out.total, full(student, (t_image, make_output()[1]), 0).image)
    torch.testing.assert_close(loss.center[0, 0], 0.1 * two.dense().mean(0))
    assert out.patch == 0 and not loss.patch_center.any()


def test_gradients_reach_every_view_of_the_student_and_no_teacher():
    student, teacher = make_output(), make_output()
    for leaf in [*leaves(student), *leaves(teacher)]:
        leaf.requires_grad_()
    make_loss()(student, teacher, 0).total.backward()
    for v, grad in enumerate(student[0].z.grad.unflatten(0, (V, B))):
        assert grad.abs().sum() > 0, v
    assert all(leaf.grad.abs().sum() > 0 for leaf in leaves(student))
    assert all(leaf.grad is None for leaf in leaves(teacher))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_for_the_products_alone(dtype):
    """Losses and gradients come in float32; gradients of a mean are not lost below float16's smallest number."""
    student, teacher, loss = make_output(0.3), make_output(0.3), make_loss()
    for leaf in leaves(student):
        leaf.requires_grad_()
    exact = loss(student, teacher, 0)
    expected = torch.autograd.grad(exact.total, leaves(student))
    loss = make_loss()
    with torch.autocast("cpu", dtype=dtype):
        out = loss(student, teacher, 0)
    ours = torch.autograd.grad(out.total * 1e-6, leaves(student))
    assert out.total.dtype == loss.center.dtype == torch.float32
    torch.testing.assert_close(out.total, exact.total, rtol=0.02, atol=0)
    for a, b in zip(ours, expected, strict=True):
        assert (a * 1e6 - b).norm() < 0.03 * b.norm()


def test_two_views_and_no_local_ones():
    student, teacher, loss = make_output(), make_output(), DINOLoss(K, KP, 2, 0.04, 0.04, 0, 1)
    s, t = (output[0]._replace(z=output[0].z[:2 * B]) for output in (student, teacher))
    out = loss((s, student[1][:1]), (t, teacher[1][:1]), 0)
    s, t = s.dense().unflatten(0, (2, B)), t.dense().unflatten(0, (2, B))
    pairs = [cross_entropy(t[a], 0, s[1 - a], 0.04).mean() for a in (0, 1)]
    torch.testing.assert_close(out.image, sum(pairs) / 2)


@pytest.mark.parametrize("warmup, epochs", [(0, 5), (5, 5), (2, 5)])
def test_temperature_schedule_covers_the_run(warmup, epochs):
    schedule = make_loss(warmup_teacher_temp_epochs=warmup, nepochs=epochs).teacher_temp_schedule
    assert len(schedule) == epochs
    assert schedule[-1] == pytest.approx(0.07) and schedule[0] == pytest.approx(0.04 if warmup else 0.07)
