"""Collectives on tensors: every process must call them; a single process gets its input back. And BatchNorm on them."""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from selfpatch.distributed.processes import get_world_size


def sum_over_processes(x: torch.Tensor) -> torch.Tensor:
    """The sum of x over all processes, in place; of the same shape everywhere."""
    if get_world_size() > 1:
        dist.all_reduce(x)
    return x


def gather(x: torch.Tensor) -> torch.Tensor:
    """x of every process, [processes, ...], the same on each; of the same shape everywhere."""
    if get_world_size() == 1:
        return x[None]
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.stack(parts)


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """The rows [n, ...] of all processes, first those of rank 0: [sum of n, ...], the same on each."""
    if get_world_size() == 1:
        return rows
    counts = gather(torch.tensor(len(rows), device=rows.device)).tolist()
    padded = F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, max(counts) - len(rows)))
    return torch.cat([part[:count] for part, count in zip(gather(padded), counts, strict=True)])


# ----------------------------------------------------------------------------------------------------------------------
# BatchNorm over all ranks, for --use_bn_in_head


class AllReduce(torch.autograd.Function):
    """Sum over all ranks; the gradient is summed over all ranks as well."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    backward = forward


class GlooSyncBatchNorm(nn.BatchNorm1d):
    """BatchNorm over the rows [R, C] of all ranks, the same number on each; torch's SyncBatchNorm is for GPUs only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        x = x.float()  # under autocast too: means in half precision are too imprecise
        mean = AllReduce.apply(x.mean(0)) / dist.get_world_size()
        var = AllReduce.apply((x - mean).square().mean(0)) / dist.get_world_size()
        with torch.no_grad():
            rows = len(x) * dist.get_world_size()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * rows / (rows - 1), self.momentum)
            self.num_batches_tracked += 1
        return (x - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias


def sync_batchnorms(model: nn.Module, device: torch.device) -> nn.Module:
    """Make the model's BatchNorm layers normalise over all ranks."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm1d:
            module.__class__ = GlooSyncBatchNorm
    return model
