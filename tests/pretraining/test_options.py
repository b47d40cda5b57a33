"""The options: published names and defaults, what auto means on which device, and what is refused."""
import multiprocessing
from pathlib import Path

import pytest
import torch
from small_job import SMALL, options

import demo
import main_selfpatch
import run_with_submitit
from main_selfpatch import get_args_parser, train_dino
from selfpatch.data.dataset import build_dataset
from selfpatch.data.loader import CropLoader
from selfpatch.errors import ConfigError, run_main, user_path
from selfpatch.method.fused_loss import FusedDINOLoss
from selfpatch.method.losses import DINOLoss
from selfpatch.pretraining import loop
from selfpatch.pretraining.options import small_grid_warning

pytestmark = [pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning"),
              pytest.mark.usefixtures("small_network")]


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
        "dist_timeout": 30, "save_every_minutes": 15, "save_every_steps": 0, "loader_timeout": 600,
        "allow_changed": [], "knn_data": "", "knn_val_labels": "", "knn_every": 10,
        "patch_loss_weight": 0.1, "drop_path_rate": 0.1, "global_crops_size": 224, "local_crops_size": 96,
        "log_every": 10, "device": "auto", "precision": "auto", "log_with": [], "tensorboard": False,
        "peak_tflops": 0,
        "accum_steps": 1, "compile": "auto", "checkpoint_activations": "", "augment": "auto", "fused_loss": "auto",
        "max_bad_images": 0.001, "init_weights": "", "freeze_backbone_epochs": 0, "layer_decay": 1.0,
        "head_hidden_dim": 2048, "pack_crops": "auto", "reduce_dtype": "fp32", "image_suffix": [], "image_column": ""}


def test_published_command_and_launchers_options():
    words = ("--arch vit_small --data_path /path/to/imagenet/train --output_dir /path/to/saving_dir --epoch 200 "
             "--local_crops_number 8 --patch_size 16 --batch_size_per_gpu 128 --out_dim_selfpatch 4096 --k_num 4")
    args = get_args_parser().parse_args(words.split())
    assert (args.epochs, args.arch, args.out_dim_selfpatch) == (200, "vit_small", 4096)
    for spelling in ("--local-rank=3", "--local_rank=3"):
        assert get_args_parser().parse_args([spelling]).local_rank == 3
    assert get_args_parser().parse_args(["--use_fp16", "off"]).use_fp16 is False


def test_home_folder_in_path_options(monkeypatch):
    """A shell expands ~ at the start of a word, not behind the equals sign."""
    monkeypatch.setenv("HOME", "/home/someone")
    args = get_args_parser().parse_args(["--output_dir=~/runs/one", "--data_path", "~/images"])
    assert (args.output_dir, args.data_path) == ("/home/someone/runs/one", "/home/someone/images")
    assert user_path("~/x") == Path("/home/someone/x") and user_path("a~/x") == Path("a~/x")
    folders = []
    monkeypatch.setattr("sys.argv", ["demo.py", "--output_dir=~/demo"])
    monkeypatch.setattr(demo, "show", lambda folder, *_: folders.append(folder))
    assert demo.main() == 0 and folders == [Path("/home/someone/demo")]
    monkeypatch.setattr("sys.argv", ["run_with_submitit.py", "--output_dir=~/runs/two"])
    assert run_with_submitit.get_args().output_dir == "/home/someone/runs/two"


@pytest.mark.parametrize("way, device, triton, capability, on", [
    ("auto", "cuda", True, (8, 0), True), ("auto", "cuda", True, (6, 1), False), ("auto", "cuda", False, (8, 0), False),
    ("auto", "cpu", True, None, False), ("off", "cuda", True, (8, 0), False), ("on", "cpu", False, None, True)])
