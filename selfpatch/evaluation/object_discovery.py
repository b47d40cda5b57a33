"""An image's main object by the similarity of its patches: LOST and TokenCut; CorLoc scores their boxes.

Both take an attention layer's keys [N, D], not normalised, of a grid of h × w patches, row by row, and return a mask
of patches; box_of converts it to pixels.
"""
import cv2
import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

EXPANSION = 100  # LOST compares its seed with so many patches of least degree
TAU, EPSILON = 0.2, 1e-5  # TokenCut connects patches whose cosine exceeds TAU; other edges have the weight EPSILON

Grid = tuple[int, int]  # rows and columns of patches


def lost_degrees(correlations: torch.Tensor) -> torch.Tensor:
    """Number of other patches with a positive correlation to each patch, [N], from keys @ keys.T."""
    positive = correlations > 0
    return positive.sum(1) - positive.diagonal().long()


def lost(keys: torch.Tensor, grid: Grid, expansion: int = EXPANSION) -> tuple[np.ndarray, int]:
    """Localising objects with self-supervised transformers (Siméoni et al. 2021, Sec. 3).

    The seed is the patch with the fewest positive correlations: objects cover less of an image than its background.
    Patches that correlate positively with the seed, of the `expansion` patches of least degree, vote for the object.

    Degrees are small integers, so several patches often have the least; of these, the seed is the one with the largest
    sum of positive correlations.

    Returns:
        The object, bool [h, w], and the seed's index.
    """
    correlations = keys.float() @ keys.float().T
    order = correlations.clamp(min=0).sum(1).argsort(descending=True, stable=True)
    order = order[lost_degrees(correlations)[order].argsort(stable=True)]
    seed, similar = int(order[0]), order[:expansion]
    similar = similar[correlations[seed, similar] > 0]
    foreground = (correlations[similar].sum(0) > 0).reshape(grid).cpu().numpy()
    foreground.flat[seed] = True
    labels = components(foreground)
    return labels == labels.flat[seed], seed


def cut_vector(keys: torch.Tensor, tau: float = TAU, epsilon: float = EPSILON) -> torch.Tensor:
    """Second smallest generalised eigenvector of (D − A) v = λ D v, float64 [N]; its sign is arbitrary.

    A joins patches whose cosine is above tau with weight 1, all others with epsilon. With v = D^−½ u, u is the second
    largest eigenvector of the symmetric matrix D^−½ A D^−½, whose largest is D^½ 1.
    """
    if len(keys) == 1:
        return torch.ones(1, dtype=torch.float64)
    keys = F.normalize((keys.cpu() if keys.device.type == "mps" else keys).float(), dim=-1)
    edges = torch.where(keys @ keys.T > tau, 1.0, epsilon).double()
    scale = edges.sum(1).rsqrt()
    return second_eigenvector(edges.mul_(scale[:, None]).mul_(scale), F.normalize(1 / scale, dim=0)) * scale


def second_eigenvector(matrix: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """Second largest eigenvector of a symmetric float64 matrix [N, N], N ≥ 2, whose largest eigenvalue is 1.

    Args:
        first: the eigenvector of that eigenvalue, of unit length [N].
    """
    def multiply(vector: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(vector.ravel()).to(matrix.device)
        return (matrix @ x - first * (first @ x)).cpu().numpy()  # the first's eigenvalue becomes 0

    start = np.random.default_rng(0).standard_normal(len(matrix))  # ARPACK's own is drawn anew for each call
    # Lanczos iterations take a tenth of the time of scipy.linalg.eigh(subset_by_index=…) at N = 1620
    operator = LinearOperator(tuple(matrix.shape), multiply, dtype=np.float64)
    try:
        vectors = eigsh(operator, 1, which="LA", v0=start)[1]
    except ArpackError:  # all patches are alike, which leaves a matrix of zeros, or no convergence
        return torch.linalg.eigh(matrix).eigenvectors[:, -2]
    return torch.from_numpy(vectors[:, 0]).to(matrix.device)


def tokencut(keys: torch.Tensor, grid: Grid, tau: float = TAU, epsilon: float = EPSILON) -> np.ndarray:
    """Normalised cut of an image's patches (Wang et al. 2022, Sec. 3.2); the object, bool [h, w].

    The object is the connected part with the patch of largest |v|, on that patch's side of the mean. Patches with the
    same edges have the same value up to rounding: of several parts with the largest |v|, the one with most such
    patches counts.
    """
    vector = cut_vector(keys, tau, epsilon)
    largest = vector.abs() >= vector.abs().max() * (1 - 1e-7)
    high = vector > vector.mean()
    foreground = high if high[largest].double().mean() > 0.5 else ~high
    labels, largest = components(foreground.reshape(grid).cpu().numpy()), largest.reshape(grid).cpu().numpy()
    return labels == np.bincount(labels[largest & (labels > 0)]).argmax()


def components(mask: np.ndarray) -> np.ndarray:
    """The 4-connected components of a mask [h, w], numbered from 1; 0 outside the mask."""
    return cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)[1]


def box_of(mask: np.ndarray, patch_size: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """xmin, ymin, xmax, ymax in pixels around a mask of patches [h, w], clipped to an image of size (height, width)."""
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    return (int(columns[0]) * patch_size, int(rows[0]) * patch_size,
            min((int(columns[-1]) + 1) * patch_size, size[1]), min((int(rows[-1]) + 1) * patch_size, size[0]))


def box_iou(box: tuple[int, int, int, int], boxes: np.ndarray) -> np.ndarray:
    """IoU of a box with each of boxes [B, 4], float64 [B]; xmax and ymax are exclusive."""
    box, boxes = np.asarray(box, np.float64), np.asarray(boxes, np.float64).reshape(-1, 4)
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    overlap = sides.clip(0).prod(1)
    return overlap / ((box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(1) - overlap)


def is_found(box: tuple[int, int, int, int], boxes: np.ndarray) -> bool:
    """Whether a box counts for CorLoc: IoU 0.5 or more with any of the true boxes [B, 4]."""
    return bool((box_iou(box, boxes) >= 0.5).any())
