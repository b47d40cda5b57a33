"""The paper's idea: each patch learns from the neighbours that look most like it (Yun et al. 2022, arXiv 2206.07990).

    head = SelfPatchHead(384, num_heads=6, k_num=4)
    student = head(x)               # [B, N, D] -> [B, 1 + N, D]: class token over all patches, then the patches
    teacher = head(x, loc=True)     # the same class token, then per patch a summary of its positive neighbours
"""
import torch
import torch.nn.functional as F
from timm.layers import Mlp, trunc_normal_
from torch import nn

from vision_transformer import Logits, init_weights


def neighbour_similarity(x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Cosine similarity of every patch to its 8 neighbours on a torus, [B, N, 8] in float32.

    The neighbours stand in reading order: upper left, upper, upper right, left, right, lower left, lower, lower right.

    Args:
        x: patch features [B, N, D], row by row.
        grid: rows and columns of patches, rows·columns = N.
    """
    x = F.normalize(x.float(), dim=-1).unflatten(1, grid)
    before = []
    for dy, dx in ((-1, -1), (-1, 0), (-1, 1), (0, -1)):
        before.append((x * x.roll((-dy, -dx), dims=(1, 2))).sum(-1))
    # similarity is symmetric: the four later neighbours are the four earlier ones, seen from the other side
    after = [s.roll((dy, dx), dims=(1, 2))
             for s, (dy, dx) in zip(reversed(before), ((0, -1), (-1, 1), (-1, 0), (-1, -1)), strict=True)]
    return torch.stack(before + after, dim=-1).flatten(1, 2)


def positive_matching(x: torch.Tensor, grid: tuple[int, int], k_num: int) -> torch.Tensor:
    """Indices [B, N, k_num] of the neighbours most similar to each patch, best first (SelfPatch, positive matching)."""
    _, choice = neighbour_similarity(x, grid).topk(k_num, dim=-1)
    cell = choice + (choice >= 4)  # 0 … 8 in the 3×3 window, whose cell 4 is the patch itself
    patch = torch.arange(x.shape[1], device=x.device)[:, None]
    row = (patch // grid[1] + cell // 3 - 1) % grid[0]
    column = (patch % grid[1] + cell % 3 - 1) % grid[1]
    return row * grid[1] + column


def gather_patches(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of x [B, N, D] at index [B, N, k] -> [B·N, k, D]."""
    rows = index + torch.arange(len(x), device=x.device)[:, None, None] * x.shape[1]
    return x.flatten(0, 1)[rows.flatten(0, 1)]


class ClassAttention(nn.Module):
    """Multi-head attention in which class tokens alone ask (CaiT, Touvron et al. 2021, Sec. 3)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, c: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Class tokens c [B, D] over keys and values [B, M, D] and over themselves -> [B, D]."""
        k = torch.cat([self.k(c)[:, None], keys], dim=1)
        v = torch.cat([self.v(c)[:, None], values], dim=1)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in (self.q(c)[:, None], k, v))
        # one query a row: nothing for a fused kernel to save, and those stop at 65,535 rows; a patch is a row here
        weights = ((q * k).sum(-1) * k.shape[-1] ** -0.5).softmax(dim=1)
        return self.proj((weights[..., None] * v).sum(1).flatten(1))

    def gather(self, u: torch.Tensor) -> torch.Tensor:
        """What u[:, 0] draws from all of u [B, M, D] -> [B, D], with no patch projected.

        One query asks of M patches, so it goes back through the key projection, q·(K u) = (Kᵀ q)·u, and the values are
        projected once they are mixed.
        """
        q, (K, V) = self.q(u[:, 0]), (layer.weight.unflatten(0, (self.num_heads, -1)) for layer in (self.k, self.v))
        q, bias = q.unflatten(-1, (self.num_heads, -1)), self.k.bias.unflatten(0, (self.num_heads, -1))
        scores = torch.einsum("bhd,hdD->bhD", q, K) @ u.mT + (q * bias).sum(-1, keepdim=True)
        mixed = (scores * q.shape[-1] ** -0.5).softmax(-1) @ u
        return self.proj(torch.einsum("bhD,hdD->bhd", mixed, V).flatten(1) + self.v.bias)


