"""The paper's two losses in plain form, to read and to change. fused_loss.py computes the same in less memory.

Each of B images has V views (crops), the two global ones first. With teacher's logits t and student's logits s:

    P_t = softmax((t − C) / τ_t)        P_s = softmax(s / τ_s)        H(p, q) = −Σ_k p_k log q_k

    image = mean over views a ∈ {0, 1} and v ≠ a of H(P_t(view a), P_s(view v))     DINO (Caron et al. 2021), Eq. 3
    patch = mean over views, and over the patches i of each, of H(P_t(positives of i), P_s(i))       SelfPatch, Sec. 3
    loss = image + 0.1 · patch

The centres C prevent one collapse, where the teacher assigns all samples to the same prototype; the low temperature
τ_t prevents the other, where it spreads each sample evenly over all prototypes.
"""
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from selfpatch.distributed.processes import get_world_size
from selfpatch.method.schedules import cosine_schedule
from selfpatch.method.vision_transformer import CropLogits, Logits


class Losses(NamedTuple):
    """Scalars of one step, float32, in nats.

    The entropies are those of the teacher's mean assignment over the batch: 0 if it has collapsed to one prototype,
    ln K if it uses all prototypes equally.
    """
    total: torch.Tensor
    image: torch.Tensor
    patch: torch.Tensor
    image_entropy: torch.Tensor
    patch_entropy: torch.Tensor