def test_where_to_compile(monkeypatch, capsys, way, device, triton, capability, on):
    monkeypatch.setattr("selfpatch.pretraining.auto_options.is_installed", lambda name: triton)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert main_selfpatch.choose_compile(way, torch.device(device)) is on
    output = capsys.readouterr().out
    assert ("not compiled" in output) == (way == "auto" and device == "cuda" and not on)
    assert ("pip install triton" in output) == (not triton and way == "auto")


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune"])
def test_the_compilers_modes_are_for_cuda(monkeypatch, mode):
    with pytest.raises(ConfigError, match=f"--compile {mode} is for CUDA, and the device is cpu"):
        main_selfpatch.choose_compile(mode, torch.device("cpu"))
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("selfpatch.pretraining.auto_options.is_installed", lambda name: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert main_selfpatch.choose_compile(mode, torch.device("cuda"))
    assert main_selfpatch.compile_mode(mode) == mode and main_selfpatch.compile_mode("on") is None
    assert main_selfpatch.uses_cuda_graphs(mode) == (mode != "max-autotune-no-cudagraphs")


def test_compiling_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ConfigError, match="--compile on: there is no C\\+\\+ compiler"):
        main_selfpatch.choose_compile("on", torch.device("cpu"))


@pytest.mark.parametrize("device, has_bf16, words, dtype", [
    ("cuda", True, [], torch.bfloat16), ("cuda", False, [], torch.float16),
    ("cuda", True, ["--use_fp16", "false"], torch.float32), ("cpu", True, [], torch.float32),
    ("cpu", False, ["--precision", "bf16"], torch.bfloat16), ("cuda", True, ["--precision", "fp32"], torch.float32)])
def test_precision_by_device(monkeypatch, device, has_bf16, words, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0) if has_bf16 else (7, 5))
    args = options(*words)
    assert main_selfpatch.choose_precision(args.precision, args.use_fp16, torch.device(device)) == dtype


@pytest.mark.parametrize("words, says", [
    (["--data_path", "nowhere"], "no folder nowhere"),
    (["--data_path", "{empty}"], "has no images in it: files ending in .jpg"),
    (["--data_path", "{hollow}"], "no images"),
    (["--arch", "resnet50"], "invalid choice: 'resnet50'"),
    (["--k_num", "9"], "argument --k_num: it is 9, and must be "),
    (["--k_num", "0"], "argument --k_num: it is 0, and must be "),
    (["--global_crops_size", "50"], "not a multiple of --patch_size 16: try 48"),
    (["--local_crops_size", "40"], "not a multiple of --patch_size 16"),
    (["--local_crops_size", "32"], "under 3 patches a side"),
    (["--batch_size_per_gpu", "13"], "12 images, fewer than the 13"),
    (["--accum_steps", "4"], "12 images, fewer than the 16 of one step (4 × 4 small batches"),
    (["--warmup_epochs", "3"], "longer than the run of --epochs 2"),
    (["--warmup_teacher_temp_epochs", "3"], "longer than the run of --epochs 2"),
    (["--output_dir", "{file}/run"], "cannot write to --output_dir"),
    (["--epochs", "0", "--warmup_epochs", "0"], "argument --epochs: it is 0, and must be "),
    (["--global_crops_scale", "0.5", "0.25"], "--global_crops_scale"),
    (["--use_fp16", "maybe"], "'maybe' is neither"),
    (["--seed", "-1"], "argument --seed: it is -1, and must be "),
    (["--dist_timeout", "0"], "argument --dist_timeout: it is 0.0, and must be "),
    (["--dist_timeout", "inf"], "argument --dist_timeout: it is inf, and must be "),
    (["--lr", "nan"], "argument --lr: it is nan, and must be "),
    (["--teacher_temp", "0"], "argument --teacher_temp: it is 0.0, and must be "),
    (["--init_weights", "nowhere.pth"], "there is no file nowhere.pth: give --init_weights"),
    (["--freeze_backbone_epochs", "-1"], "argument --freeze_backbone_epochs: it is -1, and must be "),
    (["--layer_decay", "0"], "argument --layer_decay: it is 0.0, and must be "),
    (["--layer_decay", "1.5"], "argument --layer_decay: it is 1.5, and must be "),
    (["--layer_decay", "nan"], "argument --layer_decay: it is nan, and must be "),
    (["--layer_decay", "0.5", "--output_dir", "{resumed}"], "2 groups of parameters, not 1"),
    (["--peak_tflops", "-1"], "--peak_tflops: it is -1.0, and must be at least 0 and finite"),
    (["--peak_tflops", "nan"], "--peak_tflops: it is nan, and must be at least 0"),
    (["--knn_val_labels", "x"], "--knn_val_labels x: goes with --knn_data"),
    (["--knn_every", "0"], "--knn_every: it is 0, and must be at least 1"),
    (["--port", "65536"], "--port: it is 65536, and must be at most 65535"),
    (["--drop_path_rate", "1"], "argument --drop_path_rate: it is 1.0, and must be "),
    (["--optimizer", "sgd", "--output_dir", "{resumed}"], "another kind of optimizer, one with betas"),
    (["--out_dim", "63", "--output_dir", "{resumed}"], "another run: --out_dim 63 (there 64)")])
