"""Fine-tuning and evaluation with OpenMMLab, shared by detection/ and segmentation/.

    from detection import backbone  # registers SelfPatch's backbone with mmdet
    from selfpatch.openmmlab.jobs import evaluate, train
    from selfpatch.openmmlab.config import load_config

    cfg = load_config("detection/configs/mask-rcnn_vit-small-16_1x_coco.py", data_root="/path/to/coco")
    runner = train(cfg, pretrained="checkpoint.pth", keep_grid=True)
    metrics = evaluate(cfg, "work_dirs/mask-rcnn_vit-small-16_1x_coco/epoch_12.pth")
"""
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from selfpatch.checkpoints.files import CheckpointError, read_checkpoint
from selfpatch.checkpoints.loading import CheckpointInfo, check_state_dict, read_backbone
from selfpatch.distributed.processes import is_main_process
from selfpatch.errors import ConfigError

try:
    import mmcv.ops  # noqa: F401
    import mmdet  # noqa: F401
    import mmseg  # noqa: F401
    from mmengine.config import Config
    from mmengine.logging import HistoryBuffer
    from mmengine.runner import CheckpointLoader, Runner, find_latest_checkpoint
except ImportError as error:
    raise ConfigError(f"OpenMMLab's packages are not all installed ({error}): run ./install_openmmlab.sh") from error

from selfpatch.openmmlab.config import check_data, get_args_parser, load_config, set_launcher, set_precision


def history_getattr(cls: type, name: str) -> Callable:
    """Stand in for getattr in mmengine's checkpoints: return a statistic of HistoryBuffer, refuse all else."""
    if cls is not HistoryBuffer or name not in ("min", "max", "current", "mean"):
        raise CheckpointError(f"the file requires {getattr(cls, '__name__', cls)}.{name}, which no checkpoint needs")
    return getattr(cls, name)


# resuming needs the real loss histories; other jobs read placeholders (checkpoints/files.py)
torch.serialization.add_safe_globals([HistoryBuffer, (history_getattr, "builtins.getattr")])


@CheckpointLoader.register_scheme(prefixes="", force=True)
def load_from_local(filename: str, map_location=None) -> dict:
    """Read a local file in place of mmengine's own reader, which would execute code in a checkpoint."""
    return read_checkpoint(filename)


# ----------------------------------------------------------------------------------------------------------------------
# Weights


def adapt_backbone(cfg: Config, info: CheckpointInfo, keep_grid: bool) -> None:
    """Give the config's backbone the class token and, with keep_grid, the position grid of a checkpoint.

    Raises:
        CheckpointError: patch size, embedding dimension or number of heads of the config and the file differ.
    """
    backbone = cfg.model.backbone
    if (backbone.patch_size, backbone.embed_dim) != (info.patch_size, info.embed_dim):
        raise CheckpointError(
            f"{info.path} holds {info.arch} with embed_dim {info.embed_dim} and patch size {info.patch_size}, but "
            f"the config says embed_dim {backbone.embed_dim} and patch_size {backbone.patch_size}: use another config "
            f"than {cfg.filename}")
    check_heads(info, backbone.get("num_heads"))
    backbone.class_token = info.class_token
    if keep_grid:
        backbone.img_size = info.grid * info.patch_size


def check_heads(info: CheckpointInfo, num_heads: int | None) -> None:
    """Raise CheckpointError if the checkpoint's number of attention heads is known and differs from the config's."""
    if info.num_heads not in (None, num_heads):
        raise CheckpointError(
            f"{info.path} has {info.num_heads} attention heads ({info.heads_from}), but the config says {num_heads}: "
            f"give --cfg-options model.backbone.num_heads={info.num_heads}, in training and in testing")


