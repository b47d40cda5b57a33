"""What detection/ and segmentation/ share: the options of train.py and test.py, weights, resuming, running on a CPU.

train.py and test.py of each folder call train() and test() here; the options are those that people know from
OpenMMLab's tools, and four more: --pretrained, --checkpoint_key, --random_weights and --data-root.
"""
import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from checkpoint_files import CheckpointError, read_checkpoint
from checkpoints import CheckpointInfo, check_fits, read_backbone
from utils import ArgumentParser, fail, is_main_process

try:
    import mmcv.ops  # noqa: F401
    import mmdet  # noqa: F401
    import mmseg  # noqa: F401
    from mmengine.config import Config, ConfigDict, DictAction
    from mmengine.logging import HistoryBuffer
    from mmengine.runner import CheckpointLoader, Runner, find_latest_checkpoint
except ImportError as missing:
    fail(f"OpenMMLab's packages are not all installed ({missing}): run ./install_openmmlab.sh")


def history_method(cls: type, name: str) -> Callable:
    """What stands for getattr in mmengine's files: it may fetch a HistoryBuffer's statistics and nothing else."""
    if cls is not HistoryBuffer or name not in ("min", "max", "current", "mean"):
        raise CheckpointError(f"the file asks for {getattr(cls, '__name__', cls)}.{name}, which no checkpoint needs")
    return getattr(cls, name)


# resuming needs the real histories of the losses, for which checkpoints.py alone has stand-ins
torch.serialization.add_safe_globals([HistoryBuffer, (history_method, "builtins.getattr")])


@CheckpointLoader.register_scheme(prefixes="", force=True)
def load_from_local(filename: str, map_location=None) -> dict:
    """mmengine's reader of local files, for resuming: ours, which never runs what a file carries."""
    return read_checkpoint(filename)


# ----------------------------------------------------------------------------------------------------------------------
# Options


class Changes(DictAction):
    """mmengine's reader of key=value, whose errors are the parser's."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: list[str],
                 option_string: str | None = None) -> None:
        for word in values:
            if "=" not in word:
                parser.error(f"{option_string} {word}: give key=value")
        super().__call__(parser, namespace, values, option_string)


def common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--work-dir", help="folder for logs and checkpoints (default: work_dirs/<name of the config>)")
    parser.add_argument("--data-root", help="folder of the data set, in place of the config's data_root")
    parser.add_argument("--cfg-options", nargs="+", action=Changes, default={}, metavar="key=value",
                        help="change the config: model.backbone.num_heads=8 train_dataloader.batch_size=2 …")
    parser.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none",
                        help="what has started several processes, if anything has")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help="given by torch.distributed.launch")


def get_train_parser(description: str) -> ArgumentParser:
    parser = ArgumentParser(description=description)
    parser.add_argument("config", help="one of configs/*.py")
    parser.add_argument("--pretrained", default="", help="checkpoint of any kind, or a run's folder, for the backbone")
    parser.add_argument("--checkpoint_key", default="teacher", help="network of a training run: teacher or student")
    parser.add_argument("--random_weights", action="store_true", help="start from an untrained backbone, and mean it")
    parser.add_argument("--amp", action="store_true", help="mixed precision, where there is a GPU")
    parser.add_argument("--resume", nargs="?", const="auto",
                        help="go on from this checkpoint, or without one from the latest in --work-dir if there is any")
    common_options(parser)
    return parser


def get_test_parser(description: str) -> ArgumentParser:
    parser = ArgumentParser(description=description)
    parser.add_argument("config", help="one of configs/*.py")
    parser.add_argument("checkpoint", help="what train.py saved, or a released model")
    parser.add_argument("--show-dir", help="draw the predictions over the images into this folder")
    common_options(parser)
    return parser


def read_config(args: argparse.Namespace) -> Config:
    """The config file with the options' changes, fitted to this machine. What is wrong ends the job in one line."""
    if not Path(args.config).is_file():
        fail(f"there is no config {args.config}")
    try:
        cfg = Config.fromfile(args.config)
        cfg.merge_from_dict(args.cfg_options)
    except Exception as error:  # a config is code: it can raise anything
        fail(f"{args.config} cannot be read: {type(error).__name__}: {' '.join(str(error).split())}")
    if args.data_root:
        if not cfg.get("data_root"):
            fail(f"--data-root: {args.config} has no data_root that it could replace")
        replace_strings(cfg, cfg.data_root, args.data_root.rstrip("/") + "/")
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or f"work_dirs/{Path(args.config).stem}"
    cfg.launcher = args.launcher
    if args.launcher == "pytorch":
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    if args.launcher == "pytorch" and "RANK" not in os.environ:
        fail("--launcher pytorch is for processes that torchrun has started: see dist_train.sh and dist_test.sh")
    if not torch.cuda.is_available():
        fit_to_cpu(cfg)
    return cfg


