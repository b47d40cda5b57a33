"""The job as a user runs it: files it writes, resuming, DINO as the special case, and what it refuses."""
import argparse
import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch

import engine
import main_selfpatch
import utils
from augmentations import DataAugmentationDINO
from engine import health_warnings
from losses import DINOLoss, Losses
from main_selfpatch import get_args_parser, train_dino
from vision_transformer import ARCHS, DINOHead, VisionTransformer

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
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
        "log_every": 10, "device": "auto", "precision": "auto", "tensorboard": False,
        "accum_steps": 1, "compile": "auto", "checkpoint_activations": False, "augment": "auto"}


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


@pytest.mark.parametrize("workers, augment", [(0, "auto"), (1, "device"), (1, "pil")])
def test_one_epoch_resumed_equals_two(image_folder, two_epochs, tmp_path, workers, augment, capsys):
    """Stochastic depth, crops and order of images come out as in the run that was never interrupted."""
    whole, words = two_epochs, ["--data_path", image_folder, "--num_workers", workers, "--augment", augment]
    if workers:
        whole = tmp_path / "whole"
        train_dino(options("--epochs", 2, "--output_dir", whole, *words))
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copy(whole / "checkpoint0000.pth", resumed / "checkpoint.pth")
    first_line = (whole / "log.txt").read_text().splitlines()[0]
    (resumed / "log.txt").write_text(first_line + '\n{"train_lo')  # killed while it wrote the second
    torch.manual_seed(1234)  # whatever has been drawn since must not matter
    train_dino(options("--epochs", 2, "--output_dir", resumed, *words))
    assert "going on after epoch 0" in capsys.readouterr().out
    ours, other = load(resumed / "checkpoint.pth"), load(whole / "checkpoint.pth")
    del ours["args"], other["args"]  # they name the folders
    assert_same(ours, other)
    lines = (resumed / "log.txt").read_text().splitlines()
    assert lines[::2] == (whole / "log.txt").read_text().splitlines()


def test_finished_run_is_left_alone(image_folder, two_epochs, tmp_path):
    shutil.copytree(two_epochs, tmp_path / "copy")
    before = (tmp_path / "copy" / "checkpoint.pth").read_bytes()
    train_dino(options("--epochs", 2, "--data_path", image_folder, "--output_dir", tmp_path / "copy"))
    assert (tmp_path / "copy" / "checkpoint.pth").read_bytes() == before
    assert len((tmp_path / "copy" / "log.txt").read_text().splitlines()) == 2


def test_published_checkpoint_is_taken_up(image_folder, two_epochs, tmp_path):
    """args as a Namespace, the student's keys with DDP's prefix, numpy rates, an optimizer that was not fused."""
    state = load(two_epochs / "checkpoint0000.pth")
    for group in state["optimizer"]["param_groups"]:
        group["lr"] = np.float64(group["lr"])
        del group["fused"]
    del state["fp16_scaler"]
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
        teacher.register_forward_hook(lambda _, inputs, output: seen.append((len(inputs[0]), output[0].dense())))
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
                                   ["--precision", "fp16", "--epochs", "6"],  # the scaler skips its first steps
                                   ["--patch_size", "8", "--global_crops_size", "40", "--local_crops_size", "24"]])
def test_other_options_train(image_folder, tmp_path, words):
    train_dino(options("--epochs", 1, "--data_path", image_folder, "--output_dir", tmp_path, *words))
    row = json.loads((tmp_path / "log.txt").read_text().splitlines()[-1])
    assert 0 < row["train_loss"] < 10
    student, teacher = (load(tmp_path / "checkpoint.pth")[who] for who in ("student", "teacher"))
    moved = [k for k in student if not torch.equal(student[k], teacher[k])]
    assert any(k.startswith("backbone") for k in moved) and any(k.startswith("p_head") for k in moved)


