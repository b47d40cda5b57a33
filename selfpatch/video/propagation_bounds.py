"""Label propagation through a video. On CPUs, upper bounds rule out most context patches before the full comparison.

A product over a quarter of the dimensions bounds every cosine from above. Only patches whose bound reaches the k-th
best cosine are compared in full, which selects the same patches as label_propagation, ties included.
"""
from collections.abc import Iterable, Iterator

import torch

from selfpatch.video.label_propagation import TEMPERATURE, best_matches, label_propagation, products, tiles, window_bias

SKETCH_SHARE = 1 / 4  # of the features' dimensions are used for the bounds
MAX_LOOKUPS = 5  # full comparisons per target and context; with more, the whole product is faster
PAIRS_PER_CHUNK = 512  # their features fit in a CPU's cache


def leading_axes(features: torch.Tensor) -> torch.Tensor:
    """The leading SKETCH_SHARE of the principal axes of features [h, w, D]: [D, K]."""
    features = features.flatten(0, 1).nan_to_num()
    axes = torch.linalg.eigh(features.T @ features).eigenvectors  # ascending eigenvalues
    return axes[:, -max(1, int(SKETCH_SHARE * len(axes))):].contiguous()


def sketch(features: torch.Tensor, axes: torch.Tensor) -> torch.Tensor:
    """Reduce unit features [..., D] to their components along K axes and the length of the remainder: [..., K + 1].

    The product of two sketches bounds the cosine from above: split x = a + r and y = b + s into the axes' subspace and
    the remainder, then x·y = a·b + r·s ≤ a·b + |r||s| by Cauchy-Schwarz.
    """
    components = features @ axes
    rest = 1 - components.square().sum(-1, keepdim=True)
    return torch.cat([components, rest.clamp_(min=0).add_(1e-5).sqrt_()], -1)  # 1e-5 exceeds float32's rounding


def cosines(target: torch.Tensor, row: torch.Tensor, contexts: torch.Tensor, patch: torch.Tensor) -> torch.Tensor:
    """Inner products [P] of the pairs target[row], contexts[patch], from [m, D] and [N, D], in chunks."""
    pairs = zip(row.split(PAIRS_PER_CHUNK), patch.split(PAIRS_PER_CHUNK), strict=True)
    return torch.cat([torch.linalg.vecdot(target.index_select(0, r), contexts.index_select(0, p)) for r, p in pairs])