def load_pretrained(backbone: nn.Module, init_cfg: dict, prepare: Callable[[dict], dict] = dict) -> None:
    """Load the checkpoint of an init_cfg strictly into a backbone, apart from the detector's fpn1 to fpn4.

    Args:
        backbone: changed in place.
        init_cfg: type 'Pretrained'; checkpoint: see checkpoints.published.resolve_path; key: teacher or student.
        prepare: changes the state dict before it is loaded, e.g. resizes the position embedding.

    Raises:
        CheckpointError: the file cannot be read (checkpoints.loading.read_backbone), or does not fit the backbone.
    """
    if init_cfg.get("type") != "Pretrained":
        raise ConfigError(f"init_cfg of the backbone is {init_cfg}: only type 'Pretrained' is supported")
    state, info = read_backbone(init_cfg["checkpoint"], init_cfg.get("key", "teacher"))
    check_heads(info, backbone.num_heads)
    state = prepare(remove_final_norm(state))
    expected = {name: t for name, t in backbone.state_dict().items() if not name.startswith("fpn")}
    check_state_dict(state, expected, f"{info.path} does not fit the config's backbone")
    backbone.load_state_dict(state, strict=False)
    if is_main_process():
        print(f"loaded {info}")


def remove_final_norm(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drop the final norm of DINO's and timm's models from a state dict: features are taken before it."""
    return {name: tensor for name, tensor in state.items() if not name.startswith("norm.")}


def read_model(path: str | Path, cfg: Config) -> tuple[dict[str, torch.Tensor], CheckpointInfo]:
    """Read a whole detector or segmenter, with its backbone under this project's names.

    mmseg's ViT saves a class token even if no attention uses it (with_cls_token=False); class_token=False in the
    config's backbone drops it.

    Raises:
        CheckpointError: neither a detector nor a segmenter, or mmseg's ViT has a norm after its last block.
    """
    state, info = read_backbone(path)
    if not info.kind.startswith(("mmdet", "mmseg")):
        raise CheckpointError(f"{info.path} is a {info.kind}, not a detector or segmenter: give a model saved by "
                              "train.py")
    if info.kind.startswith("mmseg") and info.final_norm:
        raise CheckpointError(f"{info.path} has a norm after the last block, which this segmenter does not have")
    if info.class_token and cfg.model.backbone.get("class_token") is False:
        del state["cls_token"]
        state["pos_embed"], info = state["pos_embed"][:, 1:], replace(info, class_token=False)
    state = {f"backbone.{name}": tensor for name, tensor in remove_final_norm(state).items()}
    return state | info.other_tensors, info


# ----------------------------------------------------------------------------------------------------------------------
# Jobs


def train(cfg: Config, pretrained: str | Path = "", checkpoint_key: str = "teacher", random_weights: bool = False,
          resume: str | Path | None = None, amp: bool = False, *, keep_grid: bool) -> Runner:
    """Fine-tune the model of a config.

    Args:
        cfg: as load_config returns it; changed in place.
        pretrained, checkpoint_key: checkpoint of the backbone, see checkpoints.loading.read_backbone.
        random_weights: start from an untrained backbone instead.
        resume: checkpoint to continue from; "auto" for the latest in the work dir, if any.
        amp: mixed precision, if there is a GPU.
        keep_grid: keep the position embedding at its pretrained size (detection) instead of resizing it to the
            training crops (segmentation).

    Raises:
        ConfigError: the data, the checkpoints and the config do not fit together.
    """
    set_precision(cfg, amp)
    check_data(cfg, ["train_dataloader", "val_dataloader"])
    model_file = select_start(cfg, pretrained, random_weights, resume)
    if model_file:
        state, info = read_model(model_file, cfg)
        model_file = cfg.load_from = str(info.path)
        if cfg.resume and "message_hub" not in read_checkpoint(model_file):
            raise CheckpointError(f"--resume: {model_file} has the model alone, without the state of its training: to "
                                  f"start from it, give --cfg-options load_from={model_file}")
        adapt_backbone(cfg, info, keep_grid=True)
    elif pretrained:
        info = read_backbone(pretrained, checkpoint_key)[1]
        adapt_backbone(cfg, info, keep_grid)
        cfg.model.backbone.init_cfg = {"type": "Pretrained", "checkpoint": str(info.path), "key": checkpoint_key}
    runner = Runner.from_cfg(cfg)
    if model_file:  # mmengine itself would load what fits and skip the rest
        check_state_dict(state, unwrap_model(runner).state_dict(), f"{model_file} does not fit {cfg.filename}")
    runner.train()
    return runner


def select_start(cfg: Config, pretrained: str | Path, random_weights: bool,
                 resume: str | Path | None) -> str | None:
    """Select what training starts from, and set cfg.load_from and cfg.resume to match.

    Returns:
        The file of a whole model; None to start from a backbone.

    Raises:
        ConfigError: the options contradict each other, or nothing to start from is given.
    """
    latest = find_latest_checkpoint(cfg.work_dir) if Path(cfg.work_dir, "last_checkpoint").is_file() else None
    cfg.resume = bool(resume or cfg.get("resume"))
    if resume and resume != "auto":
        cfg.load_from = str(resume)
    elif cfg.resume and not cfg.get("load_from"):
        cfg.load_from = latest
        if latest is None and is_main_process():
            print(f"--resume: {cfg.work_dir} has no checkpoint yet, so training starts from the beginning")
    elif latest and not cfg.resume:
        raise ConfigError(f"{cfg.work_dir} already has checkpoints of a run: continue it with --resume, or start a new "
                          "one in another --work-dir")
    if pretrained and random_weights:
        raise ConfigError(f"--random_weights contradicts --pretrained {pretrained}: give one of the two")
    if not (cfg.get("load_from") or pretrained or random_weights or cfg.model.backbone.get("init_cfg")):
        raise ConfigError("--pretrained is empty, so the backbone would start untrained: give a checkpoint, or "
                          "--random_weights to train without one")
    if pretrained and cfg.get("load_from") and is_main_process():
        print(f"--pretrained {pretrained} is ignored: {cfg.load_from} has the whole model")
    if not cfg.get("load_from"):
        cfg.resume = False
    return cfg.get("load_from")


def evaluate(cfg: Config, checkpoint: str | Path) -> dict[str, float]:
    """Evaluate a whole model on the test set of a config.

    Args:
        cfg: as load_config returns it; changed in place.
        checkpoint: a model saved by train, or a released one.

    Returns:
        The metrics by name.

    Raises:
        ConfigError: the data, the checkpoint and the config do not fit together.
    """
    check_data(cfg, ["test_dataloader"])
    cfg.load_from, cfg.resume = None, False
    state, info = read_model(checkpoint, cfg)
    adapt_backbone(cfg, info, keep_grid=True)
    runner = Runner.from_cfg(cfg)
    model = unwrap_model(runner)
    check_state_dict(state, model.state_dict(), f"{checkpoint} does not fit {cfg.filename}")
    model.load_state_dict(state)
    if is_main_process():
        published = " (the published detectors have 8)" if info.kind.startswith("mmdet") else ""
        source = "as the file records" if info.num_heads else (
            f"as in the config, since the file does not record the number{published}")
        print(f"loaded {info.path}: {info.kind}, all {len(state)} tensors; {cfg.model.backbone.num_heads} attention "
              f"heads {source}"
              + ("; the class token takes part in the attention" if info.class_token else ""))
    return runner.test()


def unwrap_model(runner: Runner) -> nn.Module:
    return runner.model.module if runner.distributed else runner.model


def run_job(job: str, backbone: ModuleType, description: str) -> None:
    """Run train.py or test.py of detection/ or segmentation/ on the command line's options.

    Args:
        job: train or test.
        backbone: module that registers the backbone and has check_channels, show_predictions and KEEP_GRID (see train).
        description: first line of --help.
    """
    args = get_args_parser(job, description).parse_args()
    cfg = load_config(args.config, args.cfg_options, args.data_root, args.work_dir)
    set_launcher(cfg, args.launcher, args.local_rank)
    backbone.check_channels(cfg)
    if job == "train":
        train(cfg, args.pretrained, args.checkpoint_key, args.random_weights, args.resume, args.amp,
              keep_grid=backbone.KEEP_GRID)
    else:
        if args.show_dir:
            backbone.show_predictions(cfg, os.path.abspath(args.show_dir))
        evaluate(cfg, args.checkpoint)
