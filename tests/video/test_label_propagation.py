"""Label propagation: the published figures, the formula patch by patch, and bounds that change nothing."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_rules import assert_close, load, rand
from PIL import Image

from selfpatch.video import label_propagation, propagation_bounds
from selfpatch.video.label_propagation import norm_mask, plain_label_propagation, restrict_neighborhood, to_mask
from selfpatch.video.propagation_bounds import propagate


@pytest.mark.parametrize("key, radius, topk", [
    ("seg_tar", 2, 5), ("seg_tar_no_mask", 0, 5), ("seg_tar_top1", 2, 1), ("seg_tar_ties", 2, 5)])
@pytest.mark.parametrize("form", ["plain", "one row per tile", "one tile"])
def test_golden_label_propagation(key, radius, topk, form, monkeypatch):
    monkeypatch.setitem(label_propagation.MAX_SIMILARITIES, "cpu", 1 if "row" in form else 2**20)
    golden = load("label_propagation.npz")
    salt = golden["salt"]
    target, contexts = rand(50, 1, 35, 32, salt=salt), [rand(51 + i, 32, 35, salt=salt) for i in range(3)]
    if key == "seg_tar_ties":
        target = rand(80, 1, 35, 4, salt=salt).sign()
        contexts = [rand(81 + i, 4, 35, salt=salt).sign() for i in range(3)]
    labels = [torch.softmax(3 * rand(60 + i, 1, 3, 5, 7, salt=salt), dim=1) for i in range(3)]
    target = F.normalize(target[0], dim=1).view(5, 7, -1)
    contexts = F.normalize(torch.stack(contexts), dim=1).transpose(1, 2).unflatten(1, (5, 7))
    function = plain_label_propagation if form == "plain" else label_propagation.label_propagation
    mixed = function(target, contexts, torch.cat(labels).permute(0, 2, 3, 1), radius, topk)
    assert_close(mixed.permute(2, 0, 1)[None], golden[key])


def test_golden_window_and_norm_mask():
    golden = load("label_propagation.npz")
    assert np.array_equal(restrict_neighborhood(5, 7, 2).numpy(), golden["mask_5x7_r2"])
    assert_close(norm_mask(torch.from_numpy(golden["norm_mask_in"])), golden["norm_mask"])


def propagation_by_loops(features, labels, n_last, radius, topk):
    """Features [T, h, w, D], labels [C, h, w] -> [T - 1, C, h, w], patch by patch."""
    frames, height, width, _ = features.shape
    propagated = [labels]
    for t in range(1, frames):
        contexts, result = [0, *range(max(1, t - n_last), t)], torch.zeros_like(labels)
        for y in range(height):
            for x in range(width):
                near = [(c, v, u) for c in contexts for v in range(height) for u in range(width)
                        if not radius or max(abs(v - y), abs(u - x)) <= radius]
                weights = torch.stack([torch.exp(features[t, y, x] @ features[place] / 0.1) for place in near])
                kept = weights >= weights.topk(min(topk, len(near))).values[-1]
                weights = weights * kept
                mixed = sum(w * propagated[c][:, v, u] for w, (c, v, u) in zip(weights, near, strict=True))
                result[:, y, x] = mixed / weights.sum()
        propagated.append(result)
    return torch.stack(propagated[1:])


@pytest.mark.parametrize("shape, n_last, radius, topk", [
    ((4, 6), 2, 1, 5), ((6, 4), 2, 1, 5), ((3, 5), 0, 2, 3), ((5, 3), 7, 0, 5), ((3, 3), 1, 1, 60)])
@pytest.mark.parametrize("similarities", [1, 2**20])  # one row per tile, and one tile
@pytest.mark.parametrize("lookups", [0, 2**20])  # without bounds, and with bounds however loose they are
def test_propagation_equals_the_plain_formula(shape, n_last, radius, topk, similarities, lookups, monkeypatch):
    monkeypatch.setitem(label_propagation.MAX_SIMILARITIES, "cpu", similarities)
    monkeypatch.setattr(propagation_bounds, "MAX_LOOKUPS", lookups)
    torch.manual_seed(0)
    features = F.normalize(torch.randn(5, *shape, 8), dim=-1)
    features[3] = features[2]  # a repeated frame: every similarity occurs twice, and the k-th is tied
    labels = F.one_hot(torch.randint(0, 3, shape)).permute(2, 0, 1).float()
    ours = list(propagate(features, labels, n_last, radius, topk))
    torch.testing.assert_close(torch.stack(ours), propagation_by_loops(features, labels, n_last, radius, topk))


def smooth_video(frames=6, height=20, width=30, dim=64):
    """Features [T, h, w, D] like a backbone's, most of them in few directions, and first labels [2, h, w]."""
    torch.manual_seed(0)
    features = torch.randn(frames, 6, 5, 8) * 0.2 + torch.randn(1, 6, 5, 8)
    features = F.interpolate(features.permute(0, 3, 1, 2), (height, width), mode="bilinear").permute(0, 2, 3, 1)
    features = F.normalize(features @ torch.randn(8, dim) + 0.1 * torch.randn(frames, height, width, dim), dim=-1)
    return features, torch.stack([torch.ones(height, width).tril(), torch.ones(height, width).triu(1)])


