"""One step, one epoch, and what a person should hear of them."""
import argparse
import datetime
import math
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from itertools import islice

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import utils
from data import CropLoader
from losses import DINOLoss, Losses
from options import images_per_step


def train_step(student: nn.Module, teacher: nn.Module, dino_loss: DINOLoss, optimizer: torch.optim.Optimizer,
               batches: Iterable[list[torch.Tensor]], epoch: int, momentum: float, clip_grad: float,
               freeze_last_layer: int, dtype: torch.dtype = torch.float32,
               scaler: torch.amp.GradScaler | None = None, accum_steps: int = 1) -> Losses:
    """One step on accum_steps small batches, as on one so many times as large.

    Nothing in it waits for the device, but for float16's scaler where the optimiser is not fused.

    Args:
        student, teacher: MultiCropWrappers, the student perhaps inside DDP.
        batches: accum_steps lists of crops, V tensors [B, 3, H, W], the two global ones first.
        epoch: from 0; it sets the teacher's temperature.
        momentum: of the teacher in this step.
        clip_grad: largest gradient norm of each tensor, 0 for none.
        freeze_last_layer: epochs in which the heads' last layers stay.
        dtype, scaler: of autocast; float16 needs a scaler.
        accum_steps: how many batches to take.

    Returns:
        means over the small batches; the tensors stay on the device.
    """
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    optimizer.zero_grad(set_to_none=True)
    total = None
    for i, crops in enumerate(batches, 1):
        last = i == accum_steps
        with nullcontext() if last or not isinstance(student, DistributedDataParallel) else student.no_sync():
            losses = small_batch_losses(student, teacher, dino_loss, crops, epoch, dtype, last)
            scaler.scale(losses.total / accum_steps).backward()
        part = torch.stack(losses).detach() / accum_steps
        total = part if total is None else total + part

    scaler.unscale_(optimizer)
    if clip_grad:
        utils.clip_gradients(student, clip_grad)
    utils.cancel_gradients_last_layer(epoch, student, freeze_last_layer)
    scaler.step(optimizer)
    scaler.update()
    utils.update_teacher(student, teacher, momentum)
    return Losses(*total)


def small_batch_losses(student: nn.Module, teacher: nn.Module, dino_loss: DINOLoss, crops: list[torch.Tensor],
                       epoch: int, dtype: torch.dtype, last: bool) -> Losses:
    """The losses of one small batch; with the last one of a step the centres move."""
    patches = dino_loss.uses_patches
    with torch.autocast(crops[0].device.type, dtype, enabled=dtype != torch.float32):
        with torch.no_grad():
            # DINO's teacher sees the global crops only; SelfPatch's all of them, for the patches and the centres
            targets = teacher(crops if patches else crops[:2], loc=True, patches=patches)
        return dino_loss(student(crops, patches=patches), targets, epoch, last)


def train_one_epoch(student: nn.Module, teacher: nn.Module, dino_loss: DINOLoss, loader: CropLoader,
                    optimizer: torch.optim.Optimizer, schedules: dict, epoch: int, scaler: torch.amp.GradScaler,
                    dtype: torch.dtype, args: argparse.Namespace) -> dict[str, float]:
    """Train through the loader once; the epoch's means over all ranks."""
    logger = utils.MetricLogger(window=args.log_every)
    steps = len(loader) // args.accum_steps
    batches = iter(loader)
    for step in range(steps):
        it = epoch * steps + step
        for group in optimizer.param_groups:
            group["lr"] = schedules["lr"][it]
        optimizer.param_groups[0]["weight_decay"] = schedules["wd"][it]  # the second group has none

        losses = train_step(student, teacher, dino_loss, optimizer, islice(batches, args.accum_steps), epoch,
                            schedules["momentum"][it], args.clip_grad, args.freeze_last_layer, dtype, scaler,
                            args.accum_steps)
        logger.update(**losses._asdict())

        if (step + 1) % args.log_every == 0 or step + 1 == steps:
            logger.read()  # the only wait for the device
            stop_if_not_finite(logger, epoch, step, steps)
            if utils.is_main_process():
                print(progress_line(logger, epoch, step, steps, schedules["lr"][it], args), flush=True)
    logger.synchronize_between_processes(args.device)
    return {"loss": logger["total"].global_avg, "clsloss": logger["image"].global_avg,
            "patchloss": logger["patch"].global_avg, "lr": schedules["lr"][it], "wd": schedules["wd"][it],
            "cls_entropy": logger["image_entropy"].global_avg, "patch_entropy": logger["patch_entropy"].global_avg}


def stop_if_not_finite(logger: utils.MetricLogger, epoch: int, step: int, steps: int) -> None:
    """End the run with status 1 if a loss of the last steps was NaN or infinite; nothing of them has been saved."""
    recent = logger["total"].recent  # all that has come since the last look, which was log_every steps ago at most
    for back, value in enumerate(recent):
        if not math.isfinite(value):
            bad = step - len(recent) + 1 + back
            sys.exit(f"the loss was {value} at step {bad} of epoch {epoch} (iteration {epoch * steps + bad}): "
                     "the run goes on from its last checkpoint; try --precision fp32, a smaller --clip_grad or --lr")


def progress_line(logger: utils.MetricLogger, epoch: int, step: int, steps: int, lr: float,
                  args: argparse.Namespace) -> str:
    left = (args.epochs - epoch) * steps - step - 1
    patch = ""
    if args.patch_loss_weight:
        patch = f"patch {logger['patch'].avg:.4f} (ln K {math.log(args.out_dim_selfpatch):.4f})  "
    return (f"epoch {epoch}/{args.epochs}  step {step + 1}/{steps}  loss {logger['total'].avg:.4f}  "
            f"image {logger['image'].avg:.4f} (ln K {math.log(args.out_dim):.4f})  {patch}lr {lr:.2e}  "
            f"{images_per_step(args) / logger.seconds_per_step:.1f} images/s  "
            f"ETA {datetime.timedelta(seconds=round(left * logger.seconds_per_step))}  "
            f"memory {utils.peak_memory_gb(args.device):.1f} GiB")


def health_warnings(stats: dict[str, float], epoch: int, args: argparse.Namespace) -> list[str]:
    """What a person should know about the epoch's means, in words."""
    found = []
    terms = [("image", "clsloss", "cls_entropy", args.out_dim)]
    if args.patch_loss_weight:
        terms.append(("patch", "patchloss", "patch_entropy", args.out_dim_selfpatch))
    for name, loss, entropy, prototypes in terms:
        uniform = math.log(prototypes)
        if epoch >= args.warmup_epochs and abs(stats[loss] - uniform) < 0.005 * uniform:
            found.append(f"the {name} loss {stats[loss]:.4f} sits on ln K = {uniform:.4f} after the warm-up: the head "
                         "has gone uniform or has not begun to learn; try a lower teacher temperature, a larger "
                         "--freeze_last_layer or fewer prototypes")
        if args.batch_size_per_gpu >= 8 and stats[entropy] < 0.01 * uniform:  # few images may well be alike
            found.append(f"the teacher gives almost every {name} the same prototype (entropy of its mean assignment "
                         f"{stats[entropy]:.4f} of at most {uniform:.4f}): it has collapsed; try a higher "
                         "--momentum_teacher or a lower --lr")
    return found
