"""Image and patch self-distillation with centring (DINO, Sec. 3.1; SelfPatch, its patch-level loss)."""
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from utils import get_world_size
from vision_transformer import Logits

# Logits held at once: 16 MiB on the CPU in float32, 128 MiB on a GPU in half precision, which wants large products
HELD_AT_ONCE = {"cpu": 2**22, "cuda": 2**26}


class Losses(NamedTuple):
    """What one step gives, scalars in float32 (nats). The entropies are those of the teacher's mean assignment over
    the batch: 0 where every sample gets the same prototype, ln K where the teacher has gone uniform."""
    total: torch.Tensor
    image: torch.Tensor
    patch: torch.Tensor
    image_entropy: torch.Tensor
    patch_entropy: torch.Tensor


def entropy(p: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of the distribution p [K]."""
    return -(p * p.clamp_min(1e-30).log()).sum()


# ----------------------------------------------------------------------------------------------------------------------
# Cross-entropy from the factors of the logits


def compare(student: torch.Tensor, teacher: torch.Tensor,
            center: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy of some samples, in float32 whatever the logits are in, and its gradient, in one go.

    With one teacher view each student view answers to it; with two, to those of the two that are not itself.

    Args:
        student, teacher: logits over their temperatures, [V, m, K] and [1 or 2, m, K].
        center: over the teacher's temperature, [K].

    Returns:
        the sum over views and samples; its gradient by student, in student's dtype; the sum of the teacher's
        assignments, [K].
    """
    p = (teacher - center).softmax(-1)
    target = p
    if len(p) == 2:
        target = torch.cat([p.flip(0), p.sum(0, keepdim=True).expand(len(student) - 2, -1, -1)])
    log_q = F.log_softmax(student, -1, dtype=torch.float32)
    loss = -(target * log_q).sum()
    # a view with two teachers weighs twice: the gradient of cross-entropy is mass·q − target
    mass = torch.ones_like(log_q[:, :1, :1])
    mass[len(p):] = len(p)
    return loss, (mass * log_q.exp() - target).to(student.dtype), p.sum((0, 1))


class Distillation(torch.autograd.Function):
    """Mean over samples of what compare gives, from z and prototypes, a few samples' logits at a time.

    The loss is a number, so its gradient is known up to a factor as soon as the logits are: it is taken to z and to
    the prototypes at once, and logits are neither kept for the backward pass nor formed again in it.
    """

    @staticmethod
    def forward(ctx, z: torch.Tensor, weight: torch.Tensor, teacher: Logits, center: torch.Tensor, temp: float,
                student_temp: float, compare: Callable) -> tuple[torch.Tensor, torch.Tensor]:
        """Student's z [V, M, D] and weight [K, D], teacher's z [1 or 2, M, D] -> loss, mean assignment [K]."""
        (views, samples), prototypes, kind = z.shape[:2], len(weight), z.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else z.dtype
        with torch.autocast(kind, enabled=False):
            w, teacher_w, center = weight.to(dtype), teacher.weight.to(dtype), center / temp
            grad_z, grad_w = torch.empty_like(z), None
            loss, mass = z.new_zeros(()), z.new_zeros(prototypes)
            held = HELD_AT_ONCE.get(kind, HELD_AT_ONCE["cuda"])
            parts = -(-views * samples * prototypes // held)
            step = -(-samples // parts)
            for rows in (slice(first, first + step) for first in range(0, samples, step)):
                x, y = ((t[:, rows] / tau).to(dtype) for t, tau in ((z, student_temp), (teacher.z, temp)))
                one_loss, grad, one_mass = compare(F.linear(x, w), F.linear(y, teacher_w), center)
                loss += one_loss
                mass += one_mass
                grad_z[:, rows] = grad @ w
                one_grad_w = (grad.flatten(0, 1).T @ z[:, rows].flatten(0, 1).to(dtype)).to(weight.dtype)
                grad_w = one_grad_w if grad_w is None else grad_w.add_(one_grad_w)
            ctx.save_for_backward(grad_z, grad_w)
            ctx.factor = 1 / (samples * student_temp)
            mass = mass / (len(teacher.z) * samples)
            ctx.mark_non_differentiable(mass)
            return loss / samples, mass

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: torch.Tensor, _):
        # the factor comes last, in float32: a mean over 87,000 patches is below what float16 can tell from 0
        grad_z, grad_w = (grad * (grad_loss * ctx.factor) for grad in ctx.saved_tensors)
        return grad_z, grad_w, None, None, None, None, None


# ----------------------------------------------------------------------------------------------------------------------
# The two losses


class DINOLoss(nn.Module):
    """Cross-entropy between the sharpened, centred teacher and the student, for images and for patches.

    Args:
        out_dim, out_dim_selfpatch: prototypes of the image and of the patch head.
        ncrops: views of an image, the two global ones first; the student sees all of them.
        warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, nepochs: the teacher's temperature goes
            linearly from the first to the second in so many epochs and stays there.
        patch_loss_weight: weight of the patch term; with 0 this is DINO's loss.
    """

    def __init__(self, out_dim: int, out_dim_selfpatch: int, ncrops: int, warmup_teacher_temp: float,
                 teacher_temp: float, warmup_teacher_temp_epochs: int, nepochs: int, student_temp: float = 0.1,
                 center_momentum: float = 0.9, patch_loss_weight: float = 0.1):
        super().__init__()
        self.ncrops, self.student_temp, self.center_momentum = ncrops, student_temp, center_momentum
        self.patch_loss_weight = patch_loss_weight
        self.uses_patches = patch_loss_weight > 0
        self.register_buffer("center", torch.zeros(1, 1, out_dim))
        self.register_buffer("patch_center", torch.zeros(1, out_dim_selfpatch))
        self.teacher_temp_schedule = np.concatenate((
            np.linspace(warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs),
            np.full(max(nepochs - warmup_teacher_temp_epochs, 0), teacher_temp)))
        self.compare, self.seen = compare, []

    def compile(self, **kwargs) -> None:
        """Fuse the passes over the logits; products and loop stay as they are."""
        self.compare = torch.compile(compare, **kwargs)

    def forward(self, student: tuple, teacher: tuple, epoch: int, last: bool = True) -> Losses:
        """Losses of one batch; the centres move afterwards, by means over all ranks.

        Args:
            student, teacher: image and patch logits as MultiCropWrapper gives them, of all the views (of the
                global ones alone for the teacher where patch_loss_weight is 0).
            last: of the small batches that make one step; until it the centres stay.
        """
        temp = float(self.teacher_temp_schedule[epoch])
        image, image_entropy = self.image_loss(student[0], teacher[0], temp)
        patch, patch_entropy = image.new_zeros(()), image.new_zeros(())
        if self.uses_patches:
            patch, patch_entropy = self.patch_loss(student[1], teacher[1], temp)
        self.seen.append(self.mean_logits(teacher))
        if last:
            self.move_centers()
        return Losses(image + self.patch_loss_weight * patch, image, patch, image_entropy, patch_entropy)

    def image_loss(self, student: Logits, teacher: Logits, temp: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Each global teacher view against every other student view (DINO, Eq. 3); logits [V·B, out_dim]."""
        z = student.z.unflatten(0, (self.ncrops, -1))
        globals_alone = Logits(teacher.z[:2 * z.shape[1]].unflatten(0, (2, -1)), teacher.weight)
        loss, mass = Distillation.apply(z, student.weight, globals_alone, self.center[0, 0], temp, self.student_temp,
                                        self.compare)
        return loss / (2 * (self.ncrops - 1)), entropy(mass)

    def patch_loss(self, student: list[Logits], teacher: list[Logits],
                   temp: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Each patch against its positives' summary in the same view (SelfPatch); lists of [V·B, N, out].

        Every view weighs the same, so a patch of a small local crop weighs more than one of a global crop.
        """
        views, loss, mass = sum(len(s.z) for s in student), 0.0, 0.0
        for s, t in zip(student, teacher, strict=True):
            rows = Logits(t.z.flatten(0, 1)[None], t.weight)
            one_loss, one_mass = Distillation.apply(s.z.flatten(0, 1)[None], s.weight, rows, self.patch_center[0],
                                                    temp, self.student_temp, self.compare)
            loss = loss + one_loss * (len(s.z) / views)
            mass = mass + one_mass * (len(s.z) / views)
        return loss, entropy(mass)

    @torch.no_grad()
    def mean_logits(self, teacher: tuple) -> list[torch.Tensor]:
        """Mean image logits [1, 1, out_dim], and patch logits [1, out_dim_selfpatch], over all views and samples.

        The mean is taken before the product, which is linear: views that count here alone need no logits.
        """
        image, patches = teacher
        with torch.autocast(image.z.device.type, enabled=False):
            means = [F.linear(image.z.mean(0), image.weight)[None, None]]
            if self.uses_patches:
                z = torch.cat([t.z.flatten(0, 1) for t in patches]).mean(0, keepdim=True)
                means.append(F.linear(z, patches[0].weight))
        return means

    @torch.no_grad()
    def move_centers(self) -> None:
        """Move the centres by the mean of what has been seen since they last moved, over all ranks."""
        for center, means in zip((self.center, self.patch_center), zip(*self.seen, strict=True), strict=False):
            mean = sum(means) / len(means)
            if get_world_size() > 1:
                dist.all_reduce(mean)
                mean = mean / get_world_size()
            center.lerp_(mean, 1 - self.center_momentum)
        self.seen = []
