"""Label propagation: the labels of each frame from those of earlier ones, by the similarity of patches.

The protocol of Jabri et al. (2020, Space-Time Correspondence as a Contrastive Random Walk) as used by DINO (Caron et
al. 2021): a patch takes the labels of the topk most similar patches, in a window, of the first frame and the last few.

plain_label_propagation is the formula, to be read and changed. label_propagation computes the same for a few rows of
patches at a time, to save memory; propagation_bounds.py skips most of the products on CPUs.
"""
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

TEMPERATURE = 0.1
MAX_SIMILARITIES = {"cpu": 2**21, "cuda": 2**24}  # per tile: fits a CPU's cache; 64 MB on a GPU


def to_one_hot(labels: torch.Tensor) -> torch.Tensor:
    """Ids [h, w] -> [1, C, h, w], where C is the largest id + 1."""
    return F.one_hot(labels.long()).permute(2, 0, 1)[None].float()


def restrict_neighborhood(height: int, width: int, size_mask_neighborhood: int, rows: slice = slice(None),
                          context_rows: slice = slice(None), device: torch.device | str = "cpu") -> torch.Tensor:
    """Mask of the context patches in a square window around each target patch, bool [targets, contexts].

    Args:
        height, width: grid of patches of both frames, row-major.
        size_mask_neighborhood: the window reaches this many patches in each direction.
        rows, context_rows: rows of the grid to take targets and contexts from; default: all.
    """
    y, x = torch.arange(height, device=device), torch.arange(width, device=device)
    near_rows = (y[rows, None] - y[context_rows]).abs() <= size_mask_neighborhood
    near_columns = (x[:, None] - x).abs() <= size_mask_neighborhood
    return (near_rows[:, None, :, None] & near_columns[None, :, None, :]).flatten(2).flatten(0, 1)


def plain_label_propagation(target: torch.Tensor, contexts: torch.Tensor, labels: torch.Tensor,
                            size_mask_neighborhood: int = 12, topk: int = 5) -> torch.Tensor:
    """The formula: affinity exp(cos / 0.1) within the window, top-k, normalised, times the labels.

    Arguments and result are those of label_propagation. All entries equal to the k-th largest are kept.
    """
    height, width, num_contexts = *target.shape[:2], len(contexts)
    cosine = target.flatten(0, 1) @ contexts.flatten(0, 2).T  # [targets, contexts]
    affinity = torch.exp(cosine / TEMPERATURE)
    if size_mask_neighborhood:
        affinity = affinity * restrict_neighborhood(height, width, size_mask_neighborhood,
                                                    device=target.device).repeat(1, num_contexts)
    kth = affinity.topk(min(topk, affinity.shape[1]), dim=1).values[:, -1:]
    affinity = affinity.where(affinity >= kth, 0)
    affinity = affinity / affinity.sum(1, keepdim=True)
    return (affinity @ labels.flatten(0, 2)).unflatten(0, (height, width))


# ---------------------------------------------------------------- a tile of target patches

