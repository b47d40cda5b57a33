"""Weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018, Sec. 3.4, as DINO evaluates).

    accuracies = knn_accuracy(ImageFeature(teacher), train_loader, val_loader)
    print(accuracies[20].top1)

Each process holds a share of the bank of training features and sees every query. One search for the largest k serves
all smaller ones.
"""
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from selfpatch.distributed.collectives import gather, gather_rows, sum_over_processes
from selfpatch.distributed.processes import get_rank, get_world_size, together
from selfpatch.errors import ConfigError
from selfpatch.evaluation.image_features import Extracted, ImageFeature, extract
from selfpatch.evaluation.nearest_neighbours import nearest, ordered_search

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07
BLOCK = 4096  # queries searched and voted on together
FLOAT32_BYTES = 2**28  # a bank of up to 256 MiB is kept in float32, a larger one in half precision


class Accuracy(NamedTuple):
    """Per cent of the queries whose class comes first, or among the first five, by votes."""
    top1: float
    top5: float


def bank_dtype(rows: int, dim: int) -> torch.dtype:
    """dtype of a bank [rows, dim], counted over all processes."""
    return torch.float32 if 4 * rows * dim <= FLOAT32_BYTES else torch.float16


def neighbours(queries: torch.Tensor, bank: torch.Tensor, labels: torch.Tensor, k: int,
               **chunks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and classes [Q, k] of each query's neighbours in the bank of all processes, nearest first.

    Equal cosines are ordered by row number: row i of process r of R has the number i · R + r, that of its image unless
    files could not be read.

    Args:
        queries: [Q, D], the same in every process.
        bank, labels: [M, D] and [M], this process's share; k is at most the sum of all M.
        chunks: query_rows and bank_rows of search.
    """
    # cosines from different shares are comparable only if exact
    find = ordered_search if get_world_size() == 1 else nearest
    cosines, rows = find(queries, bank, k, **chunks)
    if get_world_size() == 1:
        return cosines, labels[rows]
    missing = k - cosines.shape[1]  # a share may have fewer than k rows
    parts = (F.pad(cosines, (0, missing), value=-torch.inf), F.pad(labels[rows], (0, missing)),
             F.pad(rows * get_world_size() + get_rank(), (0, missing)))
    cosines, classes, numbers = (gather(part).transpose(0, 1).flatten(1) for part in parts)  # [Q, processes · k]
    order = numbers.argsort(dim=1)
    order = order.gather(1, cosines.gather(1, order).argsort(dim=1, descending=True, stable=True))[:, :k]
    return cosines.gather(1, order), classes.gather(1, order)


def class_ranks(cosines: torch.Tensor, classes: torch.Tensor, truth: torch.Tensor, num_classes: int,
                temperature: float = TEMPERATURE) -> torch.Tensor:
    """Rank of each query's true class by votes, [Q]; 0 is the first.

    A neighbour votes for its class with exp(cosine / temperature). Equal votes, such as none, are ordered by class.

    Args:
        cosines, classes: [Q, k] of the neighbours.
        truth: [Q], the queries' classes.
    """
    votes = cosines.new_zeros(len(cosines), num_classes)
    # relative to the largest cosine, without changing the order: exp(1 / 0.01) would overflow
    votes.scatter_add_(1, classes, ((cosines - cosines.amax(1, keepdim=True)) / temperature).exp())
    own = votes.gather(1, truth[:, None])
    before = torch.arange(num_classes, device=votes.device) < truth[:, None]
    return (~(votes <= own) | (votes == own) & before).sum(1)


@torch.inference_mode()
def classify(queries: torch.Tensor, truth: torch.Tensor, bank: torch.Tensor, labels: torch.Tensor, num_classes: int,
             ks: Sequence[int] = KS, temperature: float = TEMPERATURE, **chunks: int) -> dict[int, Accuracy]:
    """Accuracy by k, from one search; a k above the size of the bank becomes that size.

    Args:
        queries, truth: features [Q, D] of unit length and classes [Q], the same in every process.
        bank, labels: this process's share of the training features [M, D], of unit length, and of their classes [M].
        chunks: query_rows and bank_rows of search.
    """
    total = int(sum_over_processes(torch.tensor(len(labels), device=labels.device)))
    if not total or not len(queries):
        raise ConfigError(f"none of the {'test' if total else 'training'} images can be read")
    ks = sorted({min(k, total) for k in ks})
    hits = {k: [0, 0] for k in ks}
    for q, true in zip(queries.split(BLOCK), truth.split(BLOCK), strict=True):
        cosines, classes = neighbours(q.float(), bank, labels, ks[-1], **chunks)
        for k in ks:
            ranks = class_ranks(cosines[:, :k], classes[:, :k], true, num_classes, temperature)
            hits[k][0] += int((ranks < 1).sum())
            hits[k][1] += int((ranks < min(5, k)).sum())
    return {k: Accuracy(*(100 * count / len(queries) for count in counts)) for k, counts in hits.items()}


class KnnResult(NamedTuple):
    """Accuracy by k, and this process's share of the features."""
    accuracies: dict[int, Accuracy]
    train: Extracted
    val: Extracted


def knn_classification(feature: ImageFeature, train: DataLoader, val: DataLoader, ks: Sequence[int] = KS,
                       temperature: float = TEMPERATURE, device: torch.device | str = "cpu",
                       progress: bool = False) -> KnnResult:
    """Extract the features of this process's share of the images and classify; see knn_accuracy.

    Raises:
        ConfigError: a feature is not finite, or no image can be read; all processes raise it.
    """
    num_classes = len(train.dataset.classes)
    rows = int(sum_over_processes(torch.tensor(len(train.dataset), device=device)))
    dtype = bank_dtype(rows, feature.dim)
    bank, mine = together(lambda: [extract(feature, loader, feature.dim, device, dtype, name if progress else None)
                                   for loader, name in ((train, "training images"), (val, "test images"))])
    queries, truth = gather_rows(mine.features), gather_rows(mine.labels)
    return KnnResult(classify(queries, truth, bank.features, bank.labels, num_classes, ks, temperature), bank, mine)


def knn_accuracy(feature: ImageFeature, train: DataLoader, val: DataLoader, ks: Sequence[int] = KS,
                 temperature: float = TEMPERATURE, device: torch.device | str = "cpu") -> dict[int, Accuracy]:
    """Accuracy by k of a network, which is in eval mode during the call and then in its former mode again.

    Every process calls it with its share of the images and gets the same figures.

    Args:
        feature: its network is on the device.
        train, val: image_features.share_loader of the training and test images.
    """
    modules = [module for module in (feature.model, feature.head) if module is not None]
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.eval()
        return knn_classification(feature, train, val, ks, temperature, device).accuracies
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)