def find_lookups(bound: torch.Tensor, bias: torch.Tensor | None, target: torch.Tensor, contexts: torch.Tensor,
                 first: int, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the pairs that need a full comparison, sorted by target.

    The topk patches with the largest bounds are compared first. Their smallest cosine is a threshold: the true topk all
    reach it, so patches whose bound is lower are ruled out.

    Args:
        bound: upper bounds of the cosines, [T, m, n].
        bias: [m, n], 0 inside the window and -inf outside; None for no window.
        target, contexts: features [m, D] and [T, N, D].
        first: index of the first of the n positions, among N.

    Returns:
        Indices of the targets, and of the context patches among T·N, both [P].
    """
    patches, positions = contexts.shape[1], bound.shape[2]
    best = bound.amax(0) if bias is None else bound.amax(0).add_(bias)
    candidate = best_matches(bound, best, topk)[1]
    candidate = candidate.div(positions, rounding_mode="floor") * patches + first + candidate % positions
    rows = torch.arange(len(target), device=target.device).repeat_interleave(candidate.shape[1])
    threshold = cosines(target, rows, contexts.flatten(0, 1), candidate.flatten()).view_as(candidate)
    threshold = threshold.amin(1, keepdim=True)
    # filter positions by their best bound over T first; few remain whose T patches must be checked one by one
    row, position = (best >= threshold).nonzero(as_tuple=True)
    pair, context = (bound[:, row, position].T >= threshold[row]).nonzero(as_tuple=True)
    return row[pair], context * patches + first + position[pair]


def mix_pairs(row: torch.Tensor, cosine: torch.Tensor, labels: torch.Tensor, num_targets: int,
              topk: int) -> torch.Tensor:
    """mix_labels for pairs sorted by target: row and cosine [P], labels [P, C] -> [num_targets, C]."""
    count = row.bincount(minlength=num_targets)
    # one row per target, padded with -inf, to find its k-th largest
    table = cosine.new_full((num_targets, max(1, count.max())), -torch.inf)
    table[row, torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]] = cosine
    kth = table.topk(min(topk, table.shape[1])).values[:, -1]
    weights = torch.exp(cosine / TEMPERATURE) * (cosine >= kth[row])
    mixed = labels.new_zeros(num_targets, labels.shape[1]).index_add_(0, row, weights[:, None] * labels)
    return mixed / weights.new_zeros(num_targets).index_add_(0, row, weights)[:, None]


def propagation_by_bounds(target: torch.Tensor, contexts: torch.Tensor, labels: torch.Tensor,
                          sketches: tuple[torch.Tensor, torch.Tensor], radius: int, topk: int,
                          max_contexts: int) -> torch.Tensor | None:
    """label_propagation by bounds; None if they leave too many pairs to compare.

    Args:
        sketches: of the target [h, w, K + 1], and of the contexts [T, h, w, K + 1].
    """
    (height, width, _), limit, mixed = target.shape, MAX_LOOKUPS * len(contexts), []
    if topk > limit:
        return None
    for tile in tiles(height, width, radius, max_contexts, target.device):
        targets = target[tile.top:tile.bottom].flatten(0, 1)
        row, patch = find_lookups(products(*sketches, tile), window_bias(tile, height, width, radius, target.device),
                                  targets, contexts.flatten(1, 2), tile.context_top * width, topk)
        if len(row) > limit * len(targets):
            return None
        cosine = cosines(targets, row, contexts.flatten(0, 2), patch)
        mixed.append(mix_pairs(row, cosine, labels.flatten(0, 2)[patch], len(targets), topk))
    return torch.cat(mixed).unflatten(0, (height, width))


class ContextFrames:
    """Features and labels of frame 0 and the last n_last_frames, with sketches as long as bounds are in use.

    Args:
        first, labels: features [h, w, D] and labels [h, w, C] of frame 0.
    """

    def __init__(self, first: torch.Tensor, labels: torch.Tensor, n_last_frames: int):
        self.n_last_frames, self.num_frames, slots = n_last_frames, 0, n_last_frames + 1
        self.features, self.labels = first.new_empty(slots, *first.shape), labels.new_empty(slots, *labels.shape)
        # not on GPUs, where the whole product is faster; the sketches' margin is made for float32
        self.axes = None
        if first.device.type == "cpu" and first.dtype == labels.dtype == torch.float32:
            self.axes = leading_axes(first)
            self.sketches = first.new_empty(slots, *first.shape[:2], self.axes.shape[1] + 1)
        self.add(first, labels)

    def add(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        """Store a frame: the first in slot 0, later ones in a ring buffer of the other slots."""
        slot = 1 + (self.num_frames - 1) % self.n_last_frames if self.num_frames and self.n_last_frames else 0
        if slot or not self.num_frames:
            self.features[slot], self.labels[slot] = features, labels
            if self.axes is not None:
                self.sketches[slot] = sketch(features, self.axes)
        self.num_frames += 1

    def propagate(self, target: torch.Tensor, size_mask_neighborhood: int, topk: int) -> torch.Tensor:
        """Soft labels [h, w, C] of the next frame, from its features [h, w, D]."""
        slots = len(self.features)
        contexts, labels = self.features[:self.num_frames], self.labels[:self.num_frames]
        if self.axes is not None and self.num_frames >= slots:  # with fewer contexts the whole product is small
            mixed = propagation_by_bounds(target, contexts, labels, (sketch(target, self.axes), self.sketches),
                                          size_mask_neighborhood, topk, slots)
            if mixed is not None:
                return mixed
            self.axes = None  # too many lookups: this video continues without bounds
        return label_propagation(target, contexts, labels, size_mask_neighborhood, topk, slots)


def propagate(features: Iterable[torch.Tensor], labels: torch.Tensor, n_last_frames: int = 7,
              size_mask_neighborhood: int = 12, topk: int = 5) -> Iterator[torch.Tensor]:
    """Yield the soft labels [C, h, w] of each frame after the first, from the first and the n_last_frames before.

    Args:
        features: of each frame, [h, w, D], of unit length.
        labels: of the first frame, [C, h, w].
        size_mask_neighborhood, topk: see label_propagation.
    """
    features, labels = iter(features), labels.permute(1, 2, 0)
    first = next(features)
    # rows along the longer side: windows and tiles then span a smaller share of the rows
    transposed = first.shape[1] > first.shape[0]
    first, labels = (x.transpose(0, 1) if transposed else x for x in (first, labels))
    contexts = ContextFrames(first, labels, n_last_frames)
    for target in features:
        target = target.transpose(0, 1) if transposed else target
        labels = contexts.propagate(target, size_mask_neighborhood, topk)
        contexts.add(target, labels)
        yield labels.permute(2, 1, 0) if transposed else labels.permute(2, 0, 1)
