"""Image and patch self-distillation with centring (DINO, Sec. 3.1; SelfPatch, its patch-level loss)."""
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from utils import get_world_size


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

    def forward(self, student: tuple, teacher: tuple, epoch: int) -> Losses:
        """Losses of one batch; the centres move afterwards, by means over all ranks.

        Args:
            student, teacher: image and patch logits as MultiCropWrapper gives them, of all the views (of the
                global ones alone for the teacher where patch_loss_weight is 0).
        """
        temp = float(self.teacher_temp_schedule[epoch])
        # softmax and cross-entropy stay in float32 whatever precision the networks ran in
        with torch.autocast(student[0].device.type, enabled=False):
            image, image_entropy = self.image_loss(student[0], teacher[0], temp)
            self.center.copy_(self._moved(self.center, teacher[0].float().mean(0)))
            if not self.uses_patches:
                return Losses(image, image, image.new_zeros(()), image_entropy, image.new_zeros(()))
            patch, patch_entropy = self.patch_loss(student[1], teacher[1], temp)
            rows = sum(t.shape[0] * t.shape[1] for t in teacher[1])
            self.patch_center.copy_(self._moved(self.patch_center,
                                                sum(t.float().sum((0, 1)) for t in teacher[1]) / rows))
        return Losses(image + self.patch_loss_weight * patch, image, patch, image_entropy, patch_entropy)

    def image_loss(self, student: torch.Tensor, teacher: torch.Tensor,
                   temp: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Each global teacher view against every other student view (DINO, Eq. 3); logits [V·B, out_dim]."""
        s = student.float().unflatten(0, (self.ncrops, -1)) / self.student_temp
        t = teacher[:2 * s.shape[1]].float().unflatten(0, (2, -1))
        p = ((t - self.center) / temp).softmax(-1)
        # H(p, softmax(s)) = lse(s) - p·s, and summed over v ≠ a the second part is one product
        lse = s.logsumexp(-1)
        others = s.sum(0) - s[:2]
        terms = lse.sum(0) - lse[:2] - (p * others).sum(-1)
        return terms.mean() / (self.ncrops - 1), entropy(p.mean((0, 1)))  # each term sums over ncrops − 1 pairs

    def patch_loss(self, student: list[torch.Tensor], teacher: list[torch.Tensor],
                   temp: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Each patch against its positives' summary in the same view (SelfPatch); lists of [V·B, N, out].

        Every view weighs the same, so a patch of a small local crop weighs more than one of a global crop.
        """
        views, loss, mass = sum(len(s) for s in student), 0.0, 0.0
        for s, t in zip(student, teacher, strict=True):
            s = s.float() / self.student_temp
            p = ((t.float() - self.patch_center) / temp).softmax(-1)
            loss = loss + (s.logsumexp(-1) - (p * s).sum(-1)).mean() * (len(s) / views)
            mass = mass + p.mean((0, 1)) * (len(s) / views)
        return loss, entropy(mass)

    def _moved(self, center: torch.Tensor, batch_mean: torch.Tensor) -> torch.Tensor:
        if get_world_size() > 1:
            dist.all_reduce(batch_mean)
            batch_mean = batch_mean / get_world_size()
        return center * self.center_momentum + batch_mean * (1 - self.center_momentum)
