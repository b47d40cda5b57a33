"""One step, one epoch, and the line of progress."""
import datetime
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from itertools import islice

import torch
from torch.nn.parallel import DistributedDataParallel

from selfpatch.data.loader import CropLoader
from selfpatch.distributed.precision import autocast
from selfpatch.distributed.processes import get_world_size, is_main_process, peak_memory_gb
from selfpatch.errors import TrainingError
from selfpatch.method.losses import DINOLoss, Losses
from selfpatch.method.optim import (
    all_finite,
    cancel_gradients_backbone,
    cancel_gradients_last_layer,
    clip_gradients,
    update_teacher,
)
from selfpatch.method.training_run import TrainingRun
from selfpatch.pretraining.finite import check_logged_steps, check_step, clipping, gradient_norms
from selfpatch.pretraining.logs import MetricLogger


def train_step(run: TrainingRun, batches: Iterable[list[torch.Tensor]]) -> Losses:
    """One step of the optimiser, on run.accum_steps small batches as if they were one.

    No operation waits for the device, except float16's scaler with an optimiser that is not fused.

    Args:
        batches: run.accum_steps lists of crops, each V tensors [B, 3, H, W], the two global ones first.

    Returns:
        means over the small batches, on the device.

    Raises:
        NotFiniteError: on a CPU, if a loss or gradient is not finite; nothing has changed then.
    """
    run.begin_step()
    losses, center_means = [], []
    for i, crops in enumerate(batches, 1):
        # gradients are summed over ranks with the last small batch only
        wait = isinstance(run.student, DistributedDataParallel) and i < run.accum_steps
        with run.student.no_sync() if wait else nullcontext():
            batch_losses, means = small_batch_losses(run, crops)
            center_means.append(means)
            if i == run.accum_steps:
                start = getattr(run.dino_loss, "start_update", None)  # an object of the caller's may not have it
                move_centers = start(center_means) if start else partial(run.dino_loss.update_centers, center_means)
            run.scaler.scale(batch_losses.total / run.accum_steps).backward()
        losses.append(torch.stack(batch_losses).detach())
    if len(losses) != run.accum_steps:
        raise ValueError(f"{len(losses)} small batches for a step of {run.accum_steps}")
    losses = Losses(*torch.stack(losses).mean(0))

    run.scaler.unscale_(run.optimizer)
    norms = run.gradient_norms = gradient_norms(run.student)
    finite = check_step(run, losses, norms)
    update_centers(run, move_centers, finite)
    if run.clip_grad:
        clip_gradients(run.student, run.clip_grad, norms)
    cancel_gradients_last_layer(run.epoch, run.student, run.freeze_last_layer)
    cancel_gradients_backbone(run.epoch, run.student_module, run.freeze_backbone_epochs)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    skipped = {"finite": finite} if run.scaler.is_enabled() else {}
    update_teacher(run.student, run.teacher, run.schedules.momentum(run.step), **skipped)
    run.step += 1
    return losses


def update_centers(run: TrainingRun, move_centers: Callable[[], None], finite: torch.Tensor) -> None:
    """Move the loss's centres, unless the step was not finite."""
    if run.reads_are_free and not run.scaler.is_enabled():
        move_centers()
        return
    before = [center.clone() for center in run.dino_loss.buffers()]
    move_centers()
    for center, old in zip(run.dino_loss.buffers(), before, strict=True):
        center.copy_(torch.where(finite, center, old))


def small_batch_losses(run: TrainingRun, crops: list[torch.Tensor]) -> tuple[Losses, list[torch.Tensor]]:
    """Losses of one small batch, and the teacher's mean logits, by which the centres will move."""
    with autocast(run.device, run.dtype):
        with torch.no_grad():
            targets = run.teacher.targets(crops)
        losses = run.dino_loss(run.student(crops), targets, run.epoch)
    return losses, run.dino_loss.batch_means(targets)


