"""k-NN of the teacher while it is trained."""
import json
import os
import shutil
import signal

import pytest
import torch
from image_kinds import write_hub
from networks import assert_same, small_wrapper
from small_job import load, options

from main_selfpatch import train_dino
from selfpatch.errors import ConfigError, RunStopped
from selfpatch.evaluation.image_features import ImageFeature
from selfpatch.evaluation.knn import knn_accuracy
from selfpatch.evaluation.labelled_images import Places, eval_transform, open_pair, share_loader
from selfpatch.pretraining import engine
from selfpatch.pretraining.knn_probe import KnnProbe

pytestmark = [pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning"),
              pytest.mark.usefixtures("small_network")]


def test_a_run_with_it_trains_as_one_without(image_folder, two_epochs, tmp_path, capsys):
    train_dino(options("--epochs", 2, "--data_path", image_folder, "--output_dir", tmp_path, "--knn_data", image_folder,
                       "--knn_every", 1, "--tensorboard"))
    assert_same(load(tmp_path / "checkpoint.pth")["student"], load(two_epochs / "checkpoint.pth")["student"])
    rows = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert "knn_top1" in rows[0] and 0 <= rows[1]["knn_top1"] <= rows[1]["knn_top5"] <= 100
    assert f"epoch 1: k-NN top-1 {rows[1]['knn_top1']:.2f} %" in capsys.readouterr().out
    assert load(tmp_path / "previous.pth")["epoch"] == 1  # an evaluation does not save again


@pytest.mark.parametrize("fault", [RunStopped("stopped"), ConfigError("none of the images can be read")])
def test_what_happens_in_it_costs_no_epoch(image_folder, tmp_path, monkeypatch, capsys, fault):
    """The epoch is saved before; a run that was ended in between evaluates when it goes on; an error is a warning."""
    words = ["--epochs", 3, "--data_path", image_folder, "--knn_data", image_folder, "--knn_every", 1]
    train_dino(options(*words, "--output_dir", tmp_path / "whole"))
    evaluate, calls = KnnProbe.__call__, []

    def fail_once(probe, teacher, check):
        calls.append(probe)
        if len(calls) == 2:
            raise fault
        return evaluate(probe, teacher, check)

    monkeypatch.setattr(KnnProbe, "__call__", fail_once)
    words += ["--output_dir", tmp_path / "run"]
    if isinstance(fault, RunStopped):
        with pytest.raises(RunStopped):
            train_dino(options(*words))
        assert load(tmp_path / "run" / "checkpoint.pth")["epoch"] == 2
    train_dino(options(*words))
    ours, whole = ([json.loads(line) for line in (tmp_path / name / "log.txt").read_text().splitlines()]
                   for name in ("run", "whole"))
    for row in [*ours, *whole]:
        row.pop("knn_seconds", None)
    if isinstance(fault, ConfigError):
        assert "warning: no k-NN accuracy after epoch 1: none of the images" in capsys.readouterr().out
        del whole[1]["knn_top1"], whole[1]["knn_top5"]
    assert ours == whole
    assert_same(load(tmp_path / "run" / "checkpoint.pth")["student"],
                load(tmp_path / "whole" / "checkpoint.pth")["student"])


@pytest.mark.parametrize("epoch, moment", [(0, "step"), (1, "step"), (1, "batch")])
def test_a_signal_before_or_within_it_ends_the_run_which_evaluates_later(image_folder, tmp_path, monkeypatch, epoch,
                                                                         moment):
    """Also after the last epoch, so that nothing that is due is left out."""
    def signalled(*args, **kwargs):
        result = step(*args, **kwargs)
        if moment == "batch" or args[0].step == 3 * (epoch + 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    words = ["--epochs", 2, "--data_path", image_folder, "--output_dir", tmp_path, "--knn_data", image_folder,
             "--knn_every", 1 + epoch]
    place = (engine, "train_step") if moment == "step" else (ImageFeature, "__call__")
    step = getattr(*place)
    with monkeypatch.context() as patch, pytest.raises(RunStopped, match=f"step 0 of epoch {epoch + 1}"):
        patch.setattr(*place, signalled)
        train_dino(options(*words))
    assert len((tmp_path / "log.txt").read_text().splitlines()) == epoch + 1
    train_dino(options(*words))
    rows = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1] and "knn_top1" in rows[epoch] and "knn_top1" in rows[1]


