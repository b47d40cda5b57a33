"""The job of dense retrieval: on images that colours tell apart, by one process and by two, and what it refuses."""
import json

import numpy as np
import pytest
import torch
from dense_data import UNTRAINED, make_ade20k, make_folders
from evaluation_jobs import run_job, run_two
from PIL import Image

import eval_dense_retrieval as job
from selfpatch.data.normalisation import IMAGENET_MEAN
from selfpatch.evaluation.dense_retrieval import PatchMemory
from selfpatch.evaluation.image_features import PatchFeature
from selfpatch.evaluation.knn import QUERY_ROWS
from selfpatch.evaluation.segmentation import find_segmentation_data
from selfpatch.method.vision_transformer import vit_tiny

STATISTICS = IMAGENET_MEAN, job.PUBLISHED_STD


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("pairs"))


def figures(path):
    content = json.loads(path.read_text())
    return {network["network"] if "network" in network else network["name"]: network["figures"]
            for network in content["networks"]}


def test_untrained_features_tell_colours_apart(folders, tmp_path, small_network, capsys):
    """Far above a map of class 0 alone, whose mean IoU is under 0.3."""
    output = tmp_path / "out.json"
    assert run_job(job, "--data", f"folders:{folders}", "--num_classes", 3, *UNTRAINED, "--memory_size", 4000,
                   "--hungarian", "--output", output) == 0
    printed = capsys.readouterr().out
    assert "dense retrieval, images" in printed and "mean IoU, all classes" in printed
    (column,) = figures(output).values()
    assert column["mean IoU, all classes"] > 0.6
    assert column["mean IoU, matched (Hungarian)"] == pytest.approx(column["mean IoU, all classes"])
    assert run_job(job, "--data", f"folders:{folders}", "--num_classes", 3, *UNTRAINED, "--memory_size", 4000,
                   "--hungarian", "--output", output, "--overwrite", "--num_workers", 2) == 0
    assert list(figures(output).values()) == [column]  # images that worker processes read
    assert run_job(job, "--data", f"folders:{folders}", "--num_classes", 3, *UNTRAINED, "--output", output) == 2
    assert "exists: give another name, or --overwrite" in capsys.readouterr().err


def test_keys(folders, tmp_path, small_network):
    output = tmp_path / "out.json"
    words = ("--data", f"folders:{folders}", "--num_classes", 3, *UNTRAINED, "--memory_size", 4000, "--output", output)
    found = []
    for feature in ("keys", "patches"):
        assert run_job(job, *words, "--overwrite", "--feature", feature) == 0
        found += figures(output).values()
    assert found[0] != found[1] and found[0]["mean IoU, all classes"] > 0.6


def test_samples_depend_on_their_number_alone(folders):
    data = find_segmentation_data(f"folders:{folders}", 3)
    whole = job.MemoryImages(data, 64, STATISTICS, range(8), 0)
    torch.rand(3)  # the state of the global generator does not matter
    share = job.MemoryImages(data, 64, STATISTICS, range(3, 8), 0)
    for ours, expected in zip(share[2], whole[5], strict=True):
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(expected))
    assert whole[5][2:] == (1, 1)
    assert not torch.equal(whole[1][0], whole[5][0])  # the same image in two passes
    state = torch.get_rng_state()
    _ = whole[0]
    assert torch.equal(torch.get_rng_state(), state)


def test_crops_keep_image_and_mask_together(tmp_path):
    """Ids that can be read from the pixels, before and after the augmentation."""
    ids = (np.arange(64)[:, None] // 16 * 4 + np.arange(96)[None] // 24).astype(np.uint8)
    for split in ("train", "val"):
        for kind, picture in (("images", np.repeat(ids[..., None] * 16, 3, 2)), ("masks", ids)):
            (tmp_path / kind / split).mkdir(parents=True)
            Image.fromarray(picture).save(tmp_path / kind / split / "0.png")
    data = find_segmentation_data(f"folders:{tmp_path / 'images'},{tmp_path / 'masks'}", 16)
    memory = job.MemoryImages(data, 64, STATISTICS, range(6), 0)
    memory.jitter = torch.nn.Identity()
    for image, mask in [memory[i][:2] for i in range(6)] + [job.TestImages(data, 64, STATISTICS, data.val)[0]]:
        values = (image[1] * STATISTICS[1][1] + STATISTICS[0][1]) * 255 / 16
        assert ((values - mask).abs() < 0.5).float().mean() > 0.8
        assert image.shape == (3, 64, 64) and mask.shape == (64, 64)


def test_side_of_images():
    assert [job.image_size(patch) for patch in (8, 14, 16)] == [512, 504, 512]


def test_memory_of_a_million_patches():
    """1,024,000 × 384 in half precision: features under 1 GB, and with VOC's labels and a product, far under 4 GB."""
    memory = PatchMemory(1000, 384, 21)
    per_row = {name: getattr(memory, name).element_size() * getattr(memory, f"_{name}").shape[1]
               for name in ("features", "labels")}
    assert 1_024_000 * per_row["features"] < 1e9
    product = 4 * job.BANK_ROWS * QUERY_ROWS
    assert 1_024_000 * sum(per_row.values()) + 4 * product < 2e9


def test_ignored_pixels_are_class_0_in_the_memory(tmp_path, small_network, monkeypatch):
    added = []
    monkeypatch.setattr(job.PatchMemory, "add", lambda self, features, labels: added.append(labels))
    data = find_segmentation_data(f"ade20k:{make_ade20k(tmp_path)}")
    args = job.get_args_parser().parse_args(["--data", "x", "--memory_size", "600", "--num_workers", "0"])
    job.build_memory(PatchFeature(vit_tiny(64).eval()), data, args, torch.device("cpu"), STATISTICS)
    labels = torch.cat(added)
    assert len(added) == 6 and labels.shape == (6 * 64, 150)  # 100 rows an image, of which there are 64 patches
    torch.testing.assert_close(labels.sum(1), torch.ones(len(labels)))
    assert labels[:, :2].sum() == len(labels) and labels[:, 1].sum() > 1


@pytest.mark.parametrize("options, says", [
    (["--memory_size", 7], "--memory_size 7 is less than one patch of each of 4 images in --passes 2: give 8 or more"),
    (["--temperature", 0], "--temperature: it is 0.0, and must be above 0"),
    (["--temperature", "inf"], "--temperature: it is inf, and must be above 0 and finite"),
    (["--neighbours", 0], "--neighbours: it is 0, and must be at least 1"),
    (["--layer", 99], "--layer 99"), (["--output", "nowhere/x.json"], "nowhere is not a folder")])
def test_refusals(folders, capsys, options, says):
    assert run_job(job, "--data", f"folders:{folders}", "--num_classes", 3, *UNTRAINED, *options) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(folders, tmp_path):
    names = ["one.json", "two.json"]
    words = ["--data", f"folders:{folders}", "--num_classes", 3, *UNTRAINED, "--patch_size", 32, "--memory_size", 999]
    assert run_job(job, *words, "--output", tmp_path / names[0]) == 0
    found = run_two(job, *words, "--output", tmp_path / names[1])
    assert [status for status, *_ in found] == [0, 0], found
    one, two = (list(figures(tmp_path / name).values())[0] for name in names)
    assert two == pytest.approx(one, abs=1e-4)
