"""One step, one epoch, the line of progress, and what happens to a step whose loss or gradient is not finite.

On a CPU such a step raises before anything has changed. On a GPU nothing waits for the answer: this step and the
following ones, until the log is read, leave the student, the optimiser and the centres as they are (the teacher moves
towards that student); then the run ends. In float16 such steps are normal, since the scaler tries how large a scale may
be: they change nothing, the teacher included, and the run goes on.
"""
import datetime
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from itertools import islice

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from selfpatch.data.loader import CropLoader
from selfpatch.distributed.precision import autocast, has_bfloat16
from selfpatch.distributed.processes import get_world_size, is_main_process, peak_memory_gb
from selfpatch.errors import TrainingError, try_print
from selfpatch.method.losses import DINOLoss, Losses
from selfpatch.method.optim import (
    all_finite,
    cancel_gradients_backbone,
    cancel_gradients_last_layer,
    clip_gradients,
    update_teacher,
)
from selfpatch.method.training_run import TrainingRun
from selfpatch.pretraining.meters import MetricLogger

SMALLEST_SCALE = 2.0**-10  # of float16's scaler: reached after 26 overflowing steps in a row


class NotFiniteError(TrainingError):
    """A loss or a gradient was NaN or infinite; the student is as it was before the step."""


# ----------------------------------------------------------------------------------------------------------------------
# One step


def train_step(run: TrainingRun, batches: Iterable[list[torch.Tensor]]) -> Losses:
    """Take one step of the optimiser on run.accum_steps small batches, as if they were one batch.

    Nothing waits for the device, except float16's scaler with an optimiser that is not fused.

    Args:
        batches: run.accum_steps lists of crops, each V tensors [B, 3, H, W], the two global ones first.

    Returns:
        their means over the small batches, on the device.

    Raises:
        NotFiniteError: a loss or gradient is not finite (on a CPU only); nothing has changed.
    """
    run.begin_step()
    losses, center_means = [], []
    for i, crops in enumerate(batches, 1):
        # sum gradients over ranks with the last small batch only
        wait = isinstance(run.student, DistributedDataParallel) and i < run.accum_steps
        with run.student.no_sync() if wait else nullcontext():
            batch_losses, means = small_batch_losses(run, crops)
            center_means.append(means)
            if i == run.accum_steps:
                start = getattr(run.dino_loss, "start_update", None)  # a loss of the caller's own may lack it
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
    """Losses of one small batch, and the teacher's mean logits, towards which the centres will move."""
    with autocast(run.device, run.dtype):
        with torch.no_grad():
            targets = run.dino_loss.targets(run.teacher, crops)
        losses = run.dino_loss(run.student(crops), targets, run.epoch)
    return losses, run.dino_loss.batch_means(targets)


def gradient_norms(model: nn.Module) -> torch.Tensor:
    """L2 norm of each parameter's gradient, [number of gradients], without a host-device sync."""
    return torch.stack(torch._foreach_norm([p.grad for p in model.parameters() if p.grad is not None]))


def check_step(run: TrainingRun, losses: Losses, norms: torch.Tensor) -> torch.Tensor:
    """Whether this step may change the run: a bool on the device.

    Args:
        losses: of the step.
        norms: of the gradients after their sum over ranks, so that every rank comes to the same answer.

    Raises:
        NotFiniteError: it may not (on a CPU only).
    """
    finite = norms.isfinite().all()
    if run.scaler.is_enabled():
        return finite
    if run.reads_are_free:
        if not (finite and losses.total.isfinite()):
            raise NotFiniteError(describe_step(run, run.step, losses._asdict(), norms))
        return finite
    run.bad_norms = norms if run.bad_norms is None else torch.where(run.skipped_steps > 0, run.bad_norms, norms)
    run.skipped_steps = run.skipped_steps + ((run.skipped_steps > 0) | ~finite)
    if run.optimizer.defaults.get("fused"):  # others take the step; the run then ends without saving
        run.optimizer.found_inf = (run.skipped_steps > 0).float()
    return run.skipped_steps == 0


