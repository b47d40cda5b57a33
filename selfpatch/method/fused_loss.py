"""DINOLoss without dense logits: the same losses, gradients, centres and entropies. Training uses this form.

Why: a batch of 128 images has 1,280 × 65,536 image logits and 87,000 × 4,096 patch logits, for student and teacher
each. The plain form reads and writes each of them about ten times, and keeps several for the backward pass. Here logits
exist only for a chunk of samples at a time. On a CPU that saves 10 % of a step's peak memory; on a GPU it saves memory
traffic, too.

How: the loss is a scalar, so a chunk's logits determine its gradient up to the factor that arrives in the backward
pass. With s the student's logits over their temperature, q = softmax(s), and targets p_1 … p_n of one student view,

    L = Σ_i H(p_i, q)        ∂L/∂s = n·q − Σ_i p_i

and since s = z·Wᵀ/τ_s, the gradients of z and of the prototypes W are products with ∂L/∂s. The forward pass computes
them at once, and drops the chunk's logits.
"""
from collections.abc import Callable

import torch
import torch.nn.functional as F

from selfpatch.method.losses import DINOLoss, entropy
from selfpatch.method.vision_transformer import CropLogits, Logits

# Logits of one chunk: 16 MiB in float32 on a CPU, about its caches' size; 128 MiB in half precision on a GPU, which
# is efficient with large matrix products
MAX_CHUNK_LOGITS = {"cpu": 2**22, "cuda": 2**26}


def chunk_loss(student: torch.Tensor, teacher: torch.Tensor,
               center: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy of a chunk of samples and its gradient, in float32 whatever the logits' dtype.

    One teacher view is compared with every student view. Of two (DINO's global views), student views 0 and 1 are
    compared with the other one, and every later view with both.

    Args:
        student, teacher: logits divided by their temperatures, [V, m, K] and [1 or 2, m, K].
        center: divided by the teacher's temperature, [K].

    Returns:
        the sum over views and samples; its gradient with respect to student, in student's dtype; the sum of the
        teacher's assignments, [K].
    """
    p = (teacher - center).softmax(-1)
    target = p
    if len(p) == 2:
        target = torch.cat([p.flip(0), p.sum(0, keepdim=True).expand(len(student) - 2, -1, -1)])
    log_q = F.log_softmax(student, -1, dtype=torch.float32)
    loss = -(target * log_q).sum()
    q = log_q.exp()
    q[len(p):] *= len(p)  # n above
    return loss, (q - target).to(student.dtype), p.sum((0, 1))


class FusedCrossEntropy(torch.autograd.Function):
    """Mean over samples of chunk_loss from factored logits, with gradients for z and the prototypes."""

    @staticmethod
    def forward(ctx, z: torch.Tensor, prototypes: torch.Tensor, teacher: Logits, center: torch.Tensor, temp: float,
                student_temp: float, chunk_loss: Callable) -> tuple[torch.Tensor, torch.Tensor]:
        """Student's z [V, M, D] and prototypes [K, D], teacher's z [1 or 2, M, D] -> loss, mean assignment [K]."""
        (views, samples), device_type = z.shape[:2], z.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else z.dtype
        with torch.autocast(device_type, enabled=False):
            w, teacher_w, center = prototypes.to(dtype), teacher.prototypes.to(dtype), center / temp
            # divide the factors instead of the logits: they are far fewer, and still float32
            x, y = ((t / tau).to(dtype) for t, tau in ((z, student_temp), (teacher.z, temp)))
            grad_z, grad_w = torch.empty_like(z), None
            loss, assignments = z.new_zeros(()), z.new_zeros(len(prototypes))
            # equal chunks, so that compiled code sees at most two shapes per call
            max_logits = MAX_CHUNK_LOGITS.get(device_type, MAX_CHUNK_LOGITS["cuda"])
            num_chunks = -(-views * samples * len(prototypes) // max_logits)
            chunk_size = -(-samples // num_chunks)
            for rows in (slice(start, start + chunk_size) for start in range(0, samples, chunk_size)):
                part, grad, p_sum = chunk_loss(F.linear(x[:, rows], w), F.linear(y[:, rows], teacher_w), center)
                loss += part
                assignments += p_sum
                grad_z[:, rows] = grad @ w
                part = (grad.flatten(0, 1).T @ z[:, rows].flatten(0, 1).to(dtype)).to(prototypes.dtype)
                grad_w = part if grad_w is None else grad_w.add_(part)
            ctx.save_for_backward(grad_z, grad_w)
            ctx.factor = 1 / (samples * student_temp)
            assignments = assignments / (len(teacher.z) * samples)
            ctx.mark_non_differentiable(assignments)
            return loss / samples, assignments

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: torch.Tensor, _):
        # apply the factor last, in float32: 1 / 87,000 patches is below float16's smallest number
        grad_z, grad_w = (grad * (grad_loss * ctx.factor) for grad in ctx.saved_tensors)
        return grad_z, grad_w, None, None, None, None, None


class FusedDINOLoss(DINOLoss):
    """DINOLoss computed by FusedCrossEntropy; arguments and state dict are the same.

    It does not call teacher_probs and student_log_probs: to override them, subclass the plain DINOLoss.
    """

    chunk_loss = staticmethod(chunk_loss)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for name in ("student_log_probs", "teacher_probs"):
            if getattr(cls, name) is not getattr(DINOLoss, name):
                raise TypeError(f"{cls.__name__}.{name} would have no effect: derive it from DINOLoss")

    def compile(self, **kwargs) -> None:
        """Compile the elementwise passes over a chunk's logits; matrix products and the loop stay as they are."""
        self.chunk_loss = torch.compile(chunk_loss, **kwargs)

    def image_loss(self, student: Logits, teacher: Logits, temp: float) -> tuple[torch.Tensor, torch.Tensor]:
        z = student.z.unflatten(0, (self.ncrops, -1))
        global_views = Logits(teacher.z[:2 * z.shape[1]].unflatten(0, (2, -1)), teacher.prototypes)
        loss, assignments = FusedCrossEntropy.apply(z, student.prototypes, global_views, self.center[0, 0], temp,
                                                    self.student_temp, self.chunk_loss)
        return loss / (2 * (self.ncrops - 1)), entropy(assignments)

    def patch_loss(self, student: list[Logits], teacher: list[Logits],
                   temp: float) -> tuple[torch.Tensor, torch.Tensor]:
        crops, loss, assignments = sum(len(s.z) for s in student), 0.0, 0.0
        for s, t in zip(student, teacher, strict=True):
            rows = Logits(t.z.flatten(0, 1)[None], t.prototypes)  # all patches as samples of one view
            part, p_mean = FusedCrossEntropy.apply(s.z.flatten(0, 1)[None], s.prototypes, rows, self.patch_center[0],
                                                   temp, self.student_temp, self.chunk_loss)
            loss = loss + part * (len(s.z) / crops)
            assignments = assignments + p_mean * (len(s.z) / crops)
        return loss, entropy(assignments)

    @torch.no_grad()
    def batch_means(self, teacher: CropLogits) -> list[torch.Tensor]:
        """Means as in DINOLoss, taken before the product, which is linear: the local views need no logits."""
        image, patches = teacher
        means = [F.linear(image.z.mean(0), image.prototypes)[None, None]]
        if self.patch_loss_weight:
            z = torch.cat([t.z.flatten(0, 1) for t in patches]).mean(0, keepdim=True)
            means.append(F.linear(z, patches[0].prototypes))
        return means
