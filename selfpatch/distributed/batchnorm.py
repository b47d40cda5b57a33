"""BatchNorm over several processes, for --use_bn_in_head."""
import torch
import torch.distributed as dist
from torch import nn


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