def test_bad_input_is_one_line_and_status_2(image_folder, two_epochs, tmp_path, capsys, monkeypatch, words, says):
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow" / "class").mkdir(parents=True)
    (tmp_path / "file").write_text("in the way")
    places = {name: tmp_path / name for name in ("empty", "hollow", "file")} | {"resumed": two_epochs}
    words = [word.format(**places) for word in words]
    monkeypatch.setattr("sys.argv", ["main_selfpatch.py", *SMALL, "--epochs", "2", "--data_path", str(image_folder),
                                     "--output_dir", str(tmp_path / "out"), *words])
    monkeypatch.setattr(loop, "train_one_epoch", lambda *_: pytest.fail("training began"))
    with pytest.raises(SystemExit) as stop:
        run_main(main_selfpatch.main)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and says in err


@pytest.mark.parametrize("name, value, says", [
    ("seed", -1, "--seed is -1: it must be at least 0 and at most 9223372036854775807"), ("k_num", 9, "--k_num is 9"),
    ("lr", float("nan"), "--lr is nan"), ("layer_decay", 0.0, "--layer_decay is 0.0: it must be above 0 and at most 1"),
    ("local_crops_size", 40, "not a multiple of --patch_size 16"),
    ("arch", "nope", "--arch is 'nope': it must be one of vit_pico, vit_tiny"), ("arch", None, "--arch is None: it"),
    ("epochs", "3", "--epochs is '3': it must be of type int, at least 1"), ("epochs", 3.0, "--epochs is 3.0: it"),
    ("seed", None, "--seed is None: it must be of type int"), ("seed", True, "--seed is True: it must be no bool"),
    ("norm_last_layer", "true", "--norm_last_layer is 'true': it must be True or False"),
    ("output_dir", None, "--output_dir is None: it must be text"), ("log_with", ["mine"], "--log_with is 'mine': it"),
    ("global_crops_scale", ("0.2", 1), "--global_crops_scale is '0.2': it must be a number"),
    ("global_crops_scale", 0.5, "--global_crops_scale is 0.5: it must be 2 values"),
    ("global_crops_scale", (0.5,), "--global_crops_scale is .0.5,.: it must be 2 values")])
def test_a_namespace_made_by_hand_is_checked_too(image_folder, tmp_path, name, value, says):
    args = options("--data_path", image_folder, "--output_dir", tmp_path)
    setattr(args, name, value)
    with pytest.raises(ConfigError, match=says):
        main_selfpatch.train_dino(args)
    delattr(args, name)
    with pytest.raises(ConfigError, match=f"the options lack {name}: take them from get_args_parser"):
        main_selfpatch.train_dino(args)
    assert not list(tmp_path.iterdir())


