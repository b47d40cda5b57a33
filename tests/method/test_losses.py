"""Both forms of the loss against the definition, written out view by view, and at its extremes."""
import math

import pytest
import torch

from selfpatch.method import fused_loss
from selfpatch.method.fused_loss import FusedDINOLoss
from selfpatch.method.losses import DINOLoss
from selfpatch.method.vision_transformer import CropLogits, Logits

B, V, K, KP = 3, 5, 11, 7


@pytest.fixture(params=["plain", "fused, one chunk", "fused, several chunks"])
def make_loss(request, monkeypatch):
    """A loss of each form; with several chunks, the last one is smaller."""
    monkeypatch.setitem(fused_loss.MAX_CHUNK_LOGITS, "cpu", 50 if "several" in request.param else 10**6)
    loss_class = DINOLoss if request.param == "plain" else FusedDINOLoss

    def make(ncrops=V, **kwargs):
        options = {"warmup_teacher_temp": 0.04, "teacher_temp": 0.07, "warmup_teacher_temp_epochs": 3, "nepochs": 10}
        return loss_class(K, KP, ncrops, **options | kwargs)
    return make


def test_a_variant_that_moves_its_centres_itself_is_called_once_the_backward_pass_is_over():
    class Own(DINOLoss):
        def update_centers(self, batch_means):
            self.seen = batch_means

    loss, means = Own(K, KP, V), [[torch.ones(1, 1, K), torch.ones(1, KP)]]
    move = loss.start_update(means)
    assert not hasattr(loss, "seen")
    move()
    assert loss.seen is means and not loss.center.any()


def test_the_fused_form_refuses_methods_that_it_does_not_use():
    with pytest.raises(TypeError, match="Variant.teacher_probs would have no effect"):
        type("Variant", (FusedDINOLoss,), {"teacher_probs": lambda *_: None})


def make_output(scale=1.0):
    """Image logits [V·B, K], patch logits of 2 global and 3 local views."""
    image, patch = torch.randn(K, 6) * scale, torch.randn(KP, 6) * scale
    return CropLogits(Logits(torch.randn(V * B, 6), image),
                      [Logits(torch.randn(n * B, g, 6), patch) for n, g in ((2, 9), (3, 4))])


def from_dense(image, patches):
    """Dense logits as their product with the identity."""
    return CropLogits(Logits(image, torch.eye(K)), [Logits(p, torch.eye(KP)) for p in patches])


def leaves(output):
    image, patches = output
    return [image.z, image.prototypes, *(p.z for p in patches), patches[0].prototypes]


def views(output):
    image, (large, small) = output.image.dense(), [p.dense() for p in output.patches]
    return image.unflatten(0, (V, B)), [*large.unflatten(0, (2, B)), *small.unflatten(0, (3, B))]


def cross_entropy(teacher, center, student, temp):
    """H(softmax((t − center)/temp), softmax(s/0.1)) of each row."""
    return -(((teacher - center) / temp).softmax(-1) * (student / 0.1).log_softmax(-1)).sum(-1)


@pytest.mark.parametrize("epoch, temp", [(0, 0.04), (1, 0.055), (2, 0.07), (9, 0.07)])
def test_definition(make_loss, epoch, temp):
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


def test_gradients_are_the_definitions(make_loss):
    student, teacher, loss = make_output(), make_output(), make_loss()
    loss.center.normal_()
    for leaf in leaves(student):
        leaf.requires_grad_()
    expected = torch.autograd.grad(definition(views(student), views(teacher), loss, 0.04)[0] * 3, leaves(student))
    ours = torch.autograd.grad(loss(student, teacher, 0).total * 3, leaves(student))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_centres_move_by_the_mean_over_all_views_and_patches(make_loss):
    teacher, loss = make_output(), make_loss()
    loss.center.fill_(1)
    loss.patch_center.fill_(2)
    t_image, t_patch = views(teacher)
    loss.update_centers([loss.batch_means(teacher)])
    torch.testing.assert_close(loss.center, 0.9 + 0.1 * t_image.mean((0, 1))[None, None])
    rows = torch.cat([t.flatten(0, 1) for t in t_patch])
    torch.testing.assert_close(loss.patch_center, 1.8 + 0.1 * rows.mean(0)[None])


def test_centres_move_once_for_several_small_batches(make_loss):
    parts, loss = [make_output(), make_output()], make_loss()
    loss(make_output(), parts[0], 0)
    assert not loss.center.any() and not loss.patch_center.any()  # until update_centers
    loss.update_centers([loss.batch_means(part) for part in parts])
    torch.testing.assert_close(loss.center[0, 0], 0.1 * torch.cat([image.dense() for image, _ in parts]).mean(0))


