"""The published order of work, part by part, for train_step.py to compare with: the same numbers, computed as there."""
import torch
import torch.nn.functional as F

from selfpatch.method.losses import DINOLoss, Losses
from selfpatch.method.optim import clip_gradients, update_teacher
from selfpatch.method.selfpatch_head import SelfPatchHead
from selfpatch.method.training_run import TrainingRun
from selfpatch.method.vision_transformer import VisionTransformer

PARTS = ("backbone", "head", "loss", "update")


class PlainBackbone(VisionTransformer):
    """Stochastic depth by multiplication with 0."""

    def _run(self, block, tokens):
        return block(tokens)


class PlainHead(SelfPatchHead):
    """Neighbours gathered before they are compared, keys and values projected after the positives are gathered."""

    fast = False

    def targets(self, x, grid=None):
        B, N, D = x.shape
        index = torch.arange(N, device=x.device).view(grid)
        around = [index.roll((-dy, -dx), (0, 1)).flatten() for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
        neighbours = x[:, torch.stack(around, dim=1)]  # [B, N, 8, D]
        unit, others = F.normalize(x.float(), dim=-1), F.normalize(neighbours.float(), dim=-1)
        best = (others @ unit[..., None])[..., 0].topk(self.k_num, dim=-1).indices
        positives = neighbours.gather(2, best[..., None].expand(-1, -1, -1, D)).flatten(0, 1)
        targets = self.summarise(positives).view(B, N, D)
        return self.norm(torch.cat([self.summarise(x)[:, None], targets], dim=1))


class PlainLoss(DINOLoss):
    """All logits formed once, the teacher's of local images too, compared pair by pair and view by view."""

    def forward(self, student, teacher, epoch):
        temp = self.teacher_temp(epoch)
        (s_image, s_patch), (t_image, t_patch) = ((image.dense().float(), [p.dense().float() for p in patches])
                                                  for image, patches in (student, teacher))
        self.means = [t_image.mean(0)[None, None], torch.cat([t.flatten(0, 1) for t in t_patch]).mean(0, keepdim=True)]
        targets = ((t_image - self.center[0]) / temp).softmax(-1).chunk(self.ncrops)[:2]
        views = (s_image / self.student_temp).chunk(self.ncrops)
        pairs = [torch.sum(-q * F.log_softmax(s, dim=-1), dim=-1).mean()
                 for a, q in enumerate(targets) for v, s in enumerate(views) if v != a]
        patches = []
        for s, t, views in zip(s_patch, t_patch, (2, self.ncrops - 2), strict=False):
            q = ((t - self.patch_center) / temp).softmax(-1)
            patches += [torch.sum(-one_q * F.log_softmax(one_s / self.student_temp, dim=-1), dim=-1).mean()
                        for one_s, one_q in zip(s.chunk(views), q.chunk(views), strict=True)]
        image, patch = sum(pairs) / len(pairs), sum(patches) / len(patches)
        return Losses(image + 0.1 * patch, image, patch, image.new_zeros(()), image.new_zeros(()))

    def batch_means(self, teacher):
        return self.means


@torch.no_grad()
def plain_update(run: TrainingRun) -> None:
    """Clipping, the optimiser's step and the teacher's average, tensor by tensor."""
    for p in run.student.parameters():
        if p.grad is not None:
            factor = run.clip_grad / (p.grad.norm().item() + 1e-6)
            if factor < 1:
                p.grad.mul_(factor)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    momentum = run.schedules.momentum(run.step)
    for p, q in zip(run.student.parameters(), run.teacher.parameters(), strict=True):
        q.mul_(momentum).add_((1 - momentum) * p)


@torch.no_grad()
def fused_update(run: TrainingRun) -> None:
    """The same as the job does it, over all tensors at once."""
    clip_gradients(run.student, run.clip_grad)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    update_teacher(run.student, run.teacher, run.schedules.momentum(run.step))
