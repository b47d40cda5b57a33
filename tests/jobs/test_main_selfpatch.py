"""The job as a user runs it: the files it writes, DINO as the special case, other options, bad images."""
import gc
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from networks import assert_same, shrink_job
from small_job import SMALL, end_of_job, load, options

import main_selfpatch
from main_selfpatch import train_dino
from selfpatch.data.augmentations import DataAugmentationDINO
from selfpatch.distributed.processes import Process
from selfpatch.errors import run_main
from selfpatch.method.fused_loss import FusedDINOLoss
from selfpatch.method.losses import DINOLoss
from selfpatch.pretraining import loop, resuming

pytestmark = [pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning"),
              pytest.mark.usefixtures("small_network")]


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


def test_patch_loss_weight_0_is_dino(image_folder, tmp_path, monkeypatch):
    """The teacher sees the two global crops, its centre is theirs, and no patch is matched or projected."""
    monkeypatch.setattr("selfpatch.method.selfpatch_head.positive_matching", lambda *_: pytest.fail("matched patches"))
    monkeypatch.setattr(FusedDINOLoss, "patch_loss", lambda *_: pytest.fail("patch loss"))
    means, batch_means = [], FusedDINOLoss.batch_means

    def recorded(self, teacher):
        assert len(teacher.image.z) == 2 * 4  # two views of four images
        means.append(batch_means(self, teacher)[0])
        return [means[-1]]

    monkeypatch.setattr(FusedDINOLoss, "batch_means", recorded)
    train_dino(options("--epochs", 1, "--data_path", image_folder, "--output_dir", tmp_path, "--patch_loss_weight", 0,
                       "--local_crops_number", 2, "--local_crops_size", 32))  # 2×2 patches: no matter without matching
    assert len(means) == 3
    state = load(tmp_path / "checkpoint.pth")
    center = torch.zeros(1, 1, 64)
    for mean in means:
        center = 0.9 * center + 0.1 * mean
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


@pytest.mark.long
@pytest.mark.parametrize("extra", [(), ("--pack_crops", "on", "--checkpoint_activations", "mlp")], ids=["", "packed"])
def test_compiled_run_is_the_plain_run(image_folder, tmp_path, monkeypatch, extra):
    """The same names in the checkpoint and, to rounding, the same weights; test_train_step.py has the real compiler."""
    shrink_job(monkeypatch, depth=1)
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compile_(*args, **kwargs, backend="aot_eager"))
    words = ["--epochs", 1, "--data_path", image_folder, "--optimizer", "sgd", "--drop_path_rate", 0]
    for way in ("on", "off"):
        train_dino(options(*words, "--compile", way, "--output_dir", tmp_path / way, *(extra if way == "on" else ())))
    ours, expected = (load(tmp_path / way / "checkpoint.pth") for way in ("on", "off"))
    for part in ("student", "teacher", "dino_loss"):
        assert ours[part].keys() == expected[part].keys()
        for name, value in expected[part].items():
            torch.testing.assert_close(ours[part][name], value, rtol=1e-4, atol=1e-5)


def test_garbage_is_collected_at_the_same_steps_of_all_ranks(monkeypatch):
    """And, whatever ends the training, as usual after it."""
    steps, run = [], SimpleNamespace(step=0)
    monkeypatch.setattr(loop.gc, "collect", lambda: steps.append(run.step))
    training = loop.TrainingLoop(run, None, None, None, {}, SimpleNamespace(agree=lambda: 0))
    with pytest.raises(KeyboardInterrupt), loop.rare_collection():
        assert not gc.isenabled() and gc.get_freeze_count() > 1000
        for run.step in range(1, 301):
            training.after_step(None)
        raise KeyboardInterrupt
    assert steps == [0, 100, 200, 300]
    assert gc.isenabled() and not gc.get_freeze_count()


def test_small_batches_make_one_step(image_folder, tmp_path, capsys):
    """Steps and rates count the images of a whole step."""
    train_dino(options("--epochs", 1, "--data_path", image_folder, "--output_dir", tmp_path, "--batch_size_per_gpu", 3,
                       "--accum_steps", 2, "--checkpoint_activations", "--log_every", 1))
    out = capsys.readouterr().out
    assert "1 × 3 × 2 images per step" in out and "step 2/2" in out
    assert load(tmp_path / "checkpoint.pth")["optimizer"]["state"][0]["step"] == 2


def test_schedules_over_a_run():
    args = options("--epochs", 10, "--warmup_epochs", 2, "--lr", 0.004, "--batch_size_per_gpu", 16, "--accum_steps", 2)
    assert main_selfpatch.images_per_step(args, world_size=8) == 256
    run = main_selfpatch.build_run(args, Process(), steps_per_epoch=50)
    lr, weight_decay, momentum = run.schedules.lr, run.schedules.weight_decay, run.schedules.momentum
    assert max(map(lr, range(500))) == lr(99) == lr(100) == pytest.approx(0.004 * 32 / 256)
    assert lr(0) == 0 and lr(499) == pytest.approx(1e-6, rel=0.1)
    assert (weight_decay(0), weight_decay(499)) == pytest.approx((0.04, 0.4), rel=1e-4)
    assert (momentum(0), momentum(499)) == pytest.approx((0.996, 1), abs=1e-6)