def test_compiled_run_is_the_plain_run(image_folder, tmp_path, monkeypatch):
    """The same names in the checkpoint and, to rounding, the same weights; test_train_step.py has the real compiler."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compile_(*args, **kwargs, backend="aot_eager"))
    words = ["--epochs", 1, "--data_path", image_folder, "--optimizer", "sgd", "--drop_path_rate", 0]
    for way in ("on", "off"):
        train_dino(options(*words, "--compile", way, "--output_dir", tmp_path / way))
    ours, expected = (load(tmp_path / way / "checkpoint.pth") for way in ("on", "off"))
    for part in ("student", "teacher", "dino_loss"):
        assert ours[part].keys() == expected[part].keys()
        for name, value in expected[part].items():
            torch.testing.assert_close(ours[part][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way, device, triton, capability, on", [
    ("auto", "cuda", True, (8, 0), True), ("auto", "cuda", True, (6, 1), False), ("auto", "cuda", False, (8, 0), False),
    ("auto", "cpu", True, None, False), ("off", "cuda", True, (8, 0), False), ("on", "cpu", False, None, True)])
def test_where_to_compile(monkeypatch, capsys, way, device, triton, capability, on):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: triton or None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    args = options("--compile", way)
    args.device = torch.device(device)
    assert main_selfpatch.compiles(args) is on
    assert ("not compiled" in capsys.readouterr().out) == (way == "auto" and device == "cuda" and not on)


def test_compiling_without_a_compiler_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("shutil.which", lambda name: None)
    args = options("--compile", "on")
    args.device = torch.device("cpu")
    with pytest.raises(SystemExit) as stop:
        main_selfpatch.compiles(args)
    assert stop.value.code == 2 and "--compile on: there is no C++ compiler" in capsys.readouterr().err


def test_small_batches_make_one_step(image_folder, tmp_path, capsys):
    """Steps, rates and the announcement go by the images of a whole step."""
    train_dino(options("--epochs", 1, "--data_path", image_folder, "--output_dir", tmp_path, "--batch_size_per_gpu", 3,
                       "--accum_steps", 2, "--checkpoint_activations", "--log_every", 1))
    out = capsys.readouterr().out
    assert "1 × 3 × 2 images a step" in out and "step 2/2" in out
    assert load(tmp_path / "checkpoint.pth")["optimizer"]["state"][0]["step"] == 2


def test_schedules_over_a_run():
    args = options("--epochs", 10, "--warmup_epochs", 2, "--lr", 0.004, "--batch_size_per_gpu", 16)
    args.world_size = 8
    schedules = main_selfpatch.build_schedules(args, steps=50)
    assert all(len(values) == 500 and type(values[0]) is float for values in schedules.values())
    assert max(schedules["lr"]) == schedules["lr"][99] == pytest.approx(0.004 * 16 * 8 / 256)
    assert schedules["lr"][0] == 0 and schedules["lr"][-1] == pytest.approx(1e-6, rel=0.1)
    assert (schedules["wd"][0], schedules["wd"][-1]) == pytest.approx((0.04, 0.4), rel=1e-4)
    assert (schedules["momentum"][0], schedules["momentum"][-1]) == pytest.approx((0.996, 1), abs=1e-6)


def test_epoch_sets_rates_decay_and_momentum_at_every_step(monkeypatch):
    """lr on both groups, weight decay on the first alone, momentum to the step, by the iteration of the whole run."""
    seen, args = [], options("--epochs", 2)
    args.device, args.world_size = torch.device("cpu"), 1
    optimizer = main_selfpatch.build_optimizer(args, DINOHead(8, 4, hidden_dim=8, bottleneck_dim=4))
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.999)] * 2

    def step(student, teacher, dino_loss, optimizer, batches, epoch, momentum, clip_grad, freeze_last_layer, *_):
        seen.append(([g["lr"] for g in optimizer.param_groups], [g["weight_decay"] for g in optimizer.param_groups],
                     momentum, epoch, clip_grad, freeze_last_layer, [len(crops) for crops in batches]))
        return Losses(*torch.ones(5))

    monkeypatch.setattr(engine, "train_step", step)
    schedules = {"lr": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], "wd": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
                 "momentum": [0.91, 0.92, 0.93, 0.94, 0.95, 0.96]}
    loader = [[torch.zeros(1, 3, 4, 4)] * 3] * 3
    stats = main_selfpatch.train_one_epoch(None, None, None, loader, optimizer, schedules, 1, None, None, args)
    assert seen == [([lr, lr], [wd, 0.0], m, 1, 3.0, 1, [3]) for lr, wd, m in ((0.4, 4.0, 0.94), (0.5, 5.0, 0.95),
                                                                            (0.6, 6.0, 0.96))]
    assert (stats["lr"], stats["wd"], stats["loss"]) == (0.6, 6.0, 1.0)


def test_each_rank_and_epoch_draws_its_own_crops(image_folder, tmp_path, monkeypatch):
    seeds = []
    monkeypatch.setattr(utils, "fix_random_seeds", lambda *seed: seeds.append(seed))
    train_dino(options("--epochs", 2, "--data_path", image_folder, "--output_dir", tmp_path, "--seed", 7))
    assert seeds == [(7,), (7, 0, 0), (7, 0, 1)]


def test_nan_is_found_however_seldom_the_log_is_read():
    logger = utils.MetricLogger(window=50)
    for step in range(50):
        logger.update(total=torch.tensor(float("nan") if step == 3 else 1.0))
    logger.read()
    with pytest.raises(SystemExit, match="step 103 of epoch 2"):
        engine.stop_if_not_finite(logger, epoch=2, step=149, steps=200)


def test_loss_that_is_not_finite_stops_and_names_the_step(image_folder, tmp_path, monkeypatch):
    step, count = engine.train_step, iter(range(100))

    def poisoned(*args, **kwargs):
        losses = step(*args, **kwargs)
        return losses._replace(total=losses.total * float("nan")) if next(count) == 4 else losses

    monkeypatch.setattr(engine, "train_step", poisoned)
    with pytest.raises(SystemExit) as stop:
        train_dino(options("--epochs", 3, "--data_path", image_folder, "--output_dir", tmp_path))
    assert "step 1 of epoch 1 (iteration 4)" in stop.value.code  # a message is exit status 1
    assert load(tmp_path / "checkpoint.pth")["epoch"] == 1


def test_warnings_in_words():
    args = options("--epochs", 20, "--warmup_epochs", 10, "--batch_size_per_gpu", 8)
    good = {"clsloss": 3.0, "patchloss": 2.5, "cls_entropy": 3.0, "patch_entropy": 2.0}
    assert health_warnings(good, 15, args) == []
    stuck = good | {"clsloss": 4.16}  # ln 64 = 4.159
    assert health_warnings(stuck, 5, args) == []
    assert "image loss 4.1600 sits on ln K = 4.1589" in health_warnings(stuck, 15, args)[0]
    collapsed = health_warnings(good | {"patch_entropy": 1e-3}, 5, args)
    assert len(collapsed) == 1 and "every patch the same prototype" in collapsed[0]
    args.batch_size_per_gpu = 1  # so few may well be alike
    assert health_warnings(good | {"patch_entropy": 1e-3}, 5, args) == []


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
    (["--accum_steps", "4"], "12 images, fewer than the 16 of one step (4 × 4 small batches"),
    (["--warmup_epochs", "3"], "longer than the run of --epochs 2"),
    (["--warmup_teacher_temp_epochs", "3"], "longer than the run of --epochs 2"),
    (["--output_dir", "{file}/run"], "cannot write to --output_dir"),
    (["--epochs", "0", "--warmup_epochs", "0"], "--epochs is 0"),
    (["--global_crops_scale", "0.5", "0.25"], "--global_crops_scale"),
    (["--use_fp16", "maybe"], "'maybe' is neither"),
    (["--seed", "-1"], "--seed is -1"),
    (["--lr", "nan"], "--lr is nan"),
    (["--teacher_temp", "0"], "--teacher_temp is 0.0"),
    (["--drop_path_rate", "1"], "--drop_path_rate is 1.0"),
    (["--optimizer", "sgd", "--output_dir", "{resumed}"], "another kind of optimizer, one with betas"),
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


@pytest.mark.parametrize("augment", ["pil", "device"])
def test_unreadable_image_is_named(image_folder, tmp_path, monkeypatch, augment):
    shutil.copytree(image_folder, tmp_path / "data")
    damaged = tmp_path / "data" / "class0" / "00.jpg"
    damaged.write_bytes(damaged.read_bytes()[:200])
    monkeypatch.setattr("sys.argv", ["main_selfpatch.py", *SMALL, "--epochs", "1", "--num_workers", "1", "--data_path",
                                     str(tmp_path / "data"), "--output_dir", str(tmp_path / "out"),
                                     "--augment", augment])
    with pytest.raises(SystemExit) as stop:
        main_selfpatch.main()
    assert stop.value.code.startswith(f"main_selfpatch.py: error: cannot read the image {damaged}")
    assert "\n" not in stop.value.code


def test_half_precision_goes_on_from_float32(image_folder, two_epochs, tmp_path):
    """An empty scaler state, and one that is there the next time."""
    shutil.copy(two_epochs / "checkpoint0000.pth", tmp_path / "checkpoint.pth")
    words = ["--epochs", 3, "--data_path", image_folder, "--output_dir", tmp_path, "--precision", "fp16"]
    train_dino(options(*words))
    state = load(tmp_path / "checkpoint0001.pth")
    assert state["fp16_scaler"]["scale"] > 0
    torch.save(state | {"fp16_scaler": state["fp16_scaler"] | {"scale": 8.0}}, tmp_path / "checkpoint.pth")
    train_dino(options(*words))
    assert load(tmp_path / "checkpoint.pth")["fp16_scaler"]["scale"] == 8.0


def test_weights_that_are_not_finite_are_not_saved(image_folder, two_epochs, tmp_path, monkeypatch):
    shutil.copy(two_epochs / "checkpoint0000.pth", tmp_path / "checkpoint.pth")
    epoch = main_selfpatch.train_one_epoch

    def spoiled(student, *args):
        stats = epoch(student, *args)
        student.backbone.pos_embed.data[0, 0, 0] = float("inf")
        return stats

    monkeypatch.setattr(main_selfpatch, "train_one_epoch", spoiled)
    with pytest.raises(SystemExit, match="weights NaN or infinite"):
        train_dino(options("--epochs", 2, "--data_path", image_folder, "--output_dir", tmp_path))
    assert load(tmp_path / "checkpoint.pth")["epoch"] == 1


@pytest.mark.parametrize("device, has_bf16, words, dtype", [
    ("cuda", True, [], torch.bfloat16), ("cuda", False, [], torch.float16),
    ("cuda", True, ["--use_fp16", "false"], torch.float32), ("cpu", True, [], torch.float32),
    ("cpu", False, ["--precision", "bf16"], torch.bfloat16), ("cuda", True, ["--precision", "fp32"], torch.float32)])
def test_precision_by_device(monkeypatch, device, has_bf16, words, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    args = options(*words)
    args.device = torch.device(device)
    assert main_selfpatch.autocast_dtype(args) == dtype