def best_matches(similarity: torch.Tensor, best: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the count largest similarities of each target, and their indices into T·n: both [m, count], or fewer.

    The count largest are found at the count positions (of n) whose maximum over the T contexts is largest, since any
    value elsewhere is at most as large as each of these maxima. So top-k searches n values instead of T·n.

    Args:
        similarity: of m targets with n positions in each of T contexts, [T, m, n].
        best: maximum of similarity over T, [m, n], -inf outside the window.
    """
    contexts, _, positions = similarity.shape
    maximum, position = best.topk(min(count, positions))
    values = similarity.gather(2, position.expand(contexts, -1, -1)).masked_fill_(maximum == -torch.inf, -torch.inf)
    values, index = values.transpose(0, 1).flatten(1).topk(min(count, contexts * position.shape[1]))
    context = index.div(position.shape[1], rounding_mode="floor")
    return values, context * positions + position.gather(1, index % position.shape[1])


def mix_labels(similarity: torch.Tensor, window_bias: torch.Tensor | None, labels: torch.Tensor,
               topk: int) -> torch.Tensor:
    """Average the labels of each target's topk most similar context patches, weighted by exp(cos / 0.1).

    Args:
        similarity: cosines of m targets with n positions in each of T contexts, [T, m, n].
        window_bias: [m, n], 0 inside the window and -inf outside; None for no window.
        labels: [T, n, C].

    Returns:
        [m, C]. All patches as similar as the k-th are included.
    """
    k, labels = min(topk, similarity.shape[0] * similarity.shape[2]), labels.flatten(0, 1)
    best = similarity.amax(0) if window_bias is None else similarity.amax(0).add_(window_bias)
    values, index = best_matches(similarity, best, k + 1)  # one more, to detect ties with the k-th
    weights = torch.exp(values[:, :k] / TEMPERATURE)
    mixed = (weights[..., None] * labels[index[:, :k]]).sum(1) / weights.sum(1, keepdim=True)
    if values.shape[1] > k:
        # rare: compare all context patches with the k-th value, for these targets only
        tied = ((values[:, k] == values[:, k - 1]) & values[:, k].isfinite()).nonzero()[:, 0]
        if len(tied):
            every = similarity[:, tied] if window_bias is None else similarity[:, tied] + window_bias[tied]
            every = every.transpose(0, 1).flatten(1)
            weights = torch.exp(every / TEMPERATURE) * (every >= values[tied, k - 1:k])
            mixed[tied] = weights @ labels / weights.sum(1, keepdim=True)
    return mixed


# ---------------------------------------------------------------- a frame, tile by tile

class Tile(NamedTuple):
    """Rows of target patches, top to bottom - 1, and the rows of context patches within reach of their windows."""
    top: int
    bottom: int
    context_top: int
    context_bottom: int


def tiles(height: int, width: int, radius: int, max_contexts: int, device: torch.device) -> Iterator[Tile]:
    """Split a frame into tiles with at most MAX_SIMILARITIES similarities each.

    The split depends on max_contexts, not on the number of contexts so far, so that all frames of a video share their
    tiles, and the window masks are computed once. Radius 0: no window.
    """
    reach = radius or height
    limit = MAX_SIMILARITIES.get(device.type, MAX_SIMILARITIES["cuda"]) // (max_contexts * width**2)
    step = next((n for n in range(height, 1, -1) if n * min(height, n + 2 * reach) <= limit), 1)
    for top in range(0, height, step):
        yield Tile(top, min(top + step, height), max(0, top - reach), min(top + step + reach, height))


@lru_cache(maxsize=256)
def window_bias(tile: Tile, height: int, width: int, radius: int, device: torch.device) -> torch.Tensor | None:
    """Additive mask of the window, [targets, contexts]: 0 inside, -inf outside; None for no window."""
    if not radius:
        return None
    window = restrict_neighborhood(height, width, radius, slice(tile.top, tile.bottom),
                                   slice(tile.context_top, tile.context_bottom), device)
    return torch.zeros(window.shape, device=device).masked_fill_(~window, -torch.inf)


def products(target: torch.Tensor, contexts: torch.Tensor, tile: Tile) -> torch.Tensor:
    """Inner products of a tile's targets and contexts: target [h, w, D], contexts [T, h, w, D] -> [T, m, n]."""
    target = target[tile.top:tile.bottom].flatten(0, 1).expand(len(contexts), -1, -1)
    return torch.bmm(target, contexts[:, tile.context_top:tile.context_bottom].flatten(1, 2).transpose(1, 2))


def label_propagation(target: torch.Tensor, contexts: torch.Tensor, labels: torch.Tensor,
                      size_mask_neighborhood: int = 12, topk: int = 5,
                      max_contexts: int | None = None) -> torch.Tensor:
    """Propagate soft labels from the context frames to a frame.

    Args:
        target: features [h, w, D], of unit length.
        contexts: features [T, h, w, D], of unit length.
        labels: [T, h, w, C].
        size_mask_neighborhood: a window of ± this many patches; 0 for none.
        topk: number of context patches to average the labels of.
        max_contexts: largest T in the video; default: T.

    Returns:
        [h, w, C].
    """
    (height, width, _), radius, mixed = target.shape, size_mask_neighborhood, []
    for tile in tiles(height, width, radius, max_contexts or len(contexts), target.device):
        mixed.append(mix_labels(products(target, contexts, tile),
                                window_bias(tile, height, width, radius, target.device),
                                labels[:, tile.context_top:tile.context_bottom].flatten(1, 2), topk))
    return torch.cat(mixed).unflatten(0, (height, width))


# ---------------------------------------------------------------- masks

def norm_mask(mask: torch.Tensor) -> torch.Tensor:
    """Scale each channel of [C, H, W] to 0 … 1, except constant ones and those without a positive value."""
    low, high = mask.amin((1, 2), keepdim=True), mask.amax((1, 2), keepdim=True)
    scaled = (high > 0) & (high - low > 1e-6 * high)  # constant up to rounding is constant
    return mask.sub(low.where(scaled, 0)).div_((high - low).where(scaled, 1))


@lru_cache(maxsize=64)
def nearest(source: int, size: int) -> np.ndarray:
    """Indices [size] that resize a row of source pixels as PIL's NEAREST does."""
    row = Image.fromarray(np.arange(source, dtype=np.int32)[None])
    return np.array(row.resize((size, 1), Image.Resampling.NEAREST))[0].astype(np.int64)


def to_mask(labels: torch.Tensor, patch_size: int, height: int, width: int) -> torch.Tensor:
    """Upsample soft labels of patches [C, h, w] to ids, uint8 [height, width]."""
    labels = F.interpolate(labels[None].contiguous(), scale_factor=patch_size, mode="bilinear", align_corners=False)[0]
    ids = norm_mask(labels).max(0).indices.to(torch.uint8)  # argmax, much faster on CPUs
    rows, columns = (torch.from_numpy(nearest(source, size)).to(ids.device)
                     for source, size in zip(ids.shape, (height, width), strict=True))
    return ids.index_select(0, rows).gather(1, columns.expand(height, -1))