def check_logged_steps(run: TrainingRun, logger: MetricLogger) -> None:
    """Raise NotFiniteError if a loss or gradient since the last call was not finite. Waits for the device."""
    steps = len(logger["total"].recent)  # the window is as long as the steps between two calls
    if run.scaler.is_enabled() and run.scaler.get_scale() < SMALLEST_SCALE:
        raise NotFiniteError(f"float16's gradients overflow at every scale down to {SMALLEST_SCALE:g}, so that no step "
                             f"is taken: use --precision {'bf16 or ' * has_bfloat16(run.device)}fp32")
    skipped = int(run.skipped_steps)
    bad = [i for i, loss in enumerate(logger["total"].recent) if not math.isfinite(loss)]
    if skipped or bad:
        i = max(steps - skipped, 0) if skipped else bad[0]
        losses = {name: logger[name].recent[i] for name in ("total", "image", "patch") if name in logger.meters}
        message = describe_step(run, run.step - steps + i, losses, run.bad_norms if skipped else None)
        if skipped and run.optimizer.defaults.get("fused"):  # others have taken those steps
            run.step -= skipped
        raise NotFiniteError(message)


def describe_step(run: TrainingRun, step: int, losses: dict[str, float], norms: torch.Tensor | None) -> str:
    """One line: what was not finite at a step, and what to try."""
    epoch, step_of_epoch = divmod(step, run.steps_per_epoch)
    terms = ", ".join(f"{name} {float(losses[name]):.4g}" for name in ("image", "patch") if name in losses)
    message = f"the loss was {float(losses['total']):.4g}" + (f" ({terms})" if terms else "")
    bad = [] if norms is None else (~norms.isfinite()).nonzero().flatten().tolist()
    if bad:
        names = [name for name, p in run.student_module.named_parameters() if p.requires_grad]
        message += f" and {len(bad)} of {len(norms)} gradients were not finite, first that of {names[bad[0]]},"
    return (f"{message} at step {step_of_epoch} of epoch {epoch} (iteration {step}): the same command continues from "
            "the last checkpoint; try --precision fp32, a smaller --clip_grad or --lr")


# ----------------------------------------------------------------------------------------------------------------------
# One epoch


def clipping(norms: torch.Tensor, clip: float) -> dict[str, torch.Tensor]:
    """The largest norm, and the share of tensors that clip_gradients scales down, on the device.

    Args:
        norms: of the gradients before clipping.
        clip: largest norm that stays as it is; 0 for no clipping.
    """
    clipped = norms > clip if clip else torch.zeros_like(norms)
    return {"gradient_norm": norms.max(), "clipped": clipped.float().mean()}


def train_one_epoch(run: TrainingRun, loader: CropLoader, log_every: int = 10, logger: MetricLogger | None = None,
                    after_step: Callable[[], None] = lambda: None,
                    on_log: Callable[[MetricLogger], None] = lambda _: None) -> dict[str, float]:
    """Train for one epoch, or for the rest of one.

    Args:
        log_every: steps between two lines of progress, printed by rank 0.
        logger: holds the sums of the epoch's earlier steps, if any.
        after_step: called after every step but the epoch's last; an exception from it ends the epoch.
        on_log: called on rank 0 with the logger after every line of progress.

    Returns:
        the epoch's means over all ranks, and the last step's learning rate and weight decay.

    Raises:
        NotFiniteError: a loss or a gradient was NaN or infinite.
    """
    logger = logger or MetricLogger(window=log_every)
    batches, steps = iter(loader), run.steps_per_epoch
    images_per_step = loader.batch_size * run.accum_steps * get_world_size()
    for step in range(run.step % steps + 1, steps + 1):
        losses = train_step(run, islice(batches, run.accum_steps))
        logger.update(**losses._asdict(), **clipping(run.gradient_norms, run.clip_grad))
        if step % log_every == 0 or step == steps:
            logger.read()  # the epoch's only wait for the device
            check_logged_steps(run, logger)
            if is_main_process():
                try_print(progress_line(logger, run, images_per_step))
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
    """K of each term in use; a uniform head has the loss ln K."""
    terms = {"image": dino_loss.center.shape[-1], "patch": dino_loss.patch_center.shape[-1]}
    return terms if dino_loss.patch_loss_weight else {"image": terms["image"]}


def progress_line(logger: MetricLogger, run: TrainingRun, images_per_step: int) -> str:
    """Position, losses beside ln K, learning rate, speed, remaining time and peak memory."""
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
    """Warn of a head that does not learn or a teacher that has collapsed, judging by an epoch's means.

    Args:
        stats: from train_one_epoch.
        warmed_up: whether the learning rate's warm-up ended before this epoch.
        batch_size: images per process; fewer than 8 may well be alike, which is no collapse.
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