def cross_entropy(p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """H(p, q) = −Σ_k p_k log q_k of distributions [..., K] -> [...]."""
    return -(p * log_q).sum(-1)


def entropy(p: torch.Tensor) -> torch.Tensor:
    """Entropy of the distribution p [K]."""
    return -(p * p.clamp_min(1e-30).log()).sum()


class DINOLoss(nn.Module):
    """Cross-entropy between the centred, sharpened teacher and the student, for images and for patches.

    To try a variant, subclass and override targets, teacher_probs, student_log_probs, image_loss or patch_loss;
    autograd does the rest.

    Args:
        out_dim, out_dim_selfpatch: prototypes of the image head and of the patch head.
        ncrops: V, views of each image.
        warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs: τ_t rises linearly from the first to the second
            over the warm-up epochs, then stays constant.
        nepochs: unused; part of DINO's signature.
        student_temp: τ_s.
        center_momentum: of the centres' moving average.
        patch_loss_weight: 0 gives DINO's loss.
    """

    def __init__(self, out_dim: int, out_dim_selfpatch: int, ncrops: int, warmup_teacher_temp: float = 0.04,
                 teacher_temp: float = 0.04, warmup_teacher_temp_epochs: int = 0, nepochs: int = 1,
                 student_temp: float = 0.1, center_momentum: float = 0.9, patch_loss_weight: float = 0.1):
        super().__init__()
        self.ncrops, self.student_temp, self.center_momentum = ncrops, student_temp, center_momentum
        self.patch_loss_weight = patch_loss_weight
        # the warm-up, and then constant: a cosine between equal values
        self.teacher_temp = cosine_schedule(teacher_temp, teacher_temp, steps=warmup_teacher_temp_epochs,
                                            warmup_steps=warmup_teacher_temp_epochs, start=warmup_teacher_temp)
        self.register_buffer("center", torch.zeros(1, 1, out_dim))
        self.register_buffer("patch_center", torch.zeros(1, out_dim_selfpatch))

    def forward(self, student: CropLogits, teacher: CropLogits, epoch: int) -> Losses:
        """Losses of one batch. The centres stay as they are: batch_means and update_centers move them.

        Args:
            student: logits of all V views.
            teacher: logits of all V views; of the two global ones if patch_loss_weight is 0.
            epoch: counted from 0; sets the teacher's temperature.
        """
        temp = self.teacher_temp(epoch)
        image, image_entropy = self.image_loss(student.image, teacher.image, temp)
        patch, patch_entropy = torch.zeros_like(image), torch.zeros_like(image)
        if self.patch_loss_weight:
            patch, patch_entropy = self.patch_loss(student.patches, teacher.patches, temp)
        return Losses(image + self.patch_loss_weight * patch, image, patch, image_entropy, patch_entropy)

    def targets(self, teacher: nn.Module, crops: list[torch.Tensor]) -> CropLogits:
        """The teacher's logits, called without gradients: override it for a teacher that sees other images.

        Args:
            teacher: a MultiCropWrapper.
            crops: V normalised batches [B, 3, H, W], those that the student sees.
        """
        return teacher.targets(crops)

    def teacher_probs(self, logits: torch.Tensor, center: torch.Tensor, temp: float) -> torch.Tensor:
        """P_t = softmax((t − C) / τ_t), [..., K], in float32 under autocast too."""
        return ((logits.float() - center) / temp).softmax(-1)

    def student_log_probs(self, logits: torch.Tensor) -> torch.Tensor:
        """log P_s = log softmax(s / τ_s), [..., K], in float32 under autocast too."""
        return F.log_softmax(logits.float() / self.student_temp, dim=-1)

    def image_loss(self, student: Logits, teacher: Logits, temp: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Compare each of the teacher's two global views with all other views of the student (DINO, Eq. 3).

        Args:
            student, teacher: image logits [V·B, K], view by view.

        Returns:
            the loss, and the entropy of the teacher's mean assignment.
        """
        log_q = self.student_log_probs(student.dense()).unflatten(0, (self.ncrops, -1))  # [V, B, K]
        batch_size = log_q.shape[1]
        p = self.teacher_probs(teacher.dense()[:2 * batch_size], self.center[0], temp).unflatten(0, (2, -1))
        pairs = [cross_entropy(p[a], log_q[v]).mean() for a in (0, 1) for v in range(self.ncrops) if v != a]
        return torch.stack(pairs).mean(), entropy(p.mean((0, 1)))

    def patch_loss(self, student: list[Logits], teacher: list[Logits],
                   temp: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Compare each patch of the student with its positives, which the teacher aggregates in the same view.

        All views weigh the same, so a patch of a small local crop weighs more than one of a global crop.

        Args:
            student, teacher: patch logits [V_r·B, N_r, K] for each run of V_r equally sized views.

        Returns:
            the loss, and the entropy of the teacher's mean assignment.
        """
        losses, probs = [], []
        for s, t in zip(student, teacher, strict=True):
            p = self.teacher_probs(t.dense(), self.patch_center, temp)
            losses.append(cross_entropy(p, self.student_log_probs(s.dense())).mean(1))  # [V_r·B]
            probs.append(p.mean(1))
        return torch.cat(losses).mean(), entropy(torch.cat(probs).mean(0))

    @torch.no_grad()
    def batch_means(self, teacher: CropLogits) -> list[torch.Tensor]:
        """Mean logits over all views: of images [1, 1, out_dim] and, with a patch loss, patches [1, out_dim_selfpatch].

        Call it outside autocast, since the centres are float32.
        """
        means = [teacher.image.dense().mean(0)[None, None]]
        if self.patch_loss_weight:
            rows = torch.cat([patches.dense().flatten(0, 1) for patches in teacher.patches])
            means.append(rows.mean(0, keepdim=True))
        return means

    @torch.no_grad()
    def update_centers(self, batch_means: Sequence[list[torch.Tensor]]) -> None:
        """C ← m·C + (1 − m)·(mean logits of one step) (DINO, Eq. 4).

        Args:
            batch_means: from the method of that name, for each small batch of the step; averaged over them and over
                all ranks.
        """
        self.start_moving(batch_means)()

    def start_update(self, batch_means: Sequence[list[torch.Tensor]]) -> Callable[[], None]:
        """Begin the exchange of update_centers with other ranks; the function returned finishes the update.

        Work between the two, a backward pass, does not wait for the exchange.
        """
        if type(self).update_centers is not DINOLoss.update_centers:  # overridden by a variant
            return partial(self.update_centers, batch_means)
        return self.start_moving(batch_means)

    @torch.no_grad()
    def start_moving(self, batch_means: Sequence[list[torch.Tensor]]) -> Callable[[], None]:
        """Begin to average the means over ranks; the function returned waits for that, and moves the centres."""
        means, exchange = [torch.stack(means).mean(0) for means in zip(*batch_means, strict=True)], None
        if get_world_size() > 1:
            sums = torch.cat([mean.flatten() for mean in means])
            exchange = dist.all_reduce(sums, async_op=True)
            means = sums.split([mean.numel() for mean in means])  # views

        @torch.no_grad()
        def finish() -> None:
            if exchange:
                exchange.wait()
                sums.div_(get_world_size())
            # without a patch loss there are no patch means, and the patch centre stays as it is
            for center, mean in zip((self.center, self.patch_center), means, strict=False):
                center.lerp_(mean.view_as(center), 1 - self.center_momentum)

        return finish
