"""Crops: order, sizes, odds and ranges of every transform, and images of every kind."""
import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision import transforms

from selfpatch.data.augmentations import DataAugmentationDINO, GaussianBlur


def picture(width=80, height=60):
    ramp = np.linspace(0, 255, width * height * 3).reshape(height, width, 3).astype(np.uint8)
    return Image.fromarray(ramp)


def test_crops_in_order_and_normalised():
    augment = DataAugmentationDINO((0.25, 1.0), (0.05, 0.25), 3, 64, 32)
    crops = augment(picture())
    assert [tuple(c.shape) for c in crops] == [(3, 64, 64)] * 2 + [(3, 32, 32)] * 3
    assert all(c.dtype == torch.float32 and -2.2 < c.min() < c.max() < 2.7 for c in crops)
    black = torch.tensor([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225])[:, None, None]
    for crop in augment(Image.new("RGB", (50, 50))):  # black stays black under every transform
        torch.testing.assert_close(crop, black.expand_as(crop), atol=1e-5, rtol=0)


def test_default_sizes():
    crops = DataAugmentationDINO((0.25, 1.0), (0.05, 0.25), 8)(picture())
    assert [c.shape[-1] for c in crops] == [224] * 2 + [96] * 8


@pytest.mark.parametrize("name, blur, solarize", [("global_transfo1", 1.0, None), ("global_transfo2", 0.1, 0.2),
                                                  ("local_transfo", 0.5, None)])
def test_pipelines_hold_the_published_figures(name, blur, solarize):
    augment = DataAugmentationDINO((0.25, 1.0), (0.05, 0.25), 8)
    steps = {type(t).__name__: t for t in getattr(augment, name).transforms}
    crop = steps["RandomResizedCrop"]
    local = name == "local_transfo"
    assert crop.size == ((96, 96) if local else (224, 224))
    assert crop.scale == ((0.05, 0.25) if local else (0.25, 1.0)) and crop.ratio == pytest.approx((3 / 4, 4 / 3))
    assert crop.interpolation == transforms.InterpolationMode.BICUBIC
    assert steps["RandomHorizontalFlip"].p == 0.5 and steps["RandomGrayscale"].p == 0.2
    jitter = steps["RandomApply"].transforms[0]
    assert steps["RandomApply"].p == 0.8
    assert (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) == (
        (0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1))
    assert steps["GaussianBlur"].p == blur
    assert ("RandomSolarize" in steps) == (solarize is not None)
    if solarize:
        assert (steps["RandomSolarize"].threshold, steps["RandomSolarize"].p) == (128, solarize)
    assert list(steps)[-2:] == ["ToTensor", "Normalize"]
    assert (steps["Normalize"].mean, steps["Normalize"].std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_blur_odds_and_radii(monkeypatch):
    radii = []
    monkeypatch.setattr(ImageFilter, "GaussianBlur", lambda radius: radii.append(radius) or ImageFilter.BoxBlur(0))
    blur = GaussianBlur(0.3)
    image = picture(4, 4)
    for _ in range(3000):
        blur(image)
    assert len(radii) / 3000 == pytest.approx(0.3, abs=0.03)
    assert min(radii) >= 0.1 and max(radii) <= 2.0 and np.mean(radii) == pytest.approx(1.05, abs=0.06)


def test_one_seed_gives_the_same_crops():
    augment = DataAugmentationDINO((0.25, 1.0), (0.05, 0.25), 2, 32, 16)
    draws = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        draws.append(augment(picture()))
    assert all(torch.equal(a, b) for a, b in zip(draws[0], draws[1], strict=True))
    assert not torch.equal(draws[0][0], draws[2][0])
