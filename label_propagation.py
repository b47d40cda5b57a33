"""Label propagation: each frame's labels from those of earlier frames, by the similarity of patches.

The measure of Jabri et al. (2020, Space-Time Correspondence as a Contrastive Random Walk) as DINO has it (Caron et
al. 2021): patches take the labels of the topk most similar patches in a window of the first frame and the last few.
"""
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

TEMPERATURE = 0.1
HELD_AT_ONCE = {"cpu": 2**20, "cuda": 2**24}  # similarities: what a CPU's cache likes; 64 MB on a GPU
STRIP = {"cpu": 10}  # columns taken together; a GPU takes all, since it would rather have one large product


def to_one_hot(labels: torch.Tensor) -> torch.Tensor:
    """Ids [h, w] -> [1, C, h, w], C the largest id + 1."""
    return F.one_hot(labels.long()).permute(2, 0, 1)[None].float()


def restrict_neighborhood(height: int, width: int, size_mask_neighborhood: int, rows: slice = slice(None),
                          context_rows: slice = slice(None), device: torch.device | str = "cpu") -> torch.Tensor:
    """Which context patches lie in the square window around each target patch, bool [targets, contexts].

    Both are patches of one height × width grid, row by row; of all its rows, or of the given ones.
    """
    y, x = torch.arange(height, device=device), torch.arange(width, device=device)
    near_rows = (y[rows, None] - y[context_rows]).abs() <= size_mask_neighborhood
    near_columns = (x[:, None] - x).abs() <= size_mask_neighborhood
    return (near_rows[:, None, :, None] & near_columns[None, :, None, :]).flatten(2).flatten(0, 1)


