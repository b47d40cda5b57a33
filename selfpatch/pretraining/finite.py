"""Steps with a loss or a gradient that is not finite: found on the device, and not taken.

On a CPU such a step raises before anything has changed. On a GPU nobody waits for the answer: this step and those after
it, until the log is read, leave the student, the optimiser and the centres as they are (the teacher moves towards that
student); then the run ends. In float16 such steps are normal, as the scaler tries how large a scale may be: they change
nothing, the teacher included, and the run goes on.
"""
import math

import torch
from torch import nn

from selfpatch.errors import TrainingError
from selfpatch.method.losses import Losses
from selfpatch.method.training_run import TrainingRun
from selfpatch.pretraining.logs import MetricLogger

SMALLEST_SCALE = 2.0**-10  # of float16's scaler: after 26 steps in a row that were not finite


class NotFiniteError(TrainingError):
    """A loss or a gradient was NaN or infinite; the student is that before the step."""


def gradient_norms(model: nn.Module) -> torch.Tensor:
    """L2 norm of each parameter's gradient, [number of gradients], without a host-device sync."""
    return torch.stack(torch._foreach_norm([p.grad for p in model.parameters() if p.grad is not None]))


def clipping(norms: torch.Tensor, clip: float) -> dict[str, torch.Tensor]:
    """The largest of the norms, and the share of the tensors that clip_gradients scales down, on the device.

    Args:
        clip: the largest norm that is left as it is; 0 for no clipping.
    """
    clipped = norms > clip if clip else torch.zeros_like(norms)
    return {"gradient_norm": norms.max(), "clipped": clipped.float().mean()}


def check_step(run: TrainingRun, losses: Losses, norms: torch.Tensor) -> torch.Tensor:
    """Whether the coming step may change the run, as a bool on the device.

    Args:
        losses: of the step.
        norms: gradient_norms after the sum over ranks, so that every rank comes to the same answer.

    Raises:
        NotFiniteError: on a CPU, where it may not.
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
    if run.optimizer.defaults.get("fused"):  # the others take the step, and the run ends without saving
        run.optimizer.found_inf = (run.skipped_steps > 0).float()
    return run.skipped_steps == 0


def check_logged_steps(run: TrainingRun, logger: MetricLogger) -> None:
    """Raise NotFiniteError if a loss or gradient since the last call was not finite. It waits for the device."""
    steps = len(logger["total"].recent)  # the window is as long as the steps between two calls
    if run.scaler.is_enabled() and run.scaler.get_scale() < SMALLEST_SCALE:
        raise NotFiniteError(f"float16's gradients overflow at every scale down to {SMALLEST_SCALE:g}, so that no step "
                             "is taken: use --precision bf16 or fp32")
    skipped = int(run.skipped_steps)
    bad = [i for i, loss in enumerate(logger["total"].recent) if not math.isfinite(loss)]
    if skipped or bad:
        i = max(steps - skipped, 0) if skipped else bad[0]
        losses = {name: logger[name].recent[i] for name in ("total", "image", "patch") if name in logger.meters}
        message = describe_step(run, run.step - steps + i, losses, run.bad_norms if skipped else None)
        if skipped and run.optimizer.defaults.get("fused"):  # others have taken the step
            run.step -= skipped
        raise NotFiniteError(message)


def describe_step(run: TrainingRun, step: int, losses: dict[str, float], norms: torch.Tensor | None) -> str:
    """What was not finite at a step, and what to do, in one line."""
    epoch, step_of_epoch = divmod(step, run.steps_per_epoch)
    terms = ", ".join(f"{name} {float(losses[name]):.4g}" for name in ("image", "patch") if name in losses)
    message = f"the loss was {float(losses['total']):.4g}" + (f" ({terms})" if terms else "")
    bad = [] if norms is None else (~norms.isfinite()).nonzero().flatten().tolist()
    if bad:
        names = [name for name, p in run.student_module.named_parameters() if p.requires_grad]
        message += f" and {len(bad)} of {len(norms)} gradients were not finite, first that of {names[bad[0]]},"
    return (f"{message} at step {step_of_epoch} of epoch {epoch} (iteration {step}): the same command continues from "
            "the last checkpoint; try --precision fp32, a smaller --clip_grad or --lr")
