"""Linear segmentation: the head, the loss, the windows, the crops, and the job on images that colours tell apart."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dense_data import UNTRAINED, make_folders
from evaluation_jobs import run_job, run_two
from PIL import Image

import eval_linear_segmentation as job
from selfpatch.evaluation.linear_segmentation import (
    LinearHead,
    build_linear_head,
    full_size_prediction,
    kept_channels,
    segmentation_loss,
    sliding_logits,
    window_starts,
)
from selfpatch.evaluation.segmentation import IGNORE


def test_head_normalises_and_maps():
    head = LinearHead(8, 3)
    assert head.linear.weight.std() < 0.02 and not head.linear.bias.any()
    x = 5 + 3 * torch.randn(2, 50, 8)
    rows = x.flatten(0, 1)
    expected = F.linear((rows - rows.mean(0)) / (rows.var(0, unbiased=False) + 1e-5).sqrt(), head.linear.weight)
    torch.testing.assert_close(head(x).flatten(0, 1), expected, rtol=1e-4, atol=1e-5)
    kept = torch.tensor([[True] * 8, [False] * 8])
    torch.testing.assert_close(head(x, kept)[0], head(x)[0] / 0.9)
    assert not head(x, kept)[1].any()


def test_dropout_is_the_same_for_the_same_step():
    head = build_linear_head(400, 3, torch.device("cpu"))
    assert torch.equal(head.linear.weight, build_linear_head(400, 3, torch.device("cpu")).linear.weight)
    kept = kept_channels(head, 50, 1)
    assert torch.equal(kept, kept_channels(head, 50, 1)) and not torch.equal(kept, kept_channels(head, 50, 2))
    assert kept.float().mean() == pytest.approx(0.9, abs=0.01)


def test_loss_is_the_mean_over_pixels_that_count():
    logits, ids = torch.randn(2, 6, 4), torch.randint(0, 4, (2, 16, 24))
    ids[0, :8] = IGNORE
    loss = segmentation_loss(logits, ids, (2, 3))
    maps = F.interpolate(logits.transpose(1, 2).reshape(2, 4, 2, 3), (16, 24), mode="bilinear")
    counted = ids != IGNORE
    expected = F.cross_entropy(maps.permute(0, 2, 3, 1)[counted], ids[counted])
    torch.testing.assert_close(loss, expected)
    assert segmentation_loss(logits, torch.full_like(ids, IGNORE), (2, 3)) == 0


def test_windows_cover_every_pixel():
    assert window_starts(512, 512, 341) == [0] and window_starts(400, 512, 341) == [0]
    assert window_starts(513, 512, 341) == [0, 1]
    assert window_starts(853, 512, 341) == [0, 341] and window_starts(854, 512, 341) == [0, 341, 342]
    for length in range(512, 2000, 7):
        starts = window_starts(length, 512, 341)
        assert starts[-1] + 512 == length and all(b - a <= 341 for a, b in zip(starts, starts[1:], strict=False))


def test_sliding_logits_are_the_mean_of_windows():
    image = torch.rand(3, 8, 14)

    left_half = (torch.arange(8) < 4).float().expand(1, 1, 8, 8)  # logits of a window, in its left half 1
    logits = sliding_logits(image, lambda part: left_half, 1, 8, 6)
    assert logits.shape == (1, 8, 14)
    assert logits[0, 0, 0] == 1 and logits[0, 0, 13] == 0 and logits[0, 0, 6] == pytest.approx(0.5)
    constant = sliding_logits(image, lambda part: torch.full((1, 2, 2, 2), 3.0), 2, 8, 5)
    torch.testing.assert_close(constant, torch.full((2, 8, 14), 3.0))
    assert full_size_prediction(torch.eye(2)[:, None, :], (6, 10)).tolist() == [[0] * 5 + [1] * 5] * 6


def test_crops_keep_image_and_mask_together():
    ids = (np.arange(64)[:, None] // 16 * 4 + np.arange(96)[None] // 24).astype(np.uint8)
    image = Image.fromarray(np.repeat(ids[..., None] * 16, 3, 2))
    flips, padded = [], 0
    for seed in range(12):
        pixels, mask = job.random_crop(image, ids, 512, np.random.default_rng(seed))
        assert pixels.shape == (3, 512, 512) and mask.shape == (512, 512)
        counted = mask != IGNORE
        padded += int((~counted).any())
        assert ((pixels[1].float() / 16 - mask).abs()[counted] < 0.6).float().mean() > 0.9
        row = mask[0][mask[0] != IGNORE].int()
        flips.append(bool(row[0] > row[-1]))
    assert 0 < sum(flips) < 12 and 0 < padded < 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("pairs"), 2)


def options(folders, output, *more):
    return ("--data", f"folders:{folders}", "--num_classes", 3, *UNTRAINED, "--batch_size", 4, "--lr", 0.02,
            "--output", output, *more)


def test_job_learns_colours(folders, tmp_path, small_network, capsys):
    output = tmp_path / "out.json"
    assert run_job(job, *options(folders, output, "--iterations", 25)) == 0
    assert "linear segmentation, images" in capsys.readouterr().out
    (network,) = json.loads(output.read_text())["networks"]
    assert network["figures"]["mean IoU, all classes"] > 0.6  # class 0 alone: under 0.3


def test_keys(folders, tmp_path, small_network):
    output = tmp_path / "out.json"
    assert run_job(job, *options(folders, output, "--iterations", 25, "--feature", "keys")) == 0
    (network,) = json.loads(output.read_text())["networks"]
    assert network["figures"]["mean IoU, all classes"] > 0.6


def test_workers_change_nothing(folders, tmp_path, small_network):
    found = []
    for workers in (0, 2):
        output = tmp_path / f"{workers}.json"
        assert run_job(job, *options(folders, output, "--iterations", 3, "--num_workers", workers)) == 0
        found.append(json.loads(output.read_text())["networks"])
    assert found[0] == found[1]


@pytest.mark.parametrize("more, says", [(["--iterations", 0], "--iterations: it is 0, and must be at least 1"),
                                        (["--lr", 0], "--lr: it is 0.0, and must be above 0"),
                                        (["--weight_decay", "nan"], "--weight_decay: it is nan, and must be at"),
                                        (["--iterations", 5, "--warmup", 6], "--warmup 6 is more than --iterations 5"),
                                        (["--batch_size", 1], "--batch_size: it is 1, and must be at least 2")])
def test_refusals(folders, tmp_path, capsys, more, says):
    assert run_job(job, *options(folders, tmp_path / "out.json", *more)) == 2
    assert says in capsys.readouterr().err


@pytest.mark.long
def test_two_processes_train_the_same_head(folders, tmp_path):
    names = ["one.json", "two.json"]
    words = options(folders, tmp_path / names[0], "--patch_size", 32, "--iterations", 3)
    assert run_job(job, *words) == 0
    found = run_two(job, *words, "--output", tmp_path / names[1])
    assert [status for status, *_ in found] == [0, 0], found
    one, two = (json.loads((tmp_path / name).read_text())["networks"][0]["figures"] for name in names)
    assert two == pytest.approx(one, abs=2e-3)
