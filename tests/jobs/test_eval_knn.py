"""The k-NN job end to end: folders, features, tables, several processes, and what it refuses."""
import json
import time

import pytest
import torch
import torch.nn.functional as F
from evaluation_jobs import SMALL, make_class_folders, run_job, run_two
from golden_rules import set_weights
from networks import save_selfpatch_run, small_wrapper
from PIL import Image

import eval_knn as job
from selfpatch.data.normalisation import normalise
from selfpatch.evaluation import knn
from selfpatch.evaluation.image_features import ImageFeature
from selfpatch.evaluation.knn import knn_accuracy
from selfpatch.evaluation.labelled_images import eval_transform, hold_out, open_labelled, share_loader
from selfpatch.method.vision_transformer import ARCHS, vit_tiny


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    return make_class_folders(tmp_path_factory.mktemp("colours"), train=5, val=3)


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    return save_selfpatch_run(tmp_path_factory.mktemp("run") / "checkpoint.pth")


def run(*words):
    """Exit status of the job on small images."""
    return run_job(job, *SMALL, *words)


def test_table_and_json(colours, run_file, tmp_path, capsys):
    output = tmp_path / "knn.json"
    assert run("--data_path", colours, "--pretrained_weights", run_file, "--random_weights", "--nb_knn", 1, 3, 500,
               "--output", output, "--dump_features", tmp_path / "features") == 0
    out = capsys.readouterr().out
    assert "k is at most that" in out and "15 training and 9 test images of 3 classes" in out
    table = out[out.index("k-NN, "):].splitlines()
    assert table[1].split() == "feature k = 1 k = 3 k = 15".split()
    assert table[2].split()[:2] == ["checkpoint.pth", "head"] and table[3].split()[:2] == ["random", "head"]
    content = json.loads(output.read_text())
    assert [network["arch"] for network in content["networks"]] == ["vit_tiny", "vit_tiny"]
    assert content["networks"][1]["knn"]["3"]["top1"] > 60  # the mean colour is enough
    features = torch.load(tmp_path / "features" / "checkpoint.pth" / "trainfeat.pth")
    assert features.shape == (15, 192) and torch.allclose(features.norm(dim=1), torch.ones(15))
    assert run("--data_path", colours, "--random_weights", "--output", output) == 2
    assert "exists: give another name, or --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["cls", "head", "mean"])
@torch.no_grad()
def test_each_feature_is_what_it_says(kind):
    wrapper = set_weights(small_wrapper(), 0).eval()
    model = wrapper.backbone
    if kind == "cls":
        model = set_weights(vit_tiny(class_token=True, final_norm=True), 0).eval()
    feature = ImageFeature(model, kind, head=wrapper.ca_head if kind == "head" else None)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    x = normalise(images)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(x[1, 2], (images[1, 2] / 255 - mean[2]) / std[2])
    expected = {"cls": lambda: model.features(x).class_token, "mean": lambda: model(x).mean(1),
                "head": lambda: wrapper.ca_head(model(x))[:, 0]}[kind]()
    torch.testing.assert_close(feature(images), expected)
    assert ImageFeature(model, None, head=feature.head).kind == kind


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(colours, run_file, tmp_path):
    """15 and 9 images do not divide by two, and a share of the bank is smaller than k."""
    words = ["--data_path", colours, "--pretrained_weights", run_file, "--nb_knn", 2, 9, 12, "--feature", "mean"]
    assert run(*words, "--output", tmp_path / "one.json") == 0
    first, second = run_two(job, *SMALL, *words, "--output", tmp_path / "two.json")
    assert first[0] == second[0] == 0, (first, second)
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one == two and "k = 12" in first[1] and "k = 12" not in second[1]


@pytest.mark.slow
def test_two_processes_end_when_one_cannot_write(colours, run_file, tmp_path):
    """Only rank 0 writes; here a folder is in the place of its file. The other rank does not wait for it."""
    (tmp_path / "trainfeat.pth").mkdir()
    words = ["--data_path", colours, "--pretrained_weights", run_file, "--nb_knn", 3, "--dump_features", tmp_path]
    start = time.monotonic()
    first, second = run_two(job, *SMALL, *words, "--overwrite")
    assert first[0] == second[0] == 2 and time.monotonic() - start < 60
    assert "trainfeat.pth cannot be written" in first[2] and "Traceback" not in first[2] + second[2]
    assert "error:" not in second[2]


