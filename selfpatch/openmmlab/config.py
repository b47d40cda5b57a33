"""Options and configs for fine-tuning and evaluation with OpenMMLab.

    cfg = load_config("detection/configs/mask-rcnn_vit-small-16_1x_coco.py", data_root="/path/to/coco")

The options are those of OpenMMLab's own tools, plus --pretrained, --checkpoint_key, --random_weights and --data-root.
"""
import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from mmengine.config import Config, ConfigDict, DictAction

from selfpatch.checkpoints.published import FORMS
from selfpatch.distributed.processes import is_main_process
from selfpatch.errors import ArgumentParser, ConfigError


class KeyValueAction(DictAction):
    """mmengine's parser of key=value words; malformed words are errors of the argument parser."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: list[str],
                 option_string: str | None = None) -> None:
        for word in values:
            if "=" not in word:
                parser.error(f"{option_string} {word}: give key=value")
        super().__call__(parser, namespace, values, option_string)


def get_args_parser(job: str, description: str) -> ArgumentParser:
    """Options of a job, train or test: those of OpenMMLab's tool of that name, and this project's."""
    parser = ArgumentParser(description=description)
    parser.add_argument("config", type=os.path.expanduser, help="one of configs/*.py")
    if job == "train":
        parser.add_argument("--pretrained", type=os.path.expanduser, default="",
                            help=f"weights of the backbone: {FORMS}")
        parser.add_argument("--checkpoint_key", default="teacher", help="network of a training run: teacher or student")
        parser.add_argument("--random_weights", action="store_true", help="start from an untrained backbone")
        parser.add_argument("--amp", action="store_true", help="mixed precision, if there is a GPU")
        parser.add_argument("--resume", type=os.path.expanduser, nargs="?", const="auto",
                            help="continue from this checkpoint, or without a value from the latest in --work-dir, if "
                                 "any")
    else:
        parser.add_argument("checkpoint", type=os.path.expanduser, help="a model saved by train.py, or a released one")
        parser.add_argument("--show-dir", type=os.path.expanduser,
                            help="draw the predictions on the images and save them in this folder")
    parser.add_argument("--work-dir", type=os.path.expanduser,
                        help="folder for logs and checkpoints (default: work_dirs/<name of the config>)")
    parser.add_argument("--data-root", type=os.path.expanduser,
                        help="folder of the dataset, replacing the config's data_root")
    parser.add_argument("--cfg-options", nargs="+", action=KeyValueAction, default={}, metavar="key=value",
                        help="override config values: model.backbone.num_heads=8 train_dataloader.batch_size=2 …")
    parser.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none",
                        help="how the processes were started, if there are several")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help="set by torch.distributed.launch")
    return parser


def load_config(path: str | Path, overrides: dict | None = None, data_root: str | Path | None = None,
                work_dir: str | Path | None = None) -> Config:
    """Load a config for a single process; without a GPU, SyncBN becomes BN.

    Args:
        path: config file.
        overrides: values by dotted key, such as {"model.backbone.num_heads": 8}.
        data_root: replaces the config's data_root in all of its paths.
        work_dir: folder for logs and checkpoints; default: the config's own, or work_dirs/<name of the config>.

    Raises:
        ConfigError: the file cannot be read, or has no data_root to replace.
    """
    if not Path(path).is_file():
        raise ConfigError(f"there is no config {path}")
    try:
        cfg = Config.fromfile(path)
        cfg.merge_from_dict(overrides or {})
    except Exception as error:  # configs are code and can raise anything
        raise ConfigError(
            f"{path} cannot be read: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if data_root:
        if not cfg.get("data_root"):
            raise ConfigError(f"--data-root: {path} has no data_root to replace")
        replace_prefix(cfg, cfg.data_root, str(data_root).rstrip("/") + "/")
    cfg.work_dir = str(work_dir or cfg.get("work_dir") or f"work_dirs/{Path(path).stem}")
    cfg.launcher = "none"
    if not torch.cuda.is_available():
        replace_prefix(cfg.model, "SyncBN", "BN")
    return cfg


def replace_prefix(cfg: ConfigDict | Config | list | tuple, old: str, new: str) -> None:
    """Replace a prefix in every string of a nested config, in place."""
    for key, value in cfg.items() if isinstance(cfg, (dict, Config)) else enumerate(cfg):
        if isinstance(value, (dict, list, tuple)):
            replace_prefix(value, old, new)
        elif isinstance(value, str) and value.startswith(old) and not isinstance(cfg, tuple):
            cfg[key] = new + value.removeprefix(old)


def set_launcher(cfg: Config, launcher: str, local_rank: int = 0) -> None:
    """Set up a config for the processes of a launcher. Without GPUs, also join them into a gloo process group.

    Args:
        cfg: changed in place.
        launcher: none, pytorch, slurm or mpi.
        local_rank: used if the launcher sets no LOCAL_RANK (torch before 2.0).

    Raises:
        ConfigError: torchrun did not start this process, or the launcher needs GPUs and there are none.
    """
    cfg.launcher = launcher
    if launcher == "pytorch":
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
        if "RANK" not in os.environ:
            raise ConfigError("--launcher pytorch requires processes started by torchrun: see dist_train.sh and "
                              "dist_test.sh")
    if launcher != "none" and not torch.cuda.is_available():
        if launcher != "pytorch":
            raise ConfigError(f"--launcher {launcher} needs GPUs, and torch sees none: start CPU processes with "
                              "torchrun and --launcher pytorch")
        # mmengine would select a GPU for the wrapper, and for the process group
        cfg.model_wrapper_cfg = {"type": "MMDistributedDataParallel", "device_ids": None, "broadcast_buffers": False}
        dist.init_process_group("gloo")


def set_precision(cfg: Config, amp: bool) -> None:
    """Use mixed precision if amp or the config asks for it and there is a GPU, else float32."""
    if amp:
        cfg.optim_wrapper.type = "AmpOptimWrapper"
    if cfg.optim_wrapper.type == "AmpOptimWrapper" and not torch.cuda.is_available():
        cfg.optim_wrapper.type = "OptimWrapper"
        for option in ("loss_scale", "dtype"):
            cfg.optim_wrapper.pop(option, None)
        if is_main_process():
            print("torch sees no GPU: training in float32, without mixed precision")


def check_data(cfg: Config, loaders: list[str]) -> None:
    """Raise ConfigError if a folder or annotation file of these data loaders is missing or empty."""
    for loader in loaders:
        dataset = (cfg.get(loader) or {}).get("dataset", {})
        while "dataset" in dataset:  # unwrap RepeatDataset and similar
            dataset = dataset.dataset
        root = dataset.get("data_root") or ""
        names = [dataset.get("ann_file") or "", *dataset.get("data_prefix", {}).values()]
        for path in [root, *(os.path.join(root, name) for name in names if name)]:
            if path and not os.path.exists(path):
                raise ConfigError(f"{loader}: there is no {path}: give the dataset's folder with --data-root")
            if os.path.isdir(path) and not os.listdir(path):
                raise ConfigError(f"{loader}: {path} is empty: give the dataset's folder with --data-root")
