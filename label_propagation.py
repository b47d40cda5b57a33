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
HELD_AT_ONCE = {"cpu": 2**21, "cuda": 2**24}  # similarities: what a CPU's cache likes; 64 MB on a GPU
AXES_SHARE = 1 / 4  # of the features' dimensions, from which their similarity is bounded
MOST_LOOKUPS = 5  # a target and context, beyond which bounds no longer pay
PAIRS_AT_ONCE = 512  # whose features stay in a CPU's cache


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


# ---------------------------------------------------------------- some target patches

def best_matches(similarity: torch.Tensor, best: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The count largest of similarity [T, m, n] for each of m targets, or all, and where they stand in T·n, [m, count].

    best [m, n] is the best of the T at each place, -inf outside the window. The count largest lie at the count places
    where it is largest: a search over n, not T·n.
    """
    contexts, _, places = similarity.shape
    most, place = best.topk(min(count, places))
    values = similarity.gather(2, place.expand(contexts, -1, -1)).masked_fill_(most == -torch.inf, -torch.inf)
    values, chosen = values.transpose(0, 1).flatten(1).topk(min(count, contexts * place.shape[1]))
    context = chosen.div(place.shape[1], rounding_mode="floor")
    return values, context * places + place.gather(1, chosen % place.shape[1])


def mix_labels(similarity: torch.Tensor, outside: torch.Tensor | None, labels: torch.Tensor, topk: int) -> torch.Tensor:
    """Labels of m target patches as the mean over their topk most similar context patches, weights exp(cos / 0.1).

    Args:
        similarity: cosines [T, m, n] with the patches at n places in each of T contexts.
        outside: [m, n], 0 for places in the window, -inf for others; None for no window.
        labels: [T, n, C].

    Returns:
        [m, C]. Patches as similar as the k-th are all counted in.
    """
    k, labels = min(topk, similarity.shape[0] * similarity.shape[2]), labels.flatten(0, 1)
    best = similarity.amax(0) if outside is None else similarity.amax(0).add_(outside)
    values, chosen = best_matches(similarity, best, k + 1)  # one more tells whether others share the k-th value
    weights = torch.exp(values[:, :k] / TEMPERATURE)
    mixed = (weights[..., None] * labels[chosen[:, :k]]).sum(1) / weights.sum(1, keepdim=True)
    if values.shape[1] > k:
        tied = ((values[:, k] == values[:, k - 1]) & values[:, k].isfinite()).nonzero()[:, 0]
        if len(tied):
            every = similarity[:, tied] if outside is None else similarity[:, tied] + outside[tied]
            every = every.transpose(0, 1).flatten(1)
            weights = torch.exp(every / TEMPERATURE) * (every >= values[tied, k - 1:k])
            mixed[tied] = weights @ labels / weights.sum(1, keepdim=True)
    return mixed


def cosines(target: torch.Tensor, row: torch.Tensor, contexts: torch.Tensor, patch: torch.Tensor) -> torch.Tensor:
    """Of pairs of target [m, D] and contexts [N, D], [P], which the indices row and patch [P] name."""
    pairs = zip(row.split(PAIRS_AT_ONCE), patch.split(PAIRS_AT_ONCE), strict=True)
    return torch.cat([torch.linalg.vecdot(target.index_select(0, r), contexts.index_select(0, p)) for r, p in pairs])


def find_lookups(bound: torch.Tensor, outside: torch.Tensor | None, target: torch.Tensor, contexts: torch.Tensor,
                 first: int, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs that bounds [T, m, n] don't rule out, by target: targets [P], and where their patches stand in T·N [P].

    The topk patches of the largest bounds are compared; the least of their cosines is one that the topk largest all
    reach, so a patch with a lower bound is out. target is [m, D], contexts [T, N, D]; the n places begin at first.
    """
    patches, places = contexts.shape[1], bound.shape[2]
    best = bound.amax(0) if outside is None else bound.amax(0).add_(outside)
    chosen = best_matches(bound, best, topk)[1]
    chosen = chosen.div(places, rounding_mode="floor") * patches + first + chosen % places
    rows = torch.arange(len(target), device=target.device).repeat_interleave(chosen.shape[1])
    least = cosines(target, rows, contexts.flatten(0, 1), chosen.flatten()).view_as(chosen).amin(1, keepdim=True)
    row, place = (best >= least).nonzero(as_tuple=True)
    pair, context = (bound[:, row, place].T >= least[row]).nonzero(as_tuple=True)
    return row[pair], context * patches + first + place[pair]


def mix_pairs(row: torch.Tensor, cosine: torch.Tensor, labels: torch.Tensor, targets: int, topk: int) -> torch.Tensor:
    """What mix_labels gives, [targets, C], from pairs by target: row and cosine [P], and labels [P, C]."""
    count = row.bincount(minlength=targets)
    table = cosine.new_full((targets, max(1, count.max())), -torch.inf)
    table[row, torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]] = cosine
    kth = table.topk(min(topk, table.shape[1])).values[:, -1]
    weights = torch.exp(cosine / TEMPERATURE) * (cosine >= kth[row])
    mixed = labels.new_zeros(targets, labels.shape[1]).index_add_(0, row, weights[:, None] * labels)
    return mixed / weights.new_zeros(targets).index_add_(0, row, weights)[:, None]