def train_one_epoch(run: TrainingRun, loader: CropLoader, log_every: int = 10, logger: MetricLogger | None = None,
                    after_step: Callable[[], None] = lambda: None,
                    on_log: Callable[[MetricLogger], None] = lambda _: None) -> dict[str, float]:
    """Train through the loader once, or through what is left of the epoch; the epoch's means over all ranks.

    Args:
        log_every: steps between two lines of progress, which rank 0 prints.
        logger: with the sums of the epoch's steps that are done already.
        after_step: called after every step but the epoch's last; what it raises ends the epoch.
        on_log: called on rank 0 with the logger after every line of progress.

    Raises:
        TrainingError: a loss was NaN or infinite.
    """
    logger = logger or MetricLogger(window=log_every)
    batches, steps = iter(loader), run.steps_per_epoch
    images_per_step = loader.batch_size * run.accum_steps * get_world_size()
    for step in range(run.step % steps + 1, steps + 1):
        losses = train_step(run, islice(batches, run.accum_steps))
        logger.update(**losses._asdict(), **clipping(run.gradient_norms, run.clip_grad))
        if step % log_every == 0 or step == steps:
            logger.read()  # the only wait for the device within an epoch
            check_logged_steps(run, logger)
            if is_main_process():
                print(progress_line(logger, run, images_per_step), flush=True)
                on_log(logger)
        if step < steps:
            after_step()
    logger.synchronize_between_processes(run.device)
    return {"loss": logger["total"].global_avg, "clsloss": logger["image"].global_avg,
            "patchloss": logger["patch"].global_avg, "lr": run.schedules.lr(run.step - 1),
            "wd": run.schedules.weight_decay(run.step - 1), "cls_entropy": logger["image_entropy"].global_avg,
            "patch_entropy": logger["patch_entropy"].global_avg}


def check_weights(run: TrainingRun) -> None:
    """Raise TrainingError if a weight of the student is NaN or infinite."""
    if not all_finite(run.student_module):
        epoch, step = divmod(run.step - 1, run.steps_per_epoch)
        raise TrainingError(f"step {step} of epoch {epoch}, or one before it, made weights NaN or infinite, so they "
                            "are not saved: the same command continues from the last checkpoint; try a smaller --lr "
                            "or --clip_grad")


def prototypes(dino_loss: DINOLoss) -> dict[str, int]:
    """K of each term that is used; ln K is the loss of a head that is uniform."""
    terms = {"image": dino_loss.center.shape[-1], "patch": dino_loss.patch_center.shape[-1]}
    return terms if dino_loss.patch_loss_weight else {"image": terms["image"]}


def progress_line(logger: MetricLogger, run: TrainingRun, images_per_step: int) -> str:
    """Where the run is, its losses beside ln K, its rate, the time that remains, and its peak memory."""
    epoch, step = divmod(run.step - 1, run.steps_per_epoch)
    remaining_steps = run.schedules.epochs * run.steps_per_epoch - run.step
    terms = "  ".join(f"{name} {logger[name].avg:.4f} (ln K {math.log(K):.4f})"
                      for name, K in prototypes(run.dino_loss).items())
    return (f"epoch {epoch}/{run.schedules.epochs}  step {step + 1}/{run.steps_per_epoch}  "
            f"loss {logger['total'].avg:.4f}  {terms}  lr {run.schedules.lr(run.step - 1):.2e}  "
            f"{images_per_step / logger.seconds_per_step:.1f} images/s  "
            f"ETA {datetime.timedelta(seconds=round(remaining_steps * logger.seconds_per_step))}  "
            f"memory {peak_memory_gb(run.device):.1f} GiB")


def health_warnings(stats: dict[str, float], dino_loss: DINOLoss, warmed_up: bool, batch_size: int) -> list[str]:
    """Signs of a head that does not learn, or of a teacher that has collapsed, in an epoch's means.

    Args:
        stats: what train_one_epoch returned.
        warmed_up: whether the epoch came after the learning rate's warm-up.
        batch_size: images per process; fewer than 8 may well be alike, and say nothing of collapse.
    """
    warnings = []
    keys = {"image": ("clsloss", "cls_entropy"), "patch": ("patchloss", "patch_entropy")}
    for name, K in prototypes(dino_loss).items():
        (loss, entropy), uniform = (stats[key] for key in keys[name]), math.log(K)
        if warmed_up and abs(loss - uniform) < 0.005 * uniform:
            warnings.append(f"the {name} loss {loss:.4f} is at ln K = {uniform:.4f} after the warm-up: the head has "
                            "become uniform or has not begun to learn; try a lower teacher temperature, a larger "
                            "--freeze_last_layer or fewer prototypes")
        if batch_size >= 8 and entropy < 0.01 * uniform:
            warnings.append(f"the teacher assigns almost every {name} to the same prototype (entropy of its mean "
                            f"assignment {entropy:.4f}, at most {uniform:.4f}): it has collapsed; try a higher "
                            "--momentum_teacher or a lower --lr")
    return warnings
