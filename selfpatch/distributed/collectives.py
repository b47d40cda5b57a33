"""Tensors of several processes put together. Every process calls these at once; one alone gets back what it gives."""
import torch
import torch.distributed as dist
import torch.nn.functional as F

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