# ---------------------------------------------------------------- a frame

class Tile(NamedTuple):
    """Some rows of a frame's patches, top to bottom, and the rows of its contexts that their window reaches."""
    top: int
    bottom: int
    near_top: int
    near_bottom: int


def tiles(height: int, width: int, radius: int, most_contexts: int, device: torch.device) -> Iterator[Tile]:
    """A frame's rows, few enough at a time that the similarities of all patches with all are never held.

    How few follows from most_contexts, so that the frames of a video share their windows' masks. Radius 0: no window.
    """
    reach, limit = radius or height, HELD_AT_ONCE.get(device.type, HELD_AT_ONCE["cuda"]) // (most_contexts * width**2)
    step = next((n for n in range(height, 1, -1) if n * min(height, n + 2 * reach) <= limit), 1)
    for top in range(0, height, step):
        yield Tile(top, min(top + step, height), max(0, top - reach), min(top + step + reach, height))


@lru_cache(maxsize=256)
def outside_window(tile: Tile, height: int, width: int, radius: int, device: torch.device) -> torch.Tensor | None:
    """0 for context patches in the window, -inf for others, [targets, contexts], of a tile; None for no window."""
    if not radius:
        return None
    window = restrict_neighborhood(height, width, radius, slice(tile.top, tile.bottom),
                                   slice(tile.near_top, tile.near_bottom), device)
    return torch.zeros(window.shape, device=device).masked_fill_(~window, -torch.inf)


def products(target: torch.Tensor, contexts: torch.Tensor, tile: Tile) -> torch.Tensor:
    """Of the patches of a tile of target [h, w, D] with those of contexts [T, h, w, D] near it, [T, m, n]."""
    target = target[tile.top:tile.bottom].flatten(0, 1).expand(len(contexts), -1, -1)
    return torch.bmm(target, contexts[:, tile.near_top:tile.near_bottom].flatten(1, 2).transpose(1, 2))


def label_propagation(target: torch.Tensor, contexts: torch.Tensor, labels: torch.Tensor,
                      size_mask_neighborhood: int = 12, topk: int = 5,
                      most_contexts: int | None = None) -> torch.Tensor:
    """Soft labels of a frame from those of its context frames.

    Args:
        target: features [h, w, D], of unit length.
        contexts: features [T, h, w, D], of unit length.
        labels: [T, h, w, C].
        size_mask_neighborhood: a window of ± so many patches; 0 for none.
        most_contexts: T of the video's later frames, where T still grows.

    Returns:
        [h, w, C].
    """
    (height, width, _), radius, mixed = target.shape, size_mask_neighborhood, []
    for tile in tiles(height, width, radius, most_contexts or len(contexts), target.device):
        mixed.append(mix_labels(products(target, contexts, tile),
                                outside_window(tile, height, width, radius, target.device),
                                labels[:, tile.near_top:tile.near_bottom].flatten(1, 2), topk))
    return torch.cat(mixed).unflatten(0, (height, width))


def leading_axes(features: torch.Tensor) -> torch.Tensor:
    """The directions [D, K] in which features [h, w, D] are largest."""
    features = features.flatten(0, 1).nan_to_num()
    axes = torch.linalg.eigh(features.T @ features).eigenvectors  # the largest come last
    return axes[:, -max(1, int(AXES_SHARE * len(axes))):].contiguous()


