"""The job as a user runs it: files it writes, resuming, DINO as the special case, and what it refuses."""
import argparse
import json
import shutil
from functools import partial

import pytest
import torch

import main_selfpatch
import utils
from augmentations import DataAugmentationDINO
from losses import DINOLoss
from main_selfpatch import get_args_parser, health_warnings, train_dino
from vision_transformer import ARCHS, DINOHead, VisionTransformer

SMALL = ["--arch", "vit_tiny", "--global_crops_size", "48", "--local_crops_size", "48", "--local_crops_number", "1",
         "--out_dim", "64", "--out_dim_selfpatch", "32", "--batch_size_per_gpu", "4", "--num_workers", "0",
         "--warmup_epochs", "1", "--device", "cpu", "--saveckp_freq", "1"]


@pytest.fixture(autouse=True, scope="module")
def small_network():
    """The job with a narrow, shallow vit_tiny and narrow heads, for speed; test_launchers.py runs the real ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHS, "vit_tiny", partial(VisionTransformer, embed_dim=24, depth=3, num_heads=3))
        patch.setattr(main_selfpatch, "DINOHead", partial(DINOHead, hidden_dim=32, bottleneck_dim=16))
        yield


def options(*words):
    return get_args_parser().parse_args([*SMALL, *map(str, words)])


@pytest.fixture(scope="module")
def two_epochs(small_network, image_folder, tmp_path_factory):
    """A whole run, its checkpoint after the first epoch kept as checkpoint0000.pth."""
    output = tmp_path_factory.mktemp("run")
    train_dino(options("--epochs", 2, "--data_path", image_folder, "--output_dir", output, "--tensorboard"))
    return output


def load(path):
    return torch.load(path, weights_only=True)


def assert_same(ours, other, where="checkpoint"):
    """Equal to the bit, through dicts and lists."""
    assert type(ours) is type(other), where
    if isinstance(ours, dict):
        assert ours.keys() == other.keys(), where
        for key in ours:
            assert_same(ours[key], other[key], f"{where}.{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(other), where
        for i, (a, b) in enumerate(zip(ours, other, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, other), where
    else:
        assert ours == other, where


def test_published_defaults():
    args = vars(get_args_parser().parse_args([]))
    assert {k: args[k] for k in args if k != "data_path"} == {
        "arch": "deit_tiny", "patch_size": 16, "out_dim": 65536, "out_dim_selfpatch": 4096, "norm_last_layer": True,
        "momentum_teacher": 0.996, "use_bn_in_head": False, "k_num": 4, "warmup_teacher_temp": 0.04,
        "teacher_temp": 0.04, "warmup_teacher_temp_epochs": 0, "use_fp16": True, "weight_decay": 0.04,
        "weight_decay_end": 0.4, "clip_grad": 3.0, "batch_size_per_gpu": 64, "epochs": 300, "freeze_last_layer": 1,
        "lr": 0.0005, "warmup_epochs": 10, "min_lr": 1e-6, "optimizer": "adamw", "global_crops_scale": (0.25, 1.0),
        "local_crops_number": 8, "local_crops_scale": (0.05, 0.25), "output_dir": ".", "saveckp_freq": 10, "seed": 0,
        "num_workers": 10, "dist_url": "env://", "local_rank": 0, "port": 29500,
        "patch_loss_weight": 0.1, "drop_path_rate": 0.1, "global_crops_size": 224, "local_crops_size": 96,
        "log_every": 10, "device": "auto", "precision": "auto", "tensorboard": False}


def test_published_command_and_launchers_options():
    words = ("--arch vit_small --data_path /path/to/imagenet/train --output_dir /path/to/saving_dir --epoch 200 "
             "--local_crops_number 8 --patch_size 16 --batch_size_per_gpu 128 --out_dim_selfpatch 4096 --k_num 4")
    args = get_args_parser().parse_args(words.split())
    assert (args.epochs, args.arch, args.out_dim_selfpatch) == (200, "vit_small", 4096)
    for spelling in ("--local-rank=3", "--local_rank=3"):
        assert get_args_parser().parse_args([spelling]).local_rank == 3
    assert get_args_parser().parse_args(["--use_fp16", "off"]).use_fp16 is False


def test_names_that_people_import():
    assert main_selfpatch.DataAugmentationDINO is DataAugmentationDINO and main_selfpatch.DINOLoss is DINOLoss
    for name in ("MultiCropWrapper", "get_args_parser", "train_dino", "train_one_epoch"):
        assert callable(getattr(main_selfpatch, name))


def test_run_writes_checkpoints_and_log(two_epochs):
    state = load(two_epochs / "checkpoint.pth")
    assert set(state) == {"student", "teacher", "optimizer", "epoch", "args", "dino_loss", "fp16_scaler"}
    assert state["epoch"] == 2 and type(state["args"]) is dict and state["args"]["out_dim"] == 64
    assert state["dino_loss"]["center"].shape == (1, 1, 64)
    assert state["dino_loss"]["patch_center"].shape == (1, 32) and state["dino_loss"]["patch_center"].any()
    assert set(state["student"]) == set(state["teacher"]) and "ca_head.cls_token" in state["student"]
    rows = [json.loads(line) for line in (two_epochs / "log.txt").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1]
    for row in rows:
        assert row["train_loss"] == pytest.approx(row["train_clsloss"] + 0.1 * row["train_patchloss"])
        assert {"train_lr", "train_wd"} <= row.keys()
    assert sorted(p.name for p in two_epochs.glob("checkpoint*")) == [
        "checkpoint.pth", "checkpoint0000.pth", "checkpoint0001.pth"]
    assert not list(two_epochs.glob(".*"))  # no temporary left
    assert list((two_epochs / "tensorboard").glob("events*"))


@pytest.mark.parametrize("workers", [0, 1])
def test_one_epoch_resumed_equals_two(image_folder, two_epochs, tmp_path, workers, capsys):
    """Stochastic depth, crops and order of images come out as in the run that was never interrupted."""
    whole = two_epochs
    if workers:
        whole = tmp_path / "whole"
        train_dino(options("--epochs", 2, "--data_path", image_folder, "--output_dir", whole, "--num_workers", workers))
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copy(whole / "checkpoint0000.pth", resumed / "checkpoint.pth")
    shutil.copy(whole / "log.txt", resumed / "log.txt")  # has epoch 1 already, as if killed before its checkpoint
    torch.manual_seed(1234)  # whatever has been drawn since must not matter
    train_dino(options("--epochs", 2, "--data_path", image_folder, "--output_dir", resumed, "--num_workers", workers))
    assert "going on after epoch 0" in capsys.readouterr().out
    ours, other = load(resumed / "checkpoint.pth"), load(whole / "checkpoint.pth")
    del ours["args"], other["args"]  # they name the folders
    assert_same(ours, other)
    rows = [[json.loads(line) for line in (folder / "log.txt").read_text().splitlines()] for folder in (resumed, whole)]
    assert [row["epoch"] for row in rows[0]] == [0, 1]
    assert [row["train_loss"] for row in rows[0]] == [row["train_loss"] for row in rows[1]]


def test_finished_run_is_left_alone(image_folder, two_epochs, tmp_path):
    shutil.copytree(two_epochs, tmp_path / "copy")
    before = (tmp_path / "copy" / "checkpoint.pth").read_bytes()
    train_dino(options("--epochs", 2, "--data_path", image_folder, "--output_dir", tmp_path / "copy"))
    assert (tmp_path / "copy" / "checkpoint.pth").read_bytes() == before
    assert len((tmp_path / "copy" / "log.txt").read_text().splitlines()) == 2


def test_published_checkpoint_is_taken_up(image_folder, two_epochs, tmp_path):
    """args as a Namespace, the student's keys with DDP's prefix."""
    state = load(two_epochs / "checkpoint0000.pth")
    state["args"] = argparse.Namespace(**state["args"])
    state["student"] = {f"module.{k}": v for k, v in state["student"].items()}
    torch.save(state, tmp_path / "checkpoint.pth")
    train_dino(options("--epochs", 2, "--data_path", image_folder, "--output_dir", tmp_path))
    assert_same(load(tmp_path / "checkpoint.pth")["student"], load(two_epochs / "checkpoint.pth")["student"])


def test_patch_loss_weight_0_is_dino(image_folder, tmp_path, monkeypatch):
    """The teacher sees the two global crops, its centre is theirs, and no patch is matched or projected."""
    monkeypatch.setattr("selfpatch_head.positive_matching", lambda *_: pytest.fail("matched patches"))
    monkeypatch.setattr(DINOLoss, "patch_loss", lambda *_: pytest.fail("patch loss"))
    build, seen = main_selfpatch.build_models, []

    def watched(args):
        student, teacher = build(args)
        for model in (student, teacher):
            model.p_head.register_forward_pre_hook(lambda *_: pytest.fail("ran the patch head"))
        teacher.register_forward_hook(lambda _, inputs, output: seen.append((len(inputs[0]), output[0])))
        return student, teacher

    monkeypatch.setattr(main_selfpatch, "build_models", watched)
    train_dino(options("--epochs", 1, "--data_path", image_folder, "--output_dir", tmp_path, "--patch_loss_weight", 0,
                       "--local_crops_number", 2, "--local_crops_size", 32))  # 2×2 patches: no matter without matching
    assert [views for views, _ in seen] == [2, 2, 2]
    state = load(tmp_path / "checkpoint.pth")
    center = torch.zeros(1, 1, 64)
    for _, logits in seen:
        center = 0.9 * center + 0.1 * logits.mean(0)
    torch.testing.assert_close(state["dino_loss"]["center"], center)
    assert not state["dino_loss"]["patch_center"].any()
    assert_same({k: v for k, v in state["student"].items() if k.startswith("p_head")},
                {k: v for k, v in state["teacher"].items() if k.startswith("p_head")})


@pytest.mark.parametrize("words", [["--use_bn_in_head", "true"], ["--optimizer", "lars", "--lr", "0.1"],
                                   ["--optimizer", "sgd", "--norm_last_layer", "false", "--precision", "bf16"],
                                   ["--patch_size", "8", "--global_crops_size", "40", "--local_crops_size", "24"]])
def test_other_options_train(image_folder, tmp_path, words):
    train_dino(options("--epochs", 1, "--data_path", image_folder, "--output_dir", tmp_path, *words))
    row = json.loads((tmp_path / "log.txt").read_text())
    assert 0 < row["train_loss"] < 10
    student, teacher = (load(tmp_path / "checkpoint.pth")[who] for who in ("student", "teacher"))
    moved = [k for k in student if not torch.equal(student[k], teacher[k])]
    assert any(k.startswith("backbone") for k in moved) and any(k.startswith("p_head") for k in moved)


def test_nan_is_found_however_seldom_the_log_is_read():
    logger = utils.MetricLogger(window=50)
    for step in range(50):
        logger.update(total=torch.tensor(float("nan") if step == 3 else 1.0))
    logger.read()
    with pytest.raises(SystemExit, match="step 103 of epoch 2"):
        main_selfpatch.stop_if_not_finite(logger, epoch=2, step=149, steps=200)


def test_loss_that_is_not_finite_stops_and_names_the_step(image_folder, tmp_path, monkeypatch):
    step, count = main_selfpatch.train_step, iter(range(100))

    def poisoned(*args, **kwargs):
        losses = step(*args, **kwargs)
        return losses._replace(total=losses.total * float("nan")) if next(count) == 4 else losses

    monkeypatch.setattr(main_selfpatch, "train_step", poisoned)
    with pytest.raises(SystemExit) as stop:
        train_dino(options("--epochs", 3, "--data_path", image_folder, "--output_dir", tmp_path))
    assert "step 1 of epoch 1 (iteration 4)" in stop.value.code  # a message is exit status 1
    assert load(tmp_path / "checkpoint.pth")["epoch"] == 1


def test_warnings_in_words():
    args = options("--epochs", 20, "--warmup_epochs", 10)
    good = {"clsloss": 3.0, "patchloss": 2.5, "cls_entropy": 3.0, "patch_entropy": 2.0}
    assert health_warnings(good, 15, args) == []
    stuck = good | {"clsloss": 4.16}  # ln 64 = 4.159
    assert health_warnings(stuck, 5, args) == []
    assert "image loss 4.1600 sits on ln K = 4.1589" in health_warnings(stuck, 15, args)[0]
    collapsed = health_warnings(good | {"patch_entropy": 1e-3}, 5, args)
    assert len(collapsed) == 1 and "every patch the same prototype" in collapsed[0]


@pytest.mark.parametrize("words, says", [
    (["--data_path", "nowhere"], "no folder nowhere"),
    (["--data_path", "{empty}"], "no folders in it"),
    (["--data_path", "{hollow}"], "no images"),
    (["--arch", "resnet50"], "invalid choice: 'resnet50'"),
    (["--k_num", "9"], "--k_num is 9"),
    (["--k_num", "0"], "--k_num is 0"),
    (["--global_crops_size", "50"], "no multiple of --patch_size 16: take 48"),
    (["--local_crops_size", "40"], "no multiple of --patch_size 16"),
    (["--local_crops_size", "32"], "under 3 patches a side"),
    (["--batch_size_per_gpu", "13"], "12 images, fewer than the 13"),
    (["--warmup_epochs", "3"], "longer than the run of --epochs 2"),
    (["--warmup_teacher_temp_epochs", "3"], "longer than the run of --epochs 2"),
    (["--output_dir", "{file}/run"], "cannot write to --output_dir"),
    (["--epochs", "0", "--warmup_epochs", "0"], "--epochs is 0"),
    (["--global_crops_scale", "0.5", "0.25"], "--global_crops_scale"),
    (["--use_fp16", "maybe"], "'maybe' is neither"),
    (["--out_dim", "63", "--output_dir", "{resumed}"], "does not fit this run's options")])
def test_bad_input_is_one_line_and_status_2(image_folder, two_epochs, tmp_path, capsys, monkeypatch, words, says):
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow" / "class").mkdir(parents=True)
    (tmp_path / "file").write_text("in the way")
    places = {name: tmp_path / name for name in ("empty", "hollow", "file")} | {"resumed": two_epochs}
    words = [word.format(**places) for word in words]
    monkeypatch.setattr("sys.argv", ["main_selfpatch.py", *SMALL, "--epochs", "2", "--data_path", str(image_folder),
                                     "--output_dir", str(tmp_path / "out"), *words])
    monkeypatch.setattr(main_selfpatch, "train_one_epoch", lambda *_: pytest.fail("training began"))
    with pytest.raises(SystemExit) as stop:
        main_selfpatch.main()
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and says in err


def test_unreadable_image_is_named(image_folder, tmp_path, monkeypatch):
    shutil.copytree(image_folder, tmp_path / "data")
    damaged = tmp_path / "data" / "class0" / "00.jpg"
    damaged.write_bytes(damaged.read_bytes()[:200])
    monkeypatch.setattr("sys.argv", ["main_selfpatch.py", *SMALL, "--epochs", "1", "--num_workers", "1", "--data_path",
                                     str(tmp_path / "data"), "--output_dir", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        main_selfpatch.main()
    assert str(damaged) in stop.value.code and "\n" not in stop.value.code