def test_state_holds_the_centres(make_loss):
    assert {k: tuple(v.shape) for k, v in make_loss().state_dict().items()} == {
        "center": (1, 1, K), "patch_center": (1, KP)}


def test_uniform_student_is_at_ln_k(make_loss):
    student = from_dense(torch.zeros(V * B, K), [torch.zeros(2 * B, 9, KP), torch.zeros(3 * B, 4, KP)])
    out = make_loss()(student, make_output(), 0)
    assert out.image.item() == pytest.approx(math.log(K), rel=1e-6)
    assert out.patch.item() == pytest.approx(math.log(KP), rel=1e-6)


def test_entropies_show_collapse_and_uniformity(make_loss):
    one = from_dense(torch.eye(K)[:1].expand(V * B, K) * 10, [torch.eye(KP)[0].expand(n * B, g, KP) * 10
                                                              for n, g in ((2, 9), (3, 4))])
    out = make_loss()(make_output(), one, 0)
    assert out.image_entropy.item() == pytest.approx(0, abs=1e-6)
    assert out.patch_entropy.item() == pytest.approx(0, abs=1e-6)
    flat = from_dense(torch.zeros(V * B, K), [torch.zeros(2 * B, 9, KP), torch.zeros(3 * B, 4, KP)])
    out = make_loss()(make_output(), flat, 0)
    assert out.image_entropy.item() == pytest.approx(math.log(K)) and out.patch_entropy.item() == pytest.approx(
        math.log(KP))


def test_weight_0_is_dino_with_the_teachers_two_views(make_loss):
    student, (t_image, _) = make_output(), make_output()
    loss, full = make_loss(patch_loss_weight=0), make_loss()
    two = t_image._replace(z=t_image.z[:2 * B])
    out = loss(CropLogits(student.image, []), CropLogits(two, []), 0)
    loss.update_centers([loss.batch_means(CropLogits(two, []))])
    torch.testing.assert_close(out.total, full(student, CropLogits(t_image, make_output().patches), 0).image)
    torch.testing.assert_close(loss.center[0, 0], 0.1 * two.dense().mean(0))
    assert out.patch == 0 and not loss.patch_center.any()


def test_gradients_reach_every_view_of_the_student(make_loss):
    student = make_output()
    for leaf in leaves(student):
        leaf.requires_grad_()
    make_loss()(student, make_output(), 0).total.backward()
    for v, grad in enumerate(student.image.z.grad.unflatten(0, (V, B))):
        assert grad.abs().sum() > 0, v
    assert all(leaf.grad.abs().sum() > 0 for leaf in leaves(student))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_for_the_products_alone(make_loss, dtype):
    """Losses and gradients come in float32; gradients of a mean are not lost below float16's smallest number."""
    student, teacher, loss = make_output(0.3), make_output(0.3), make_loss()
    for leaf in leaves(student):
        leaf.requires_grad_()
    exact = loss(student, teacher, 0)
    expected = torch.autograd.grad(exact.total, leaves(student))
    loss = make_loss()
    with torch.autocast("cpu", dtype=dtype):
        out = loss(student, teacher, 0)
    loss.update_centers([loss.batch_means(teacher)])
    fused = isinstance(loss, FusedDINOLoss)
    scale = 1e-6 if fused else 1  # the plain form's dense gradients are in half precision, and need a GradScaler
    ours = torch.autograd.grad(out.total * scale, leaves(student))
    assert out.total.dtype == loss.center.dtype == torch.float32
    torch.testing.assert_close(out.total, exact.total, rtol=0.02, atol=0)
    for a, b in zip(ours, expected, strict=True):
        assert (a / scale - b).norm() < 0.03 * b.norm()


def test_two_views_and_no_local_ones(make_loss):
    student, teacher, loss = make_output(), make_output(), make_loss(ncrops=2)
    s, t = (output.image._replace(z=output.image.z[:2 * B]) for output in (student, teacher))
    out = loss(CropLogits(s, student.patches[:1]), CropLogits(t, teacher.patches[:1]), 0)
    s, t = s.dense().unflatten(0, (2, B)), t.dense().unflatten(0, (2, B))
    pairs = [cross_entropy(t[a], 0, s[1 - a], 0.04).mean() for a in (0, 1)]
    torch.testing.assert_close(out.image, sum(pairs) / 2)


@pytest.mark.parametrize("warmup, epochs", [(0, 5), (5, 5), (2, 5)])
def test_temperature_rises_in_the_warmup_and_stays(warmup, epochs):
    temp = DINOLoss(K, KP, V, 0.04, 0.07, warmup, epochs).teacher_temp
    assert temp(0) == pytest.approx(0.04 if warmup else 0.07)
    assert temp(max(warmup - 1, 0)) == temp(warmup) == temp(epochs - 1) == pytest.approx(0.07)