def test_bounds_are_bounds():
    features = smooth_video()[0]
    sketches = propagation_bounds.sketch(features, propagation_bounds.leading_axes(features[0]))
    assert sketches.shape[-1] == 64 // 4 + 1
    a, b = features.flatten(0, 2)[::7], sketches.flatten(0, 2)[::7]
    slack = b @ b.T - a @ a.T
    assert slack.min() > 0 and slack.median() < 0.3


@pytest.fixture
def searches(monkeypatch):
    """The number of contexts of each frame for which all patches were compared."""
    counts, search = [], label_propagation.label_propagation

    def counted(target, contexts, *args):
        counts.append(len(contexts))
        return search(target, contexts, *args)

    monkeypatch.setattr(propagation_bounds, "label_propagation", counted)
    return counts


def test_bounds_leave_few_patches_to_look_up(searches, monkeypatch):
    features, labels = smooth_video()
    ours = torch.stack(list(propagate(features, labels, 3, 6)))
    assert searches == [1, 2, 3]  # all patches only until every context is there
    monkeypatch.setattr(propagation_bounds, "MAX_LOOKUPS", 0)
    torch.testing.assert_close(ours, torch.stack(list(propagate(features, labels, 3, 6))))


def test_loose_bounds_are_abandoned(searches, monkeypatch):
    tried, lookups = [], propagation_bounds.find_lookups
    monkeypatch.setattr(propagation_bounds, "find_lookups", lambda *args: tried.append(1) or lookups(*args))
    features, labels = smooth_video()
    list(propagate(F.normalize(torch.randn_like(features), dim=-1), labels, 2, 6))
    assert searches == [1, 2, 3, 3, 3] and len(tried) == 1


def test_bounds_are_for_float32(searches):
    features, labels = smooth_video()
    list(propagate(features.double(), labels.double(), 1, 6))
    assert len(searches) == 5


@pytest.mark.parametrize("frame", [0, 1])
@pytest.mark.parametrize("lookups", [0, 2**20])
def test_nan_features_give_nan_labels_without_an_error(frame, lookups, monkeypatch):
    monkeypatch.setattr(propagation_bounds, "MAX_LOOKUPS", lookups)
    features, labels = smooth_video()
    features[frame, 0, 0] = torch.nan
    first, second = list(propagate(features[:3], labels, 0, 6))
    assert first[:, 0, 0].isnan().all() and second.isfinite().all() == (frame == 1)


def test_masks_use_pixel_centres_and_survive_constant_channels():
    labels = torch.zeros(3, 30, 52)
    labels[2] = 1  # an object that fills the frame: its channel is constant, the others have nothing positive
    assert (to_mask(labels, 16, 480, 854) == 2).all()
    labels = torch.softmax(5 * torch.randn(4, 30, 52, generator=torch.Generator().manual_seed(0)), dim=0)
    small = to_mask(labels, 16, 480, 832).numpy()
    resized = np.array(Image.fromarray(small).resize((854, 480), Image.Resampling.NEAREST))
    assert np.array_equal(to_mask(labels, 16, 480, 854).numpy(), resized)


def test_norm_mask_of_channels_without_range():
    mask = torch.stack([torch.full((2, 2), 0.3), torch.zeros(2, 2), -torch.ones(2, 2), torch.tensor([[1., 2], [3, 5]])])
    expected = torch.cat([mask[:3], torch.tensor([[[0, 0.25], [0.5, 1]]])])
    torch.testing.assert_close(norm_mask(mask), expected)


@pytest.mark.parametrize("shape, radius, topk", [((4, 6), 1, 5), ((6, 4), 0, 3), ((3, 5), 2, 1)])
@pytest.mark.parametrize("similarities", [1, 500, 2**20])
def test_tiles_give_what_the_plain_form_gives(shape, radius, topk, similarities, monkeypatch):
    monkeypatch.setitem(label_propagation.MAX_SIMILARITIES, "cpu", similarities)
    contexts = F.normalize(torch.randn(3, *shape, 8), dim=-1)
    contexts[2] = contexts[1]  # ties
    labels, target = torch.rand(3, *shape, 2), F.normalize(torch.randn(*shape, 8), dim=-1)
    ours = label_propagation.label_propagation(target, contexts, labels, radius, topk)
    torch.testing.assert_close(ours, plain_label_propagation(target, contexts, labels, radius, topk))
