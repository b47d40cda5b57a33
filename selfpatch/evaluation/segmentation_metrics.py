"""Scores of segmentations: the confusion matrix, mean IoU, and the matching of clusters to classes."""
import numpy as np
import torch

IGNORE = 255  # label of pixels that are not scored


def confusion_matrix(truth: torch.Tensor, prediction: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Pixels by true class (rows) and predicted class (columns), int64 [C, C].

    Args:
        truth, prediction: ids of one shape; pixels whose truth is IGNORE are left out.
    """
    counted = truth != IGNORE
    pairs = truth[counted].long() * num_classes + prediction[counted].long()
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_iou(confusion: np.ndarray) -> np.ndarray:
    """Intersection over union of every class, float64 [C]; NaN for a class without a true pixel."""
    hits, true = np.diag(confusion).astype(np.float64), confusion.sum(1)
    return np.divide(hits, confusion.sum(0) + true - hits, out=np.full(len(hits), np.nan), where=true > 0)


def mean_iou(confusion: np.ndarray, present_only: bool = False) -> float:
    """Mean of class_iou from 0 to 1.

    Args:
        confusion: [C, C], see confusion_matrix.
        present_only: leave out classes without a true pixel, which count as 0 otherwise.
    """
    iou = class_iou(confusion)
    return float(np.nanmean(iou) if present_only else np.nan_to_num(iou).mean())


def match_predictions(confusion: np.ndarray) -> np.ndarray:
    """The confusion matrix with predicted classes renamed, one to one, so that the sum of IoUs is largest."""
    hits = confusion.astype(np.float64)
    union = confusion.sum(1, keepdims=True) + confusion.sum(0, keepdims=True) - hits
    return confusion[:, assign(-hits / np.maximum(union, 1))]


def assign(cost: np.ndarray) -> np.ndarray:
    """The column of every row of a square matrix [n, n], one to one, with the least sum of costs.

    The Hungarian algorithm in its O(n³) form: rows are added one by one, each by a shortest augmenting path over the
    reduced costs (Jonker & Volgenant 1987).
    """
    n = len(cost)
    row_price, column_price = np.zeros(n), np.zeros(n + 1)
    row_of = np.full(n + 1, -1)  # the row of every column; column n stands for the row that is being added
    for new in range(n):
        row_of[n], column = new, n
        distance, previous, done = np.full(n, np.inf), np.full(n, n), np.zeros(n + 1, bool)
        while row_of[column] >= 0:
            done[column] = True
            row, free = row_of[column], ~done[:n]
            reduced = cost[row] - row_price[row] - column_price[:n]
            closer = free & (reduced < distance)
            distance[closer], previous[closer] = reduced[closer], column
            nearest = int(np.where(free, distance, np.inf).argmin())
            step = distance[nearest]
            row_price[row_of[done]] += step
            column_price[done] -= step
            distance[free] -= step
            column = nearest
        while column != n:
            row_of[column], column = row_of[previous[column]], previous[column]
    columns = np.empty(n, int)
    columns[row_of[:n]] = np.arange(n)
    return columns