def test_seeds_of_a_run(image_folder, tmp_path, monkeypatch):
    seeds = []
    for module in (main_selfpatch, resuming):
        monkeypatch.setattr(module, "fix_random_seeds", lambda *seed: seeds.append(seed))
    train_dino(options("--epochs", 2, "--data_path", image_folder, "--output_dir", tmp_path, "--seed", 7))
    assert seeds == [(7,), (7, 0, 0), (7, 0, 1)]  # weights, then stochastic depth by rank and epoch
    words = ["--seed", 7, "--data_path", image_folder]
    assert main_selfpatch.build_loader(options(*words), Process(), False).sampler.seed == 7  # order and crops


@pytest.mark.parametrize("augment", ["pil", "device"])
def test_unreadable_images_end_the_run_or_are_replaced(image_folder, tmp_path, monkeypatch, capsys, augment):
    shutil.copytree(image_folder, tmp_path / "data")
    damaged = tmp_path / "data" / "class0" / "00.jpg"
    damaged.write_bytes(damaged.read_bytes()[:200])
    monkeypatch.setattr("sys.argv", ["main_selfpatch.py", *SMALL, "--epochs", "1", "--num_workers", "1", "--data_path",
                                     str(tmp_path / "data"), "--output_dir", str(tmp_path / "out"),
                                     "--augment", augment])
    with pytest.raises(SystemExit) as stop:
        run_main(main_selfpatch.main)
    err = capsys.readouterr().err
    assert stop.value.code == 1 and err.count("\n") == 1
    assert err.startswith(f"main_selfpatch.py: error: cannot read the image {damaged}")
    assert "1 of 12 images, which is more than --max_bad_images 0.001" in err
    (tmp_path / "data" / "class1" / "photo.heic").touch()
    train_dino(options("--epochs", 1, "--data_path", tmp_path / "data", "--output_dir", tmp_path / "out", "--augment",
                       augment, "--max_bad_images", 0.1))
    out = capsys.readouterr().out
    assert "\nnot read: 1 .heic (only .jpg" in out and "1 of 12 images cannot be read, see" in out
    assert (tmp_path / "out" / "bad_images.txt").read_text().startswith(f"cannot read the image {damaged}")


@pytest.mark.parametrize("error", [
    RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
                 "RuntimeError: unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device"
                 " (28)\n"),
    RuntimeError("unable to write to file </torch_18692_1954506624>: No space left on device (28)"),
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers "
                 "are out of shared memory. Please try to raise your shared memory limit."),
    OSError(28, "No space left on device")])  # from a semaphore
def test_full_shared_memory_is_one_line(image_folder, tmp_path, monkeypatch, capsys, error):
    class FullLoader(main_selfpatch.CropLoader):
        def __iter__(self):
            raise error

    monkeypatch.setattr(main_selfpatch, "CropLoader", FullLoader)
    status, err = end_of_job(monkeypatch, capsys, image_folder, tmp_path)
    assert status == 1 and err.count("\n") == 1
    assert "out of shared memory (/dev/shm): lower --num_workers" in err and "docker run --shm-size" in err


@pytest.mark.parametrize("error", [OSError(28, "No space left on device", "cache"), RuntimeError("CUDA error")])
def test_other_errors_are_not_taken_for_shared_memory(image_folder, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(loop, "train_one_epoch", fail)
    with pytest.raises(type(error)) as caught:
        train_dino(options("--epochs", 1, "--data_path", image_folder, "--output_dir", tmp_path))
    assert caught.value is error


def torch_save_on_full_disk(state, file):
    try:
        raise OSError(28, "No space left on device")
    finally:
        raise RuntimeError("unexpected pos 768 vs 662")


def save_on_full_disk(state, file):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("torch_save", [torch_save_on_full_disk, save_on_full_disk])
def test_full_disk_is_one_line_and_the_good_file_stays(image_folder, two_epochs, tmp_path, monkeypatch, capsys,
                                                       torch_save):
    good = shutil.copy(two_epochs / "checkpoint0000.pth", tmp_path / "checkpoint.pth")
    before = good.read_bytes()
    monkeypatch.setattr(torch, "save", torch_save)
    status, err = end_of_job(monkeypatch, capsys, image_folder, tmp_path, "--epochs", "2")
    assert status in (1, 2) and err.count("\n") == 1
    assert str(good) in err and "No space left on device" in err
    assert good.read_bytes() == before and sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint.pth", "checkpoint0000.pth", "log.txt", "steps.jsonl"]  # the copy was due when the run was killed
