"""The neighbours of a patch, and which of them are its positives (SelfPatch, Sec. 3).

A patch at an edge has neighbours at the opposite one, as on a torus.
"""
import torch
import torch.nn.functional as F

from selfpatch.errors import ConfigError


def neighbour_similarity(x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Cosine similarity of every patch to its 8 neighbours on a torus, [B, N, 8] in float32.

    Neighbours are in row-major order: upper left, upper, upper right, left, right, lower left, lower, lower right.

    Args:
        x: patch features [B, N, D], row-major.
        grid: rows and columns of patches, rows · columns = N.
    """
    x = F.normalize(x.float(), dim=-1).unflatten(1, grid)
    first_half = []
    for dy, dx in ((-1, -1), (-1, 0), (-1, 1), (0, -1)):
        first_half.append((x * x.roll((-dy, -dx), dims=(1, 2))).sum(-1))
    # similarity is symmetric: a patch is the upper left neighbour of its own lower right neighbour, and so on
    second_half = [s.roll((dy, dx), dims=(1, 2)) for s, (dy, dx) in
                   zip(reversed(first_half), ((0, -1), (-1, 1), (-1, 0), (-1, -1)), strict=True)]
    return torch.stack(first_half + second_half, dim=-1).flatten(1, 2)


def positive_matching(x: torch.Tensor, grid: tuple[int, int], k_num: int) -> torch.Tensor:
    """Indices [B, N, k_num] of the neighbours most similar to each patch, best first (SelfPatch, Sec. 3)."""
    _, best = neighbour_similarity(x, grid).topk(k_num, dim=-1)
    return neighbours(grid, window_cells(x.device)).expand(len(x), -1, -1).gather(2, best)


def patch_rows(index: torch.Tensor) -> torch.Tensor:
    """Indices [B, N, k] within each image as rows of all images' patches, [B·N, k]."""
    return (index + torch.arange(len(index), device=index.device)[:, None, None] * index.shape[1]).flatten(0, 1)


def gather_patches(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of x [B, N, D] at index [B, N, k] -> [B·N, k, D]."""
    return x.flatten(0, 1)[patch_rows(index)]


def window_cells(device: torch.device) -> torch.Tensor:
    """The cells of a 3×3 window but its middle, which is the patch itself: 0 to 3 and 5 to 8."""
    cell = torch.arange(8, device=device)
    return cell + (cell >= 4)


def neighbours(grid: tuple[int, int], cells: torch.Tensor) -> torch.Tensor:
    """Indices of each patch's 8 neighbours on a torus, [N, 8], in neighbour_similarity's order."""
    rows, columns = grid
    patch = torch.arange(rows * columns, device=cells.device)[:, None]
    return (patch // columns + cells // 3 - 1) % rows * columns + (patch % columns + cells % 3 - 1) % columns


def check_grid(num_patches: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    """The grid, or the square of that many patches if it is None.

    Raises:
        ConfigError: it has a different number of patches, or fewer than 3 on a side.
    """
    grid = grid or (round(num_patches ** 0.5),) * 2
    if grid[0] * grid[1] != num_patches:
        raise ConfigError(f"{num_patches} patches do not fill a grid of {grid[0]}×{grid[1]}: pass the right grid")
    if min(grid) < 3:
        raise ConfigError(f"on a {grid[0]}×{grid[1]} grid a patch has no 8 distinct neighbours: "
                          "the crop needs at least 3 patches a side")
    return grid