class ClassAttentionBlock(nn.Module):
    """Pre-norm class attention and MLP on class tokens; patches enter as keys and values and stay as they are."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = ClassAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, N, D] of patches x [B, N, D], each patch projected once however often it is asked."""
        u = self.norm1(x)
        return self.attn.k(u), self.attn.v(u)

    def forward(self, c: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        c = c + self.attn(self.norm1(c), keys, values)
        return c + self.mlp(self.norm2(c))

    def gather(self, c: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """As forward over patches x [B, N, D], whose keys and values nobody else asks for."""
        c = c + self.attn.gather(self.norm1(torch.cat([c[:, None], x], dim=1)))
        return c + self.mlp(self.norm2(c))


class SelfPatchHead(nn.Module):
    """Positive matching and aggregation of neighbouring patches (SelfPatch, the two parts of its teacher).

    Args:
        in_dim: width of the backbone.
        num_heads: attention heads, as many as the backbone has.
        k_num: positives of a patch among its 8 neighbours.

    Raises:
        ValueError: k_num outside 1 … 8, or (in forward) a grid on which the 8 neighbours are not distinct.
    """

    def __init__(self, in_dim: int, num_heads: int, k_num: int = 4):
        super().__init__()
        if not 1 <= k_num <= 8:
            raise ValueError(f"k_num is {k_num}, but a patch has 8 neighbours: choose 1 to 8")
        self.k_num = k_num
        self.cls_token = nn.Parameter(torch.zeros(1, 1, in_dim))
        self.cls_blocks = nn.ModuleList(ClassAttentionBlock(in_dim, num_heads) for _ in range(2))
        self.norm = nn.LayerNorm(in_dim, eps=1e-6)
        trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_weights)

    def forward(self, x: torch.Tensor, loc: bool = False, grid: tuple[int, int] | None = None,
                patches: bool = True) -> torch.Tensor:
        """Backbone features x [B, N, D] -> [B, 1 + N, D], normalised.

        Row 0 is the class token over all patches. The other rows are the patches themselves, or with loc
        (for the teacher) what the class token gathers from each patch's k_num positives.

        Args:
            grid: rows and columns of patches; a square where not given.
            patches: without them only row 0 is computed, [B, 1, D].
        """
        B, N, D = x.shape
        c = self.cls_token.expand(B, 1, D).flatten(0, 1)
        if not (loc and patches):
            for block in self.cls_blocks:
                c = block.gather(c, x)
            c = c[:, None]
            return self.norm(torch.cat([c, x], dim=1) if patches else c)

        positives = positive_matching(x, self._checked_grid(N, grid), self.k_num)
        targets = self.cls_token.expand(B, N, D).flatten(0, 1)
        for block in self.cls_blocks:
            keys, values = block.keys_values(x)
            c = block(c, keys, values)
            targets = block(targets, gather_patches(keys, positives), gather_patches(values, positives))
        return self.norm(torch.cat([c[:, None], targets.unflatten(0, (B, N))], dim=1))

    @staticmethod
    def _checked_grid(num_patches: int, grid: tuple[int, int] | None) -> tuple[int, int]:
        grid = grid or (round(num_patches ** 0.5),) * 2
        if grid[0] * grid[1] != num_patches:
            raise ValueError(f"{num_patches} patches do not make a grid of {grid[0]}×{grid[1]}: pass the right grid")
        if min(grid) < 3:
            raise ValueError(f"on a {grid[0]}×{grid[1]} grid a patch has no 8 distinct neighbours: "
                             "the crop needs at least 3 patches a side")
        return grid


class MultiCropWrapper(nn.Module):
    """Backbone and heads over a list of crops, each resolution in one forward.

    The four names are the prefixes in every checkpoint: ca_head is the SelfPatchHead, c_head projects the class
    token, p_head the patches.
    """

    def __init__(self, backbone: nn.Module, ca_head: nn.Module, c_head: nn.Module, p_head: nn.Module):
        super().__init__()
        self.backbone, self.ca_head, self.c_head, self.p_head = backbone, ca_head, c_head, p_head

    def forward(self, crops: list[torch.Tensor], loc: bool = False,
                patches: bool = True) -> tuple[Logits, list[Logits]]:
        """Crops, V tensors [B, 3, H, W], equal sizes next to each other -> image and patch logits.

        Args:
            loc: patches give their positives' summary (the teacher), not themselves (the student).
            patches: without them the second output is empty and nothing is computed for it.

        Returns:
            image logits [V·B, out_dim], view by view; patch logits, one [V_r·B, N_r, out_dim_selfpatch] for each run
            of V_r crops of one size. Logits.dense() forms them.
        """
        runs = [[crops[0]]]
        for crop in crops[1:]:
            if crop.shape == runs[-1][0].shape:
                runs[-1].append(crop)
            else:
                runs.append([crop])
        tokens = []
        for run in runs:
            x = torch.cat(run)
            tokens.append(self.ca_head(self.backbone(x), loc, self.backbone.grid_size(x), patches))
        image = self.c_head(torch.cat([t[:, 0] for t in tokens]), dense=False)
        if not patches:
            return image, []
        shapes = [(len(t), t.shape[1] - 1) for t in tokens]
        z, weight = self.p_head(torch.cat([t[:, 1:].flatten(0, 1) for t in tokens]), dense=False)
        parts = z.split([b * n for b, n in shapes])
        return image, [Logits(part.unflatten(0, shape), weight) for part, shape in zip(parts, shapes, strict=True)]
