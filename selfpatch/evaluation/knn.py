"""Weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018, Sec. 3.4, as DINO evaluates).

    accuracies = knn_accuracy(ImageFeature(teacher), train_loader, val_loader)
    print(accuracies[20].top1)

The bank of training features is shared out over the processes, which all see every query. One search for the largest k
serves all smaller ones.
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
FLOAT32_BYTES = 2**28  # a bank of up to 256 MiB is kept in float32, a larger one in half precision


class Accuracy(NamedTuple):
    """Shares of the queries, in per cent, whose class is the first, or among the first five, by votes."""
    top1: float
    top5: float


def bank_dtype(rows: int, dim: int) -> torch.dtype:
    """Type of a bank of so many rows over all processes."""
    return torch.float32 if 4 * rows * dim <= FLOAT32_BYTES else torch.float16


def neighbours(queries: torch.Tensor, bank: torch.Tensor, labels: torch.Tensor, k: int,
               **chunks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and classes [Q, k] of each query's neighbours in the bank of all processes, nearest first.

    Of equal cosines, the row of the lowest number comes first: row i of process r of R has the number i · R + r, as
    the images that it is made from have, up to those that cannot be read.

    Args:
        queries: [Q, D], the same in every process.
        bank, labels: [M, D] and [M], this process's share; k is at most the sum of all M.
        chunks: query_rows and bank_rows of search.
    """
    # cosines of different shares can only be compared where all are exact
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
    """Place of each query's true class by votes, 0 for the first, [Q].

    A neighbour votes for its class with exp(cosine / temperature). Of classes with equal votes, such as none, the one
    of the lowest number comes first.

    Args:
        cosines, classes: [Q, k] of the neighbours.
        truth: [Q], the queries' classes.
    """
    votes = cosines.new_zeros(len(cosines), num_classes)
    # relative to the largest, which changes no order: exp(1 / 0.01) would overflow
    votes.scatter_add_(1, classes, ((cosines - cosines.amax(1, keepdim=True)) / temperature).exp())
    own = votes.gather(1, truth[:, None])
    before = torch.arange(num_classes, device=votes.device) < truth[:, None]
    return (~(votes <= own) | (votes == own) & before).sum(1)


@torch.inference_mode()
def classify(queries: torch.Tensor, truth: torch.Tensor, bank: torch.Tensor, labels: torch.Tensor, num_classes: int,
             ks: Sequence[int] = KS, temperature: float = TEMPERATURE, block: int = 4096,
             **chunks: int) -> dict[int, Accuracy]:
    """Accuracy by k, from one search; a k above the size of the bank is replaced by that size.

    Args:
        queries, truth: features [Q, D] of unit length and classes [Q], the same in every process.
        bank, labels: this process's share of the training features [M, D], of unit length, and of their classes [M].
        block: queries that are searched for and voted on together.
        chunks: query_rows and bank_rows of search.
    """
    total = int(sum_over_processes(torch.tensor(len(labels), device=labels.device)))
    if not total or not len(queries):
        raise ConfigError(f"none of the {'test' if total else 'training'} images can be read")
    ks = sorted({min(k, total) for k in ks})
    hits = {k: [0, 0] for k in ks}
    for q, true in zip(queries.split(block), truth.split(block), strict=True):
        cosines, classes = neighbours(q.float(), bank, labels, ks[-1], **chunks)
        for k in ks:
            ranks = class_ranks(cosines[:, :k], classes[:, :k], true, num_classes, temperature)
            hits[k][0] += int((ranks < 1).sum())
            hits[k][1] += int((ranks < min(5, k)).sum())
    return {k: Accuracy(*(100 * count / len(queries) for count in counts)) for k, counts in hits.items()}


class KnnResult(NamedTuple):
    """Accuracy by k, and this process's share of what it was computed from."""
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
    """Accuracy by k of a network that may be in training: it is put into eval mode for the while.

    Every process calls it, each with its share of the images, and gets the same figures.

    Args:
        feature: of the network, on the device.
        train, val: image_features.share_loader of the images to compare with and to test.
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