def sketch(features: torch.Tensor, axes: torch.Tensor) -> torch.Tensor:
    """Features of unit length [..., D] -> [..., K + 1]: their parts along K axes, and the length of the rest.

    By Cauchy and Schwarz the product of two sketches is at least that of the features.
    """
    along = features @ axes
    rest = 1 - along.square().sum(-1, keepdim=True)
    return torch.cat([along, rest.clamp_(min=0).add_(1e-5).sqrt_()], -1)  # 1e-5: more than float32's rounding


def propagation_by_bounds(target: torch.Tensor, contexts: torch.Tensor, labels: torch.Tensor,
                          sketches: tuple[torch.Tensor, torch.Tensor], radius: int, topk: int,
                          most_contexts: int) -> torch.Tensor | None:
    """What label_propagation gives, with sketches of the target and its contexts, or None where they don't pay."""
    (height, width, _), most, mixed = target.shape, MOST_LOOKUPS * len(contexts), []
    if topk > most:
        return None
    for tile in tiles(height, width, radius, most_contexts, target.device):
        targets = target[tile.top:tile.bottom].flatten(0, 1)
        row, patch = find_lookups(products(*sketches, tile),
                                  outside_window(tile, height, width, radius, target.device), targets,
                                  contexts.flatten(1, 2), tile.near_top * width, topk)
        if len(row) > most * len(targets):
            return None
        cosine = cosines(targets, row, contexts.flatten(0, 2), patch)
        mixed.append(mix_pairs(row, cosine, labels.flatten(0, 2)[patch], len(targets), topk))
    return torch.cat(mixed).unflatten(0, (height, width))


# ---------------------------------------------------------------- a video

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
    slots = n_last_frames + 1  # frame 0, and a ring of the last ones
    contexts, context_labels = first.new_empty(slots, *first.shape), labels.new_empty(slots, *labels.shape)
    options = size_mask_neighborhood, topk, slots
    # a GPU has the whole product sooner, and the bounds' slack is for float32
    bounded = first.device.type == "cpu" and first.dtype == labels.dtype == torch.float32
    if bounded:
        axes = leading_axes(first)
        sketches = first.new_empty(slots, *first.shape[:2], axes.shape[1] + 1)

    def keep(slot: int, frame: torch.Tensor, labels: torch.Tensor) -> None:
        contexts[slot], context_labels[slot] = frame, labels
        if bounded:
            sketches[slot] = sketch(frame, axes)

    keep(0, first, labels)
    for t, target in enumerate(features, 1):
        target, labels = target.transpose(0, 1) if turn else target, None
        known = contexts[:min(t, slots)], context_labels[:min(t, slots)]
        if bounded and t >= slots:  # before, the whole product is small
            labels = propagation_by_bounds(target, *known, (sketch(target, axes), sketches), *options)
            bounded = labels is not None  # once they don't pay, the video goes on without them
        if labels is None:
            labels = label_propagation(target, *known, *options)
        if n_last_frames:
            keep(1 + (t - 1) % n_last_frames, target, labels)
        yield labels.permute(2, 1, 0) if turn else labels.permute(2, 0, 1)


# ---------------------------------------------------------------- masks

def norm_mask(mask: torch.Tensor) -> torch.Tensor:
    """Each channel of [C, H, W] stretched to 0 … 1, unless it has no positive value or is constant."""
    low, high = mask.amin((1, 2), keepdim=True), mask.amax((1, 2), keepdim=True)
    stretch = (high > 0) & (high - low > 1e-6 * high)  # a channel that is constant but for rounding stays as it is
    return mask.sub(low.where(stretch, 0)).div_((high - low).where(stretch, 1))


@lru_cache(maxsize=64)
def nearest(source: int, size: int) -> np.ndarray:
    """For each of size pixels in a row, the one of source pixels whose centre is nearest, as PIL rounds."""
    row = Image.fromarray(np.arange(source, dtype=np.int32)[None])
    return np.array(row.resize((size, 1), Image.Resampling.NEAREST))[0].astype(np.int64)


def to_mask(labels: torch.Tensor, patch_size: int, height: int, width: int) -> torch.Tensor:
    """Soft labels of patches [C, h, w] -> ids, uint8 [height, width]."""
    labels = F.interpolate(labels[None].contiguous(), scale_factor=patch_size, mode="bilinear", align_corners=False)[0]
    ids = norm_mask(labels).max(0).indices.to(torch.uint8)  # on CPUs far faster than argmax
    rows, columns = (torch.from_numpy(nearest(source, size)).to(ids.device)
                     for source, size in zip(ids.shape, (height, width), strict=True))
    return ids.index_select(0, rows).gather(1, columns.expand(height, -1))