def replace_strings(cfg: ConfigDict | Config | list | tuple, old: str, new: str) -> None:
    """Put new in the place of old where a string of cfg, however deep, is or begins with old."""
    for key, value in cfg.items() if isinstance(cfg, (dict, Config)) else enumerate(cfg):
        if isinstance(value, (dict, list, tuple)):
            replace_strings(value, old, new)
        elif isinstance(value, str) and value.startswith(old) and not isinstance(cfg, tuple):
            cfg[key] = new + value.removeprefix(old)


def fit_to_cpu(cfg: Config) -> None:
    """Put SyncBN and NCCL, which need GPUs, out of a config."""
    replace_strings(cfg.model, "SyncBN", "BN")
    if cfg.launcher != "none":
        if cfg.launcher != "pytorch":
            fail(f"--launcher {cfg.launcher} needs GPUs, and torch sees none: start CPU processes with torchrun and "
                 "--launcher pytorch")
        # mmengine would name a GPU
        cfg.model_wrapper_cfg = {"type": "MMDistributedDataParallel", "device_ids": None, "broadcast_buffers": False}
        dist.init_process_group("gloo")  # mmengine's own way selects a GPU


def choose_precision(cfg: Config, amp: bool) -> None:
    """Mixed precision if amp or the config asks for it and there is a GPU, else float32."""
    if amp:
        cfg.optim_wrapper.type = "AmpOptimWrapper"
    if cfg.optim_wrapper.type == "AmpOptimWrapper" and not torch.cuda.is_available():
        cfg.optim_wrapper.type = "OptimWrapper"
        for option in ("loss_scale", "dtype"):
            cfg.optim_wrapper.pop(option, None)
        if is_main_process():
            print("torch sees no GPU: training in float32, without mixed precision")


def check_data(cfg: Config, loaders: list[str]) -> None:
    """End the job unless the folders and annotation files of these data loaders are there, and not empty."""
    for loader in loaders:
        dataset = (cfg.get(loader) or {}).get("dataset", {})
        while "dataset" in dataset:  # RepeatDataset and the like hold the real one
            dataset = dataset.dataset
        root = dataset.get("data_root") or ""
        wanted = [dataset.get("ann_file") or "", *dataset.get("data_prefix", {}).values()]
        for path in [root, *(os.path.join(root, name) for name in wanted if name)]:
            if path and not os.path.exists(path):
                fail(f"{loader}: there is no {path}: give the data set's folder with --data-root")
            if os.path.isdir(path) and not os.listdir(path):
                fail(f"{loader}: {path} is empty: give the data set's folder with --data-root")


# ----------------------------------------------------------------------------------------------------------------------
# Weights


def fit_backbone(cfg: Config, info: CheckpointInfo, own_grid: bool) -> None:
    """Give the config's backbone what a file's shapes tell: class token and, if own_grid, position embedding.

    Raises CheckpointError where the config's patch size or width is another than the file's.
    """
    backbone = cfg.model.backbone
    if (backbone.patch_size, backbone.embed_dim) != (info.patch_size, info.embed_dim):
        raise CheckpointError(
            f"{info.path} holds {info.arch}, {info.embed_dim} wide, with patch size {info.patch_size}, but the config "
            f"says embed_dim {backbone.embed_dim} and patch_size {backbone.patch_size}: take another config than "
            f"{cfg.filename}")
    backbone.class_token = info.class_token
    if own_grid:
        backbone.img_size = info.grid * info.patch_size


def load_pretrained(backbone: nn.Module, init_cfg: dict, prepare: Callable[[dict], dict] = dict) -> None:
    """Load the checkpoint of an init_cfg into a backbone, strictly; its fpn1 to fpn4 stay as they are.

    Args:
        init_cfg: type 'Pretrained', checkpoint: a file of any kind, or a run's folder, key: teacher or student.
        prepare: what is done to the state dict before, such as resizing the position embedding.

    Raises CheckpointError: see checkpoints.read_backbone.
    """
    if init_cfg.get("type") != "Pretrained":
        raise ValueError(f"init_cfg of the backbone is {init_cfg}: only type 'Pretrained' is known")
    state, info = read_backbone(init_cfg["checkpoint"], init_cfg.get("key", "teacher"))
    state = prepare(without_norm(state))
    expected = {name: t for name, t in backbone.state_dict().items() if not name.startswith("fpn")}
    check_fits(state, expected, f"{info.path} does not fit the config's backbone")
    backbone.load_state_dict(state, strict=False)
    if is_main_process():
        print(f"loaded {info}")


