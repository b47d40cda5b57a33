"""Exact nearest neighbours, and weighted k-NN classification (Wu et al. 2018, Sec. 3.4, as DINO evaluates).

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

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07
BLOCK = 4096  # queries searched and voted on together
FLOAT32_BYTES = 2**28  # a bank of up to 256 MiB is kept in float32, a larger one in half precision
QUERY_ROWS, BANK_ROWS = 256, 131_072  # of one product: 128 MiB of float32 cosines
SPARE = 8  # further rows that nearest compares
ROUNDING = 2e-6  # twice the effect of the order of sums on a product of two vectors of unit length
REFINED_QUERIES = 8  # whose rows are gathered at a time on a CPU, to stay in its cache


# ---------------------------------------------------------------- search

@torch.inference_mode()
def search(queries: torch.Tensor, bank: torch.Tensor, k: int, query_rows: int = QUERY_ROWS,
           bank_rows: int = BANK_ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    """The k rows of a bank with the largest products with each query, largest first.

    Products are in float32 for any bank; each chunk of the bank is converted once.

    Args:
        queries: [Q, D], float32.
        bank: [M, D], float32 or half precision.
        k: at most M.
        query_rows, bank_rows: rows of a chunk; a product takes 4 · query_rows · bank_rows bytes.

    Returns:
        Products, float32 [Q, k], and row numbers [Q, k].
    """
    k = min(k, len(bank))
    best = queries.new_full((len(queries), k), -torch.inf)
    rows = torch.zeros(len(queries), k, dtype=torch.long, device=queries.device)
    # one buffer for all products: freeing and allocating such memory anew costs a sixth of the time
    buffer = queries.new_empty(min(query_rows, len(queries)) * min(bank_rows, len(bank)))
    for start in range(0, len(bank), bank_rows):
        part = bank[start:start + bank_rows].float().T
        for first in range(0, len(queries), query_rows):
            chunk = slice(first, first + query_rows)
            q = queries[chunk]
            products = torch.mm(q, part, out=buffer[:len(q) * part.shape[1]].view(len(q), -1))
            values, columns = products.topk(min(k, part.shape[1]), dim=1)
            if start:
                values = torch.cat([best[chunk], values], dim=1)
                columns = torch.cat([rows[chunk], columns + start], dim=1)
                values, order = values.topk(k, dim=1)
                columns = columns.gather(1, order)
            best[chunk, :values.shape[1]], rows[chunk, :values.shape[1]] = values, columns
    return best, rows


def nearest(queries: torch.Tensor, bank: torch.Tensor, k: int, query_rows: int = QUERY_ROWS,
            bank_rows: int = BANK_ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    """search() with results that do not depend on the chunks; equal products are ordered by row.

    A matrix product sums in an order that depends on its sizes. Hence the rows found, and SPARE more, are multiplied
    again one by one and ordered by the result. On a CPU, products and rows are then the same to the bit for any chunks,
    unless more than SPARE rows beyond the k-th equal it up to rounding (1e-6 for vectors of unit length), such as
    copies of one row: the chunks then decide which of these are found.
    """
    rows = search(queries, bank, k + SPARE, query_rows, bank_rows)[1].sort(dim=1).values
    step = REFINED_QUERIES if queries.device.type == "cpu" else query_rows
    products = [(bank[r].float() * q[:, None]).sum(-1)
                for q, r in zip(queries.split(step), rows.split(step), strict=True)]
    values, order = torch.cat(products).sort(dim=1, descending=True, stable=True)
    return values[:, :k], rows.gather(1, order)[:, :k]


@torch.inference_mode()
def ordered_search(queries: torch.Tensor, bank: torch.Tensor, k: int, query_rows: int = QUERY_ROWS,
                   bank_rows: int = BANK_ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    """search() for vectors of unit length, with rows that do not depend on the chunks, like those of nearest().

    Only products close to another are computed again, so that it is nearly as fast as search().
    """
    values, rows = search(queries, bank, k + SPARE, query_rows, bank_rows)
    close = values.diff(dim=1).abs() < ROUNDING
    query, place = (F.pad(close, (0, 1)) | F.pad(close, (1, 0))).nonzero(as_tuple=True)
    for some in torch.arange(len(query), device=query.device).split(QUERY_ROWS * SPARE):
        one = query[some], place[some]
        values[one] = (bank[rows[one]].float() * queries[one[0]]).sum(-1)
    rows, order = rows.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values[:, :k], rows.gather(1, order)[:, :k]


# ---------------------------------------------------------------- classification

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
        train, val: labelled_images.share_loader of the training and test images.
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