def mix_labels(similarity: torch.Tensor, outside: torch.Tensor | None, labels: torch.Tensor, topk: int) -> torch.Tensor:
    """Labels of m target patches as the mean over their topk most similar context patches, weights exp(cos / 0.1).

    Args:
        similarity: cosines [T, m, n] with the patches at n places in each of T contexts.
        outside: [m, n], 0 for places in the window, -inf for others; None for no window.
        labels: [T, n, C].

    Returns:
        [m, C]. Patches as similar as the k-th are all counted in.
    """
    contexts, targets, places = similarity.shape
    k = min(topk, contexts * places)
    # The topk lie at the topk places that are best in any context: a search over n, not T·n. One more of both is
    # looked up, since it tells whether others share the k-th value.
    best = similarity.amax(0) if outside is None else similarity.amax(0).add_(outside)
    best = best.topk(min(k + 1, places)).indices
    candidates = similarity[:, torch.arange(targets, device=best.device)[:, None], best].permute(1, 0, 2)
    if outside is not None:
        candidates = candidates + outside.gather(1, best)[:, None]
    values, chosen = candidates.flatten(1).topk(min(k + 1, contexts * best.shape[1]))
    weights, chosen = torch.exp(values[:, :k] / TEMPERATURE), chosen[:, :k]
    found = labels[chosen // best.shape[1], best.gather(1, chosen % best.shape[1])]
    mixed = (weights[..., None] * found).sum(1) / weights.sum(1, keepdim=True)
    if values.shape[1] > k:
        tied = ((values[:, k] == values[:, k - 1]) & values[:, k].isfinite()).nonzero()[:, 0]
        if len(tied):
            every = similarity[:, tied] if outside is None else similarity[:, tied] + outside[tied]
            every = every.transpose(0, 1).flatten(1)
            weights = torch.exp(every / TEMPERATURE) * (every >= values[tied, k - 1:k])
            mixed[tied] = weights @ labels.flatten(0, 1) / weights.sum(1, keepdim=True)
    return mixed


class Strip(NamedTuple):
    """Some columns of a frame's patches, and those of its contexts that their window reaches."""
    columns: slice
    near: slice


def strips(width: int, radius: int, device: torch.device) -> list[Strip]:
    """Columns in strips of equal width where that lets the window discard some of them, radius 0 being no window."""
    count = max(1, round(width / STRIP.get(device.type, width))) if radius else 1
    edges = [width * i // count for i in range(count + 1)]
    reach = radius or width
    return [Strip(slice(left, right), slice(max(0, left - reach), min(width, right + reach)))
            for left, right in zip(edges, edges[1:], strict=False)]


@lru_cache(maxsize=256)
def outside_window(height: int, width: int, radius: int, rows: tuple[int, int], near_rows: tuple[int, int],
                   columns: tuple[int, int], near: tuple[int, int], device: torch.device) -> torch.Tensor:
    """0 for context patches in the window, -inf for others, [targets, contexts], of the given rows and columns."""
    window = restrict_neighborhood(height, width, radius, slice(*rows), slice(*near_rows), device)
    window = window.view(rows[1] - rows[0], width, -1, width)[:, slice(*columns), :, slice(*near)]
    window = window.flatten(2).flatten(0, 1)
    return torch.zeros(window.shape, device=device).masked_fill_(~window, -torch.inf)


def mix_strip(target: torch.Tensor, contexts: torch.Tensor, labels: torch.Tensor, strip: Strip, radius: int,
              topk: int, most_contexts: int) -> torch.Tensor:
    """Labels [h, columns, C] of a strip of target [h, w, D], from contexts [T, h, near, D] and labels [T, h, w, C].

    Rows are taken a few at a time, with the rows of the contexts that their window reaches, so that the similarities
    of all patches with all are never held, nor those that the window would discard computed. How many follows from
    most_contexts, not T: so the frames of a video share their windows' masks.
    """
    height, width, dim = target.shape
    columns, near = ((one.start, one.stop) for one in strip)
    reach = radius or height
    limit = HELD_AT_ONCE.get(target.device.type, HELD_AT_ONCE["cuda"])
    limit //= most_contexts * (columns[1] - columns[0]) * (near[1] - near[0])
    step = next((n for n in range(height, 1, -1) if n * min(height, n + 2 * reach) <= limit), 1)
    target, labels, mixed = target[:, strip.columns], labels[:, :, strip.near], []
    for top in range(0, height, step):
        rows, near_rows = (top, min(top + step, height)), (max(0, top - reach), min(top + step + reach, height))
        similarity = torch.bmm(target[slice(*rows)].reshape(1, -1, dim).expand(len(contexts), -1, -1),
                               contexts[:, slice(*near_rows)].flatten(1, 2).transpose(1, 2))
        outside = outside_window(height, width, radius, rows, near_rows, columns, near,
                                 target.device) if radius else None
        mixed.append(mix_labels(similarity, outside, labels[:, slice(*near_rows)].flatten(1, 2), topk))
    return torch.cat(mixed).unflatten(0, (height, -1))


def label_propagation(target: torch.Tensor, contexts: torch.Tensor, labels: torch.Tensor,
                      size_mask_neighborhood: int = 12, topk: int = 5) -> torch.Tensor:
    """Soft labels of a frame from those of its context frames.

    Args:
        target: features [h, w, D], of unit length.
        contexts: features [T, h, w, D], of unit length.
        labels: [T, h, w, C].
        size_mask_neighborhood: a window of ± so many patches; 0 for none.

    Returns:
        [h, w, C].
    """
    parts = strips(target.shape[1], size_mask_neighborhood, target.device)
    return torch.cat([mix_strip(target, contexts[:, :, strip.near], labels, strip, size_mask_neighborhood, topk,
                                len(contexts)) for strip in parts], dim=1)


def propagate(features: Iterable[torch.Tensor], labels: torch.Tensor, n_last_frames: int = 7,
              size_mask_neighborhood: int = 12, topk: int = 5) -> Iterator[torch.Tensor]:
    """Soft labels [C, h, w] of each frame after the first, from it and the n_last_frames before.

    Args:
        features: [h, w, D] of unit length, frame by frame.
        labels: the first frame's, [C, h, w].
    """
    features, labels = iter(features), labels.permute(1, 2, 0)
    first = next(features)
    turn = first.shape[1] > first.shape[0]  # rows run along the longer side: a window reaches a smaller share of it
    first, labels = (x.transpose(0, 1) if turn else x for x in (first, labels))
    parts = strips(first.shape[1], size_mask_neighborhood, first.device)
    # frame 0, and a ring of the last ones; strips overlap, and are kept apart so that each is one block of memory
    contexts = [first.new_empty(n_last_frames + 1, *first[:, strip.near].shape) for strip in parts]
    context_labels = labels.new_empty(n_last_frames + 1, *labels.shape)

    def keep(slot: int, frame: torch.Tensor, labels: torch.Tensor) -> None:
        for held, strip in zip(contexts, parts, strict=True):
            held[slot] = frame[:, strip.near]
        context_labels[slot] = labels

    keep(0, first, labels)
    for t, target in enumerate(features, 1):
        target = target.transpose(0, 1) if turn else target
        used = min(t, n_last_frames + 1)
        labels = torch.cat([mix_strip(target, held[:used], context_labels[:used], strip, size_mask_neighborhood, topk,
                                      len(held)) for held, strip in zip(contexts, parts, strict=True)], dim=1)
        if n_last_frames:
            keep(1 + (t - 1) % n_last_frames, target, labels)
        yield labels.permute(2, 1, 0) if turn else labels.permute(2, 0, 1)


def norm_mask(mask: torch.Tensor) -> torch.Tensor:
    """Each channel of [C, H, W] stretched to 0 … 1, unless it has no positive value or is constant."""
    low, high = mask.amin((1, 2), keepdim=True), mask.amax((1, 2), keepdim=True)
    stretch = (high > 0) & (high - low > 1e-6 * high)  # a channel that is constant but for rounding stays as it is
    return mask.sub(low.where(stretch, 0)).div_((high - low).where(stretch, 1))


@lru_cache(maxsize=64)
def nearest(source: int, size: int) -> np.ndarray:
    """For each of size pixels in a row, the one of source pixels whose centre is nearest, as PIL rounds."""
    row = Image.fromarray(np.arange(source, dtype=np.int32)[None])
    return np.array(row.resize((size, 1), Image.Resampling.NEAREST))[0]


def to_mask(labels: torch.Tensor, patch_size: int, height: int, width: int) -> torch.Tensor:
    """Soft labels of patches [C, h, w] -> ids, uint8 [height, width]."""
    labels = F.interpolate(labels[None], scale_factor=patch_size, mode="bilinear", align_corners=False)[0]
    ids = norm_mask(labels).max(0).indices.to(torch.uint8)  # on CPUs far faster than argmax
    rows, columns = (torch.from_numpy(nearest(source, size)).to(ids.device)
                     for source, size in zip(ids.shape, (height, width), strict=True))
    return ids.index_select(0, rows).index_select(1, columns)