def without_norm(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict without the final norm of DINO's and timm's files: the taps come before it."""
    return {name: tensor for name, tensor in state.items() if not name.startswith("norm.")}


def read_model(path: str, cfg: Config) -> tuple[dict[str, torch.Tensor], CheckpointInfo]:
    """A whole detector or segmenter under our names, from mmseg's names too, and what it is.

    mmseg's ViT holds a class token even where it keeps it out of the attention: class_token=False in the config's
    backbone leaves it out here.
    """
    state, info = read_backbone(path)
    if not info.kind.startswith(("mmdet", "mmseg")):
        raise CheckpointError(f"{info.path} is a {info.kind}, not a detector or segmenter: give what train.py saved")
    if info.kind.startswith("mmseg") and info.final_norm:
        raise CheckpointError(f"{info.path} has a norm after the last block, which our segmenters have not")
    if info.class_token and cfg.model.backbone.get("class_token") is False:
        del state["cls_token"]
        state["pos_embed"], info = state["pos_embed"][:, 1:], replace(info, class_token=False)
    state = {f"backbone.{name}": tensor for name, tensor in without_norm(state).items()}
    return state | info.beside, info


# ----------------------------------------------------------------------------------------------------------------------
# Jobs


def train(args: argparse.Namespace, own_grid: bool, check: Callable[[Config], None] | None = None) -> None:
    """Fine-tune as a config says.

    Args:
        own_grid: whether the position embedding stays as it was pretrained (detection), or is resized (segmentation).
        check: what else to look at in the config before the work begins.
    """
    cfg = read_config(args)
    choose_precision(cfg, args.amp)
    check_data(cfg, ["train_dataloader", "val_dataloader"])
    if check:
        check(cfg)
    whole = choose_start(args, cfg)
    try:
        if whole:
            state, info = read_model(whole, cfg)
            if cfg.resume and "message_hub" not in read_checkpoint(whole):
                raise CheckpointError(f"--resume: {whole} has the model alone, not the state of its training: to start "
                                      f"from it give --cfg-options load_from={whole}")
            fit_backbone(cfg, info, own_grid=True)
        elif args.pretrained:
            info = read_backbone(args.pretrained, args.checkpoint_key)[1]
            fit_backbone(cfg, info, own_grid)
            cfg.model.backbone.init_cfg = {"type": "Pretrained", "checkpoint": str(info.path),
                                           "key": args.checkpoint_key}
        runner = Runner.from_cfg(cfg)
        if whole:  # mmengine itself would load what fits and go on
            check_fits(state, unwrapped(runner).state_dict(), f"{whole} does not fit {args.config}")
        runner.train()
    except CheckpointError as error:
        fail(str(error))


def choose_start(args: argparse.Namespace, cfg: Config) -> str | None:
    """The file of the whole model that training goes on from or starts with, set in cfg; None: a backbone alone."""
    latest = find_latest_checkpoint(cfg.work_dir) if Path(cfg.work_dir, "last_checkpoint").is_file() else None
    cfg.resume = bool(args.resume or cfg.get("resume"))
    if args.resume and args.resume != "auto":
        cfg.load_from = args.resume
    elif cfg.resume and not cfg.get("load_from"):
        cfg.load_from = latest
        if latest is None and is_main_process():
            print(f"--resume: {cfg.work_dir} has no checkpoint yet, so training starts at the beginning")
    elif latest and not cfg.resume:
        fail(f"{cfg.work_dir} has a run's checkpoints already: --resume goes on, another --work-dir starts anew")
    if args.pretrained and args.random_weights:
        fail(f"--random_weights contradicts --pretrained {args.pretrained}: give one of the two")
    if not (cfg.get("load_from") or args.pretrained or args.random_weights or cfg.model.backbone.get("init_cfg")):
        fail("--pretrained is empty, so the backbone would start untrained: give a checkpoint, or --random_weights to "
             "go on without one")
    if args.pretrained and cfg.get("load_from") and is_main_process():
        print(f"--pretrained {args.pretrained} is not read: {cfg.load_from} has the whole model")
    if not cfg.get("load_from"):
        cfg.resume = False
    return cfg.get("load_from")


def test(args: argparse.Namespace, show: Callable[[Config, str], None],
         check: Callable[[Config], None] | None = None) -> None:
    """Evaluate a whole model as a config says.

    Args:
        show: turns drawing on in the config, into the absolute path of a folder.
        check: what else to look at in the config before the work begins.
    """
    cfg = read_config(args)
    check_data(cfg, ["test_dataloader"])
    if check:
        check(cfg)
    if args.show_dir:
        show(cfg, os.path.abspath(args.show_dir))
    cfg.load_from, cfg.resume = None, False
    try:
        state, info = read_model(args.checkpoint, cfg)
        fit_backbone(cfg, info, own_grid=True)
        runner = Runner.from_cfg(cfg)
        check_fits(state, unwrapped(runner).state_dict(), f"{args.checkpoint} does not fit {args.config}")
        unwrapped(runner).load_state_dict(state)
        if is_main_process():
            known = " (the published detectors have 8)" if info.kind.startswith("mmdet") else ""
            print(f"loaded {info.path}: {info.kind}, all of its {len(state)} tensors; no file tells the number of "
                  f"attention heads, the config says {cfg.model.backbone.num_heads}{known}"
                  + ("; its class token takes part in the attention" if info.class_token else ""))
    except CheckpointError as error:
        fail(str(error))
    runner.test()


def unwrapped(runner: Runner) -> nn.Module:
    return runner.model.module if runner.distributed else runner.model
