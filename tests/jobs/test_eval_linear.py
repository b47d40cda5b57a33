"""Linear classification: the heads are SGD's, the features what they say, and the job end to end."""
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from evaluation_jobs import CLASSES, SMALL, make_class_folders, run_job, run_two
from golden_rules import set_weights
from networks import small_wrapper

import eval_linear as job
from selfpatch.data.normalisation import normalise
from selfpatch.errors import ConfigError
from selfpatch.evaluation.image_features import ImageFeature
from selfpatch.evaluation.labelled_images import open_labelled
from selfpatch.evaluation.linear_probe import (
    CachedTokens,
    CropBatches,
    Heads,
    Inputs,
    TokenFeature,
    build_heads,
    input_grid,
    train_transform,
)
from selfpatch.method.vision_transformer import VisionTransformer


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    return make_class_folders(tmp_path_factory.mktemp("colours"), train=5, val=3)


def run(*words):
    """Exit status of the job on small images."""
    return run_job(job, *SMALL, *words)


@pytest.mark.parametrize("inputs", [Inputs(1, False), Inputs(2, True)])
def test_heads_are_torchs_linear_layers_and_sgd(inputs):
    torch.manual_seed(0)
    ours, lrs = Heads(inputs, 6, 4, [0.1, 0.5]), (0.1, 0.5)
    assert ours.weight.shape == (2, 4, 6 * (inputs.blocks + inputs.mean_patches)) and (ours.bias == 0).all()
    layers = [torch.nn.Linear(ours.weight.shape[2], 4) for _ in lrs]
    for layer, weight in zip(layers, ours.weight, strict=True):
        layer.weight.data, layer.bias.data = weight.clone(), torch.zeros(4)
    optimizers = [torch.optim.SGD(layer.parameters(), lr, momentum=0.9) for layer, lr in zip(layers, lrs, strict=True)]
    for step in range(4):
        tokens, labels = torch.randn(5, 3, 6), torch.tensor([0, 1, 2, 3, 0])
        losses = ours.step(tokens, labels, 5, factor=1 - step / 4)
        for i, (layer, optimizer) in enumerate(zip(layers, optimizers, strict=True)):
            optimizer.param_groups[0]["lr"] = lrs[i] * (1 - step / 4)
            loss = F.cross_entropy(layer(inputs.select(tokens)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            torch.testing.assert_close(losses[i], loss.detach())
    for i, layer in enumerate(layers):
        torch.testing.assert_close(ours.weight[i], layer.weight.detach())
        torch.testing.assert_close(ours.logits(tokens)[:, i], layer(inputs.select(tokens)).detach())


def test_grid_of_inputs_and_learning_rates():
    assert input_grid("cls", [4, 1]) == [(1, False), (1, True), (4, False), (4, True)]
    assert input_grid("mean", [1, 4]) == [(1, False), (4, False)]  # without class token, the mean is all there is
    assert input_grid("head", [1, 4]) == [(1, False), (1, True)]
    heads = build_heads(input_grid("cls", [1, 4]), 384, 100, 1024)
    assert [one.weight.shape[2] // 384 for one in heads] == [1, 2, 4, 5] and len(heads[0].lrs) == 13
    assert heads[0].lrs[-1].item() == pytest.approx(0.4)  # 0.1 · 1024 / 256
    assert heads[0].weight.std().item() == pytest.approx(0.01, rel=0.01)
    tokens = torch.arange(10).view(1, 5, 2)  # four blocks, then the mean
    assert Inputs(2, False).select(tokens).tolist() == [[4, 5, 6, 7]]
    assert Inputs(1, True).select(tokens).tolist() == [[6, 7, 8, 9]]


@torch.no_grad()
def test_tokens_are_what_they_say():
    model = set_weights(VisionTransformer(32, 8, embed_dim=24, depth=3, num_heads=3, class_token=True, final_norm=True),
                        0).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    x = normalise(images)
    layers = [model.norm(tokens) for tokens in model.get_intermediate_layers(x, 2)]
    tokens = TokenFeature(ImageFeature(model), 2)(images)
    assert tokens.shape == (2, 3, 24)
    torch.testing.assert_close(tokens[:, 0], model.features(x, -2).class_token)
    torch.testing.assert_close(tokens[:, 2], layers[1].mean(1))
    means = TokenFeature(ImageFeature(model, "mean", layer=1), 2)(images)
    torch.testing.assert_close(means[:, 1], layers[0].mean(1))
    wrapper = set_weights(small_wrapper(), 0).eval()
    head = TokenFeature(ImageFeature(wrapper.backbone, head=wrapper.ca_head), 4)(images)
    torch.testing.assert_close(head[:, 0], wrapper.ca_head(wrapper.backbone(x))[:, 0])
    with pytest.raises(ConfigError, match="--n_last_blocks 3: there are 2 blocks up to --layer 1"):
        TokenFeature(ImageFeature(model, layer=1), 3)


def be_rank(monkeypatch, rank, world_size=2):
    monkeypatch.setattr("selfpatch.evaluation.linear_probe.get_rank", lambda: rank)
    monkeypatch.setattr("selfpatch.evaluation.linear_probe.get_world_size", lambda: world_size)


def test_crops_depend_on_seed_epoch_and_image_alone(colours, monkeypatch):
    """So that two processes train on the images and crops of one."""
    images = open_labelled(colours / "train", "--data_path", train_transform(16))
    one = [(crops, labels) for crops, labels, _ in CropBatches(images, 4).epoch(1)]
    assert [len(labels) for _, labels in one] == [4, 4, 4]  # the incomplete step is left out
    shares = []
    for rank in range(2):
        be_rank(monkeypatch, rank)
        shares.append([crops for crops, *_ in CropBatches(images, 2).epoch(1)])
    for (crops, _), *parts in zip(one, *shares, strict=True):
        assert torch.equal(crops[0::2], parts[0]) and torch.equal(crops[1::2], parts[1])
    monkeypatch.undo()
    assert not torch.equal(next(iter(CropBatches(images, 4).epoch(2)))[0], one[0][0])


def test_fewer_images_than_a_step_takes(colours, monkeypatch):
    """A step then has all of them, however many processes there are: none are left out, and no rate is another one."""
    images = open_labelled(colours / "train", "--data_path", train_transform(16))
    for world_size in (1, 2, 7):
        be_rank(monkeypatch, 0, world_size)
        batches = CropBatches(images, 100)
        assert (batches.step_size, batches.steps) == (15, 1)
        assert [len(labels) for _, labels, _ in batches.epoch(0)] == [-(-15 // world_size)]
    be_rank(monkeypatch, 0, 16)
    with pytest.raises(ConfigError, match="there are 15 training images for 16 processes: start fewer"):
        CropBatches(images, 100)


@torch.no_grad()
def test_kept_crops_come_in_one_order_for_all_processes(colours, tmp_path, monkeypatch):
    """Two processes have together, in every step, the tokens of one; a file that cannot be read is in no step."""
    shutil.copytree(colours / "train", tmp_path / "bad")
    images = open_labelled(tmp_path / "bad", "--data_path", train_transform(16))
    Path(images.images.location(6)).write_bytes(b"no image")
    model = set_weights(VisionTransformer(16, 8, embed_dim=24, depth=1, num_heads=3), 0).eval()
    feature, found = TokenFeature(ImageFeature(model), 1), {}
    for rank, world_size in ((0, 1), (0, 2), (1, 2)):
        be_rank(monkeypatch, rank, world_size)
        unreadable = set()
        cached = CachedTokens(CropBatches(images, 4 // world_size, seed=3), feature, torch.device("cpu"), unreadable)
        found[rank, world_size] = [list(cached.epoch(number)) for number in range(2)]
        assert len(unreadable) == (rank == 0)  # image 6 is in the share of rank 0
    for whole, *parts in zip(*found.values(), strict=True):
        for (tokens, labels), *halves in zip(whole, *parts, strict=True):
            together = [torch.cat(part) for part in zip(*halves, strict=True)]
            ours, order = (one[:, 0, 0].sort().indices for one in (tokens, together[0]))
            torch.testing.assert_close(tokens[ours], together[0][order], rtol=1e-3, atol=1e-3)
            assert torch.equal(labels[ours], together[1][order])
    seen = [sum(len(labels) for _, labels in epoch) for epoch in found[0, 1]]
    assert all(11 <= count <= 12 for count in seen)  # three steps of four, of which one may miss the image
    assert not torch.equal(found[0, 1][0][0][0], found[0, 1][1][0][0])


@pytest.mark.parametrize("words", [[], ["--cache_features"]])
def test_table_and_json(words, colours, tmp_path, capsys):
    output = tmp_path / "linear.json"
    assert run("--data_path", colours, "--random_weights", "--arch", "vit_tiny", "--batch_size_per_gpu", 4, "--epochs",
               20, "--lr", 1e-5, 0.1, "--output", output, *words) == 0
    out = capsys.readouterr().out
    assert "best of 4 heads" in out and "lr 0.1, mean of" in out
    content = json.loads(output.read_text())
    heads = content["networks"][0]["heads"]
    assert len(heads) == 4 and heads[0]["top1"] == max(head["top1"] for head in heads) == 100
    assert content["one_crop_an_image"] == bool(words)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--cache_features"]])
def test_two_processes_give_the_figures_of_one(more, colours, tmp_path):
    words = ["--data_path", colours, "--random_weights", "--arch", "vit_tiny", "--epochs", 3, "--lr", 1e-5, 1e-3, 0.1,
             *more]
    assert run(*words, "--batch_size_per_gpu", 4, "--output", tmp_path / "one.json") == 0
    found = run_two(job, *SMALL, *words, "--batch_size_per_gpu", 2, "--output", tmp_path / "two.json")
    assert [status for status, *_ in found] == [0, 0], found
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one == two


def test_unreadable_images_are_left_out(colours, tmp_path, capsys):
    for part in ("train", "val"):
        for name in CLASSES:
            (tmp_path / part / name).mkdir(parents=True)
            (tmp_path / part / name / "0.png").symlink_to(colours / part / name / "00.png")
        (tmp_path / part / "red" / "1.png").write_bytes(b"no image")
    assert run("--data_path", tmp_path, "--random_weights", "--arch", "vit_tiny", "--batch_size_per_gpu", 2,
               "--epochs", 1) == 0
    assert capsys.readouterr().err.count("left out: cannot read the image") == 2


def test_no_readable_training_image(colours, tmp_path, capsys):
    for name in CLASSES:
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "0.png").write_bytes(b"no image")
    (tmp_path / "val").symlink_to(colours / "val")
    for words in ([], ["--cache_features"]):
        assert run("--data_path", tmp_path, "--random_weights", "--arch", "vit_tiny", "--epochs", 1, *words) == 2
        assert "none of the training images can be read" in capsys.readouterr().err


@pytest.mark.parametrize("words, says", [
    (["--random_weights"], "give either --data_path"),
    (["--data_path", "{c}", "--random_weights", "--lr", "0.1", "0"], "--lr: it is 0.0, and must be above 0"),
    (["--data_path", "{c}", "--random_weights", "--epochs", "0"], "--epochs: it is 0, and must be at least 1"),
    (["--data_path", "{c}", "--random_weights", "--n_last_blocks", "13"], "there are 12 blocks up to --layer -1"),
    (["--data_path", "{c}", "--random_weights", "--batch_size_per_gpu", "0"], "_gpu: it is 0, and must be at least 1"),
])
def test_refused_in_one_line(words, says, colours, capsys):
    assert run(*(word.format(c=colours) for word in words)) == 2
    line = capsys.readouterr().err
    assert says in line and line.count("\n") == 1