def test_a_folder_for_features_is_checked_first(colours, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(knn, "extract", None)  # before any work
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        assert run("--data_path", colours, "--random_weights", "--arch", "vit_tiny", "--dump_features", folder) == 2
        line = capsys.readouterr().err
        assert "cannot be made a folder" in line and line.count("\n") == 1


@torch.no_grad()
def test_accuracy_while_training(colours):
    """Callable with a network in training, which stays in training."""
    wrapper = set_weights(small_wrapper(), 0).train()
    feature = ImageFeature(wrapper.backbone, head=wrapper.ca_head)
    loaders = [share_loader(open_labelled(colours / part, "--knn_data", eval_transform(32)), 4)
               for part in ("train", "val")]
    found = knn_accuracy(feature, *loaders, ks=(5,))
    bank, queries = (F.normalize(torch.cat([feature(images) for images, *_ in loader]), dim=1) for loader in loaders)
    cosines, nearest = (queries @ bank.T).topk(5, dim=1)
    votes = ((cosines / 0.07).exp()[..., None] * F.one_hot(torch.arange(15) // 5)[nearest]).sum(1)
    expected = 100 * (votes.argmax(1) == torch.arange(9) // 3).float().mean().item()
    assert feature.kind == "head" and found[5].top1 == pytest.approx(expected) and wrapper.backbone.training
    assert found == knn_accuracy(feature, *loaders, ks=(5,))


def test_a_share_of_one_folder(colours, capsys):
    assert run("--data_path", colours / "train", "--val_share", 0.4, "--random_weights", "--arch", "vit_tiny") == 0
    assert "9 training and 6 test images" in capsys.readouterr().out
    images = open_labelled(colours / "train", "--data_path")
    train, val = hold_out(images, 0.4)
    assert sorted(train.indices.tolist() + val.indices.tolist()) == list(range(len(images)))


def test_unreadable_images_are_left_out(colours, tmp_path, capsys):
    make_class_folders(tmp_path, train=3, val=2)
    (tmp_path / "val" / "red" / "00.png").write_bytes(b"no image")
    assert run("--data_path", tmp_path, "--random_weights", "--arch", "vit_tiny", "--nb_knn", 3) == 0
    assert "left out: cannot read the image" in capsys.readouterr().err


@pytest.mark.parametrize("words, says", [
    (["--random_weights"], "give either --data_path"),
    (["--data_path", "{c}/none", "--random_weights"],
     "there is no folder {c}/none, and no file of that name: give --data_path"),
    (["--data_path", "{c}/train", "--random_weights"],
     "--data_path {c}/train has no train/ and val/ in it: give --train_path and --val_path, or --val_share"),
    (["--train_path", "{c}/train/red", "--val_path", "{c}/val", "--random_weights"],
     "--train_path: {c}/train/red has no folders in it"),
    (["--train_path", "{c}/train", "--val_path", "{t}/fewer", "--random_weights"],
     "differ in class folders: blue, green are in one of them only"),
    (["--data_path", "{t}/empty", "--val_share", "0.5", "--random_weights"],
     "--data_path {t}/empty has no images in it: files ending in"),
    (["--data_path", "{c}"], "--pretrained_weights is empty"),
    (["--data_path", "{c}", "--random_weights", "--nb_knn", "0"], "--nb_knn: it is 0, and must be at least 1"),
    (["--data_path", "{c}", "--random_weights", "--temperature", "0"], "--temperature: it is 0.0, and must be above 0"),
    (["--data_path", "{c}", "--random_weights", "--layer", "12"], "--layer 12: the network has 12 blocks"),
    (["--data_path", "{c}", "--random_weights", "--feature", "cls"],
     "--feature cls: the network has none; it offers mean"),
    (["--data_path", "{c}", "--random_weights", "--image_size", "100000"], "--image_size 100000: give 8192 or less"),
    (["--data_path", "{c}", "--pretrained_weights", "{r}", "--feature", "cls"],
     "checkpoint.pth: --feature cls: the network has none; it offers head, mean"),
    (["--data_path", "{c}", "--random_weights", "--output", "{t}/no/x.json"], "is not a folder, create it first"),
    (["--data_path", "{c}/train", "--val_share", "1.5", "--random_weights"], "--val_share 1.5"),
    (["--data_path", "{c}", "--pretrained_weights", "a", "b", "c", "--arch", "vit_tiny", "vit_small"],
     "--arch has 2 names for 3 files"),
])
def test_refused_in_one_line(words, says, colours, run_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(knn, "extract", None)  # before any work
    monkeypatch.setitem(ARCHS, "vit_small", vit_tiny)
    (tmp_path / "fewer" / "red").mkdir(parents=True)
    (tmp_path / "empty" / "red").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "fewer" / "red" / "0.png")
    fill = {"c": colours, "t": tmp_path, "r": run_file}
    assert run(*(word.format(**fill) for word in words)) == 2
    line = capsys.readouterr().err
    assert says.format(**fill) in line and line.count("\n") == 1
