"""LOST and TokenCut against the reference programs' figures; boxes."""
import numpy as np
import pytest
import torch
from golden_rules import assert_close, load, rand

from selfpatch.evaluation.object_discovery import (
    box_iou,
    box_of,
    components,
    cut_vector,
    is_found,
    lost,
    lost_degrees,
    second_eigenvector,
    tokencut,
)

SIZES = [(14, 14, 224, 224), (20, 27, 311, 427), (30, 23, 480, 360)]


@pytest.fixture(scope="module")
def golden():
    return load("discovery.npz")


def golden_keys(golden, i):
    h, w = SIZES[i][:2]
    seed, salt = 200 + 10 * i, golden["salt"]
    g, o, p = (rand(seed + n, 1, 24, salt=salt) for n in range(3))
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")

    def ellipse(cy, cx, ry, rx):
        inside = ((y - cy * h) / (ry * h)) ** 2 + ((x - cx * w) / (rx * w)) ** 2 < 1
        return inside.float().reshape(-1, 1)

    a, b = ellipse(0.4, 0.35, 0.22, 0.2), ellipse(0.75, 0.8, 0.12, 0.12)
    return (1 - a - b) * g + a * o + b * (0.6 * o + 0.4 * p) + 0.55 * rand(seed + 3, h * w, 24, salt=salt)


@pytest.mark.parametrize("i", range(3))
def test_golden_lost(golden, i):
    keys, (h, w, *size) = golden_keys(golden, i), SIZES[i]
    degrees = lost_degrees(keys @ keys.T)
    assert (degrees - torch.from_numpy(golden[f"lost_degree_{i}"])).abs().sum() <= 2  # products of nearly 0
    mask, seed = lost(keys, (h, w))
    assert degrees[seed] == degrees[int(golden[f"lost_seed_{i}"])]
    if (degrees == degrees.min()).sum() == 1:  # else the reference takes any of them
        assert seed == golden[f"lost_seed_{i}"]
    assert box_of(mask, 16, size) == tuple(golden[f"lost_box_{i}"])


@pytest.mark.parametrize("i", range(3))
def test_golden_tokencut(golden, i):
    keys, (h, w, *size) = golden_keys(golden, i), SIZES[i]
    vector = cut_vector(keys).abs()
    assert_close((vector / vector.max()).reshape(h, w), golden[f"cut_vector_{i}"])
    mask = tokencut(keys, (h, w))
    assert (mask == golden[f"cut_mask_{i}"]).all()
    assert box_of(mask, 16, size) == tuple(golden[f"cut_box_{i}"])


@pytest.mark.parametrize("others", [torch.linspace(-1, 0.99, 199), torch.tensor([0.0] * 197 + [0.3, 0.5]),
                                    torch.cat([torch.linspace(-1, 0.5, 197), torch.tensor([0.8, 0.801])])])
def test_second_eigenvector_is_the_whole_decompositions(others):
    """Also where the second and third eigenvalue nearly agree, and where a few products span everything."""
    q = torch.linalg.qr(torch.randn(200, 200, dtype=torch.float64)).Q
    matrix = q * torch.cat([others, torch.ones(1)]).double() @ q.T
    found = second_eigenvector(matrix, q[:, -1])
    assert abs(found @ q[:, -2]) == pytest.approx(1, abs=1e-9)
    assert torch.equal(found, second_eigenvector(matrix, q[:, -1]))


@pytest.mark.parametrize("side", [2, 4, 10])
def test_patches_that_are_all_alike(side):
    assert tokencut(torch.ones(side**2, 8), (side, side)).any()


def test_components_are_four_connected():
    labels = components(np.array([[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]], bool))
    assert (labels == [[1, 1, 0, 0], [0, 0, 2, 0], [0, 0, 2, 2]]).all()


def test_patches_that_correlate_with_none():
    """Keys at right angles: no patch has an edge but to itself."""
    mask, seed = lost(torch.eye(12), (3, 4))
    assert mask.sum() == 1 and mask.flat[seed]
    assert tokencut(torch.eye(12), (3, 4)).any()


def test_boxes():
    mask = np.zeros((3, 4), bool)
    mask[1, 1:3] = True
    assert box_of(mask, 16, (40, 60)) == (16, 16, 48, 32)
    mask[2, 3] = True
    assert box_of(mask, 16, (40, 60)) == (16, 16, 60, 40)
    assert box_iou((0, 0, 10, 10), [[0, 0, 10, 10], [5, 0, 15, 10], [10, 10, 20, 20], [20, 0, 30, 5]]) == pytest.approx(
        [1, 1 / 3, 0, 0])
    assert is_found((0, 0, 10, 10), [[0, 0, 5, 10]]) and not is_found((0, 0, 10, 10), [[0, 0, 4, 10]])
