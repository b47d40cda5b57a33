"""The device's augmentation against PIL's, operation by operation, its draws against DINO's odds, and a run with it."""
import math
from functools import partial

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageFilter
from torchvision.transforms import RandomResizedCrop

from selfpatch.data import augmentations as ours
from selfpatch.data.augmentations import DeviceAugmentation, Draws, RandomCrops, apply, draw, draw_boxes
from selfpatch.data.normalisation import IMAGENET_MEAN, IMAGENET_STD

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
HAS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def picture(seed: int, width: int = 96, height: int = 96) -> Image.Image:
    """Slopes, texture of several scales and a flat, fully coloured patch with hard edges."""
    rng, total = np.random.default_rng(seed), np.zeros((height, width, 3))
    for scale in (2, 6, 24, 48):
        noise = Image.fromarray(rng.integers(0, 256, (scale, scale, 3), dtype=np.uint8))
        total += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC)) / 4.0
    total = (total - 128) * 1.8 + 128  # as much contrast as photographs have, with some pixels cut off
    total[height // 3:height // 2, width // 4:width // 2] = rng.permutation((0, rng.integers(256), 255))
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    return torch.stack([TF.pil_to_tensor(image) for image in images]).float()


PICTURES = [picture(seed) for seed in range(6)]


def draws_of(count: int, **given) -> Draws:
    """Draws that change nothing, but for those given."""
    nothing = Draws(torch.zeros(count, dtype=torch.bool), torch.full((4, count), -1),
                    torch.tensor([1.0, 1.0, 1.0, 0.0])[:, None].repeat(1, count),
                    torch.zeros(count, dtype=torch.bool), torch.zeros(count), torch.zeros(count, dtype=torch.bool))
    return nothing._replace(**given)


def as_pil_does(image: Image.Image, draws: Draws, i: int) -> Image.Image:
    """What the i-th of the draws makes of the image, by PIL."""
    adjustments = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    image = TF.hflip(image) if draws.flip[i] else image
    for number in draws.order[:, i].tolist():
        image = adjustments[number](image, draws.factors[number, i].item()) if number >= 0 else image
    image = TF.rgb_to_grayscale(image, 3) if draws.grey[i] else image
    image = image.filter(ImageFilter.GaussianBlur(draws.sigma[i].item())) if draws.sigma[i] else image
    return TF.solarize(image, 128) if draws.solarize[i] else image


# ---------------------------------------------------------------- operations


@pytest.mark.parametrize("operation, least, most", [
    ("brightness", 0.6, 1.4), ("contrast", 0.6, 1.4), ("saturation", 0.8, 1.2), ("hue", -0.1, 0.1)])
def test_adjustments_are_pils(operation, least, most):
    function, theirs = getattr(ours, f"adjust_{operation}"), getattr(TF, f"adjust_{operation}")
    before, changed = to_tensor(PICTURES), 0.0
    for factors in (torch.linspace(least, most, 6), torch.linspace(most, least, 6)):
        expected = to_tensor([theirs(image, f) for image, f in zip(PICTURES, factors.tolist(), strict=True)])
        error = (function(before, factors) - expected).abs()
        # a hue that rounds to the byte beside PIL's moves a channel by up to 6/255 of the saturation
        assert error.max() <= (6 if operation == "hue" else 0) and error.mean() < 0.02
        changed += (expected - before).abs().mean()
    assert changed > 2  # the factors do something to these pictures


def test_hue_of_greys_and_of_every_sextant():
    colours = torch.cartesian_prod(*[torch.tensor([0.0, 1, 64, 127, 128, 254, 255])] * 3).T.reshape(1, 3, 7, 49)
    image = Image.fromarray(colours[0].permute(1, 2, 0).to(torch.uint8).numpy())
    for factor in (-0.1, -0.031, 0.0, 0.05, 0.1):
        error = (ours.adjust_hue(colours, torch.tensor([factor])) - to_tensor([TF.adjust_hue(image, factor)])).abs()
        assert error.max() <= 6 and error.mean() < 0.1


def test_grey_and_solarize_are_pils():
    before = to_tensor(PICTURES)
    assert torch.equal(ours.to_grey(before), to_tensor([TF.rgb_to_grayscale(image, 3) for image in PICTURES]))
    assert torch.equal(ours.solarize(before), to_tensor([TF.solarize(image, 128) for image in PICTURES]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_blur_is_pils(dtype):
    """PIL rounds after each of its six passes, this after two: that makes a third of a level on average, 3 at most."""
    before, sigma = to_tensor(PICTURES), torch.tensor([0.1, 0.3, 0.6, 1.1, 1.5, 2.0])
    blurred = ours.gaussian_blur(before, sigma, dtype)
    expected = to_tensor([image.filter(ImageFilter.GaussianBlur(s)) for image, s in
                          zip(PICTURES, sigma.tolist(), strict=True)])
    error = blurred - expected
    assert error.abs().max() <= 3 and error.abs().mean() < 0.4 and error.mean().abs() < 0.1
    assert (expected[-1] - before[-1]).abs().mean() > 3
    assert torch.equal(ours.gaussian_blur(before, torch.zeros(6), dtype), before)


def test_blur_matrices_have_the_spread_of_sigma():
    sigma = torch.linspace(0.1, 2.0, 20)
    matrices = ours.blur_matrices(sigma, 41)
    torch.testing.assert_close(matrices.sum(2), torch.ones(20, 41))
    offsets = torch.arange(41) - 20.0
    torch.testing.assert_close((matrices[:, 20] * offsets ** 2).sum(1).sqrt(), sigma, atol=1e-4, rtol=1e-3)


# ---------------------------------------------------------------- everything together


@pytest.fixture
def drawn():
    """48 crops with draws in which everything occurs."""
    images = [PICTURES[i % 6] for i in range(48)]
    return images, draw(torch.rand(ours.NUMBERS, 48), torch.full((48,), 0.5), torch.full((48,), 0.3))


def test_whole_chain_is_pils(drawn):
    images, draws = drawn
    assert draws.flip.any() and draws.grey.any() and draws.solarize.any() and (draws.sigma > 0).any()
    expected = to_tensor([as_pil_does(image, draws, i) for i, image in enumerate(images)])
    error = (apply(to_tensor(images).to(torch.uint8), draws, select_by_mask=False) - expected).abs()
    assert error.mean() < 0.3
    # without blur all but the rare rounding of the hue is PIL's
    assert (error[draws.sigma == 0] > 2).float().mean() < 0.005


def test_selection_by_mask_equals_indexing(drawn):
    images, draws = drawn
    images = to_tensor(images).to(torch.uint8)
    assert torch.equal(apply(images, draws, select_by_mask=True), apply(images, draws, select_by_mask=False))


def test_batch_is_its_images_one_by_one(drawn):
    images, draws = drawn
    images = to_tensor(images).to(torch.uint8)
    before = images.clone()
    together = apply(images, draws, select_by_mask=False)
    assert torch.equal(images, before)
    for i in range(0, 48, 5):
        alone = apply(images[i:i + 1], Draws(*(values[..., i:i + 1] for values in draws)), select_by_mask=False)
        assert (alone[0] - together[i]).abs().max() <= 1  # matrix products of other sizes may round the other way
        assert draws.sigma[i] or torch.equal(alone[0], together[i])


def test_order_is_each_samples_own():
    """The same four adjustments in all 24 orders give what PIL gives in each, and not all the same."""
    orders = torch.cartesian_prod(*[torch.arange(4)] * 4)
    orders = orders[(orders.sort(1).values == torch.arange(4)).all(1)].T.contiguous()
    assert orders.shape == (4, 24)
    draws = draws_of(24, order=orders, factors=torch.tensor([1.4, 0.6, 1.2, 0.1])[:, None].repeat(1, 24))
    result = apply(to_tensor([PICTURES[0]] * 24).to(torch.uint8), draws, select_by_mask=False)
    expected = to_tensor([as_pil_does(PICTURES[0], draws, i) for i in range(24)])
    assert ((result - expected).abs() > 2).float().mean() < 0.01
    assert len({tuple(image.flatten().tolist()) for image in result}) > 12


# ---------------------------------------------------------------- draws


def test_draws_follow_the_published_odds():
    count = 20000
    draws = draw(torch.rand(ours.NUMBERS, count), torch.full((count,), 0.3), torch.full((count,), 0.2))

    def share(chosen):
        return chosen.float().mean().item()

    def assert_uniform(values, least, most):
        # within 4 standard errors of the deciles' shares
        assert least <= values.min() and values.max() <= most
        deciles = torch.histc(values, 10, least, most) / len(values)
        assert (deciles - 0.1).abs().max() < 4 * math.sqrt(0.09 / len(values))

    for chosen, odds in ((draws.flip, 0.5), (draws.order[0] >= 0, 0.8), (draws.grey, 0.2), (draws.sigma > 0, 0.3),
                         (draws.solarize, 0.2)):
        assert share(chosen) == pytest.approx(odds, abs=4 * math.sqrt(odds * (1 - odds) / count))
    for factors, (least, most) in zip(draws.factors, ((0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)), strict=True):
        assert_uniform(factors, least - 1e-6, most + 1e-6)
    assert_uniform(draws.sigma[draws.sigma > 0], 0.1, 2.0)
    # all 24 orders, alike
    jittered = draws.order[:, draws.order[0] >= 0]
    assert torch.equal(jittered.sort(0).values, torch.arange(4)[:, None].expand_as(jittered))
    counts = (jittered * torch.tensor([64, 16, 4, 1])[:, None]).sum(0).unique(return_counts=True)[1]
    assert len(counts) == 24 and (counts / jittered.shape[1] * 24 - 1).abs().max() < 4 * math.sqrt(23 / 16000)
    # and nothing hangs on anything else
    numbers = torch.stack([values.float() for values in (draws.flip, draws.order[0] >= 0, *draws.factors, draws.grey,
                                                         draws.sigma > 0, draws.solarize)])
    assert (numbers.corrcoef() - torch.eye(len(numbers))).abs().max() < 5 / math.sqrt(count)


def test_odds_of_each_view(monkeypatch):
    """Blur 1, 0.1, 0.5 and solarisation 0, 0.2, 0 for the first and the second global and the local crops."""
    seen = []
    monkeypatch.setattr(ours, "draw", lambda *given: seen.extend(given) or draw(*given))
    numbers = torch.rand(2, 5, ours.NUMBERS)
    views = DeviceAugmentation(3)([torch.zeros(2, 2, 3, 8, 8, dtype=torch.uint8),
                                   torch.zeros(2, 3, 3, 4, 4, dtype=torch.uint8), numbers])
    assert [view.shape for view in views] == [(2, 3, 8, 8)] * 2 + [(2, 3, 4, 4)] * 3
    given, blur, solarize = seen
    torch.testing.assert_close(blur, torch.tensor([1.0, 1.0, 0.1, 0.1] + [0.5] * 6))
    torch.testing.assert_close(solarize, torch.tensor([0.0, 0.0, 0.2, 0.2] + [0.0] * 6))
    assert all(torch.equal(given[:, 2 * v + b], numbers[b, v]) for v in range(5) for b in range(2))


def test_views_are_normalised_and_in_order(monkeypatch):
    """Without any draw, view v of image b is crop v of image b, normalised as ever."""
    monkeypatch.setattr(ours, "draw", lambda _, blur, __: draws_of(len(blur)))
    kinds = [torch.randint(0, 256, (3, 2, 3, 8, 8), dtype=torch.uint8),
             torch.randint(0, 256, (3, 4, 3, 6, 6), dtype=torch.uint8)]
    views = DeviceAugmentation(4)([*kinds, torch.rand(3, 6, ours.NUMBERS)])
    expected = [TF.normalize(crops[:, i] / 255, IMAGENET_MEAN, IMAGENET_STD) for crops in kinds
                for i in range(crops.shape[1])]
    assert len(views) == 6
    for view, other in zip(views, expected, strict=True):
        assert view.is_contiguous()
        torch.testing.assert_close(view, other)


def test_the_numbers_alone_decide():
    """Each crop's own; torch's random state does not matter."""
    crops, numbers = torch.randint(0, 256, (2, 2, 3, 8, 8), dtype=torch.uint8), torch.rand(2, 2, ours.NUMBERS)
    other = numbers.clone()
    other[1] = torch.rand(2, ours.NUMBERS)
    first, again, changed = (torch.stack(DeviceAugmentation(0)([crops, n])) for n in (numbers, numbers, other))
    assert torch.equal(first, again) and torch.equal(first[:, 0], changed[:, 0])
    assert not torch.equal(first[:, 1], changed[:, 1])


def test_compiles_as_one_graph(monkeypatch):
    """No part of it hangs on what was drawn, which a GPU would have to be asked for."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    batch = [torch.randint(0, 256, (4, 2, 3, 16, 16), dtype=torch.uint8), torch.rand(4, 2, ours.NUMBERS)]
    plain, fused = DeviceAugmentation(0), DeviceAugmentation(0)
    fused.fuse()
    assert torch.equal(torch.stack(plain(batch)), torch.stack(fused(batch)))


# ---------------------------------------------------------------- in the workers


def test_crops_sizes_and_pixels(monkeypatch):
    image, boxes = picture(1, 90, 70), [(3, 5, 40, 50), (0, 0, 70, 90), (10, 20, 20, 21)]
    monkeypatch.setattr(ours, "draw_boxes", lambda count, *_: (boxes * 3)[:count])
    *crops, numbers = RandomCrops((0.25, 1.0), (0.05, 0.25), 3, 64, 32)(TF.pil_to_tensor(image))
    assert numbers.shape == (5, ours.NUMBERS) and 0 <= numbers.min() < numbers.max() < 1
    assert [(tuple(kind.shape), kind.dtype) for kind in crops] == [((2, 3, 64, 64), torch.uint8),
                                                                   ((3, 3, 32, 32), torch.uint8)]
    for kind, size in zip(crops, (64, 32), strict=True):
        for crop, box in zip(kind, boxes, strict=False):
            expected = TF.resized_crop(image, *box, [size, size], TF.InterpolationMode.BICUBIC)
            error = (crop.float() - to_tensor([expected])[0]).abs()
            assert error.max() <= 2 and error.mean() < 0.02  # the two round their weights differently
    for count, expected in ((0, [(2, 3, 224, 224)]), (8, [(2, 3, 224, 224), (8, 3, 96, 96)])):
        crops = RandomCrops((0.25, 1.0), (0.05, 0.25), count)(TF.pil_to_tensor(image))
        assert [tuple(kind.shape) for kind in crops] == [*expected, (2 + count, ours.NUMBERS)]


@pytest.mark.parametrize("height, width, scale", [(375, 500, (0.25, 1.0)), (160, 160, (0.05, 0.25)),
                                                  (120, 300, (0.25, 1.0))])
def test_boxes_are_drawn_as_by_torchvision(height, width, scale):
    """Means and spreads of area, ratio and place, within 5 standard errors; in the last image many tries fail."""
    image, count = torch.empty(3, height, width), 4000

    def figures(boxes):
        top, left, h, w = np.array(boxes, dtype=float).T
        assert (top >= 0).all() and (left >= 0).all() and (top + h <= height).all() and (left + w <= width).all()
        return np.stack([h * w / (height * width), np.log(w / h), top / height, left / width, top / (height - h + 1),
                         (left + w / 2) / width])

    mine = figures(draw_boxes(count, height, width, scale))
    theirs = figures([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(count)])
    error = np.sqrt((mine.var(1) + theirs.var(1)) / count)
    assert (np.abs(mine.mean(1) - theirs.mean(1)) <= 5 * error + 1e-9).all()
    np.testing.assert_allclose(mine.std(1), theirs.std(1), rtol=0.1, atol=1e-9)


@pytest.mark.parametrize("height, width, box", [(100, 1000, (0, 433, 100, 133)), (1000, 100, (433, 0, 133, 100))])
def test_box_in_the_middle_where_none_fits(height, width, box):
    assert draw_boxes(3, height, width, (1.0, 1.0)) == [box] * 3
    assert RandomResizedCrop.get_params(torch.empty(3, height, width), [1.0, 1.0], [3 / 4, 4 / 3]) == box


@HAS_GPU
def test_gpu_waits_for_nothing_and_gives_the_cpus_crops(drawn):
    images, draws = drawn
    images = to_tensor(images).to(torch.uint8)
    there = Draws(*(values.cuda() for values in draws))
    error = (apply(images.cuda(), there, select_by_mask=True).cpu() - apply(images, draws, select_by_mask=False)).abs()
    assert (error > 2).float().mean() < 0.005
    crops, numbers = images.unflatten(0, (24, 2)).cuda(), torch.rand(24, 4, ours.NUMBERS).cuda()
    augment = DeviceAugmentation(2).cuda()
    augment([crops, crops, numbers])
    torch.cuda.set_sync_debug_mode("error")
    try:
        augment([crops, crops, numbers])
    finally:
        torch.cuda.set_sync_debug_mode("default")