def test_a_daemonic_process_may_not_start_workers(image_folder, tmp_path, monkeypatch):
    """Such as those of multiprocessing.Pool, in a sweep."""
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    args = options("--data_path", image_folder, "--output_dir", tmp_path / "out", "--num_workers", 2)
    with pytest.raises(ConfigError, match="--num_workers 2: this process is daemonic.* give --num_workers 0"):
        main_selfpatch.train_dino(args)
    with pytest.raises(ConfigError, match="--num_workers 1: this process is daemonic"):
        CropLoader(build_dataset(image_folder), 2, num_workers=1)
    assert not (tmp_path / "out").exists() and len(CropLoader(build_dataset(image_folder), 2)) == 6


def make_obstacle(path, kind):
    if kind == "folder":
        path.mkdir()
    elif kind == "broken link":
        path.symlink_to(path.parent / "gone" / "file")
    else:
        path.write_bytes(b"\x89PNG\r\n\x1a\n\0\xff")


@pytest.mark.parametrize("name, kind, says", [
    ("log.txt", "folder", "is a folder"), ("log.txt", "broken link", "is a broken link"),
    ("log.txt", "bytes", "it is not text"), ("tensorboard", "bytes", "is not a folder"),
    ("tensorboard", "broken link", "is not a folder"), ("checkpoint.pth", "folder", "is a folder"),
    ("checkpoint.pth", "broken link", "is a broken link")])
def test_what_is_in_the_way_of_a_run_is_named_at_the_start(image_folder, tmp_path, capsys, monkeypatch, name, kind,
                                                           says):
    make_obstacle(tmp_path / name, kind)
    monkeypatch.setattr("sys.argv", ["main_selfpatch.py", *SMALL, "--data_path", str(image_folder), "--tensorboard",
                                     f"--output_dir={tmp_path}"])
    monkeypatch.setattr(main_selfpatch, "init_distributed_mode", lambda *_: pytest.fail("the job began"))
    with pytest.raises(SystemExit) as stop:
        run_main(main_selfpatch.main)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    assert err.startswith(f"main_selfpatch.py: error: {tmp_path / name} ") and says in err
    assert [path.name for path in tmp_path.iterdir()] == [name]


class Variant(DINOLoss):
    """A loss of the user's own."""


@pytest.mark.parametrize("fused_loss, loss_class, expected", [
    ("auto", None, FusedDINOLoss), ("on", None, FusedDINOLoss), ("off", None, DINOLoss), ("auto", Variant, Variant),
    ("off", Variant, Variant)])
def test_which_loss(fused_loss, loss_class, expected):
    assert main_selfpatch.choose_loss(fused_loss, loss_class) is expected


def test_a_loss_of_ones_own_has_no_fused_form():
    with pytest.raises(ConfigError, match="--fused_loss on: Variant has no fused form"):
        main_selfpatch.choose_loss("on", Variant)


def test_small_grids_are_a_warning():
    assert small_grid_warning({"global_crops_size": 224, "local_crops_size": 96}, 16) == ""
    assert small_grid_warning({"global_crops_size": 40}, 8) == ""
    assert small_grid_warning({"global_crops_size": 224, "local_crops_size": 48}, 16).startswith(
        "warning: --local_crops_size 48 gives 3×3 patches, where a patch's 8 neighbours (the grid wraps around) are "
        "100% of the other patches: ")
    both = small_grid_warning({"global_crops_size": 32, "local_crops_size": 24}, 8)
    assert both.endswith("For 5×5 patches give --global_crops_size 40 and --local_crops_size 40, or a smaller "
                         "--patch_size")


def test_a_run_with_small_grids_begins_with_the_warning(image_folder, tmp_path, capsys, small_network):
    words = ["--epochs", 1, "--data_path", image_folder, "--output_dir"]
    train_dino(options(*words, tmp_path / "selfpatch"))
    assert capsys.readouterr().out.count("warning: --global_crops_size 48 gives 3×3") == 1
    train_dino(options(*words, tmp_path / "dino", "--patch_loss_weight", 0))
    assert "warning" not in capsys.readouterr().out