def test_figures_are_those_of_the_evaluation(image_folder):
    network, pair = small_wrapper(), open_pair(Places(image_folder, val_share=0.2), transform=eval_transform(32))
    expected = knn_accuracy(ImageFeature(network.backbone, head=network.ca_head), *map(share_loader, pair, [5, 5]),
                            ks=[20])
    found = KnnProbe(image_folder, 32, batch_size=3)(network.train())
    assert [(found["knn_top1"], found["knn_top5"])] == [tuple(one) for one in expected.values()]
    assert network.training and len(pair[0]) + len(pair[1]) == 12


def test_a_folder_with_train_and_val(image_folder, tmp_path):
    (tmp_path / "train").symlink_to(image_folder)
    shutil.copytree(image_folder, tmp_path / "val")
    for path in (tmp_path / "val").rglob("*.jpg"):
        path.rename(path.with_name(f"1{path.name}"))  # copies of the same names would be refused
    # every image has its copy as its nearest neighbour, though k = 20 is all 12 of them
    network = small_wrapper()
    expected = KnnProbe(tmp_path, 32)(network)
    assert expected["knn_top1"] >= 50
    for path in (tmp_path / "val").rglob("*.jpg"):
        path.rename(tmp_path / "val" / path.name)
    (tmp_path / "labels.txt").write_text("".join(f"1{i:02} class{i % 2}\n" for i in range(12)))
    found = KnnProbe(Places(tmp_path, val_labels=tmp_path / "labels.txt"), 32)(network)
    assert [found[name] for name in ("knn_top1", "knn_top5")] == [expected[name] for name in ("knn_top1", "knn_top5")]


def test_photographs_are_chosen_as_for_training(image_folder, tmp_path):
    data = shutil.copytree(image_folder, tmp_path / "data")
    for image in list(data.rglob("*.jpg")):
        shutil.copy(image, image.with_name(f"{image.stem}.seg.png"))
    probe = KnnProbe(Places(data, suffixes=[".jpg"], column="photo"), 32)  # of an hf: set, as the training images
    assert sum(len(loader.dataset) for loader in probe.loaders) == 12
    with pytest.raises(ConfigError, match="--knn_data .*data has no images in it: not read: .* .only .seg.png are"):
        for image in list(data.rglob("*.png")):
            image.unlink()
        shutil.copytree(image_folder, tmp_path / "train")
        for image in list((tmp_path / "train").rglob("*.jpg")):
            image.rename(image.with_suffix(".seg.png"))
        train_dino(options("--epochs", 1, "--data_path", tmp_path / "train", "--output_dir", tmp_path / "run",
                           "--knn_data", data, "--image_suffix", ".seg.png"))


def test_the_column_of_a_data_set_is_chosen_as_for_training(image_folder, tmp_path):
    data = f"{write_hub(image_folder, tmp_path / 'data')}:train"
    assert len(KnnProbe(Places(data, suffixes=[".jpg"], column="image"), 32).loaders) == 2
    with pytest.raises(ConfigError, match="has no column of images photo, but image: give .* --image_column"):
        KnnProbe(Places(data, column="photo"), 32)


@pytest.mark.parametrize("make, says", [
    (lambda folder, images: None, "there is no folder .*knn, and no file of that name: give --knn_data"),
    (lambda folder, images: folder.mkdir(), "--knn_data .*knn has no images in it"),
    (lambda folder, images: shutil.copytree(images / "class0", folder), "--knn_data: .* has no folders in it"),
    (lambda folder, images: shutil.copytree(images / "class0", folder / "a"), "images of one class only, a"),
    (lambda folder, images: [(folder / part).symlink_to(images) for part in ("train", "val") if not
                             folder.mkdir(exist_ok=True)], "12 of 12 test images are training images too")])
def test_data_that_does_not_do_is_refused_before_training(image_folder, tmp_path, make, says):
    make(tmp_path / "knn", image_folder)
    with pytest.raises(ConfigError, match=says) as error:
        train_dino(options("--epochs", 1, "--data_path", image_folder, "--output_dir", tmp_path, "--knn_data",
                           tmp_path / "knn"))
    assert "--data_path" not in str(error.value) and "--val_" not in str(error.value)
    assert not (tmp_path / "checkpoint.pth").exists() and torch.is_grad_enabled()
