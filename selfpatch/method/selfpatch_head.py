"""The paper's idea: each patch learns from the neighbours that look most like it (Yun et al. 2022, arXiv 2206.07990).

    head = SelfPatchHead(384, num_heads=6, k_num=4)
    student = head(x)               # [B, N, D] -> [B, 1 + N, D]: class token over all patches, then the patches
    teacher = head.targets(x)       # the same class token, then for each patch a summary of its positives

1. positive_matching (neighbours.py): of a patch's 8 neighbours, the k_num most similar ones are its positives.
2. SelfPatchHead.aggregate: the teacher summarises each patch's positives by class attention.
3. DINOLoss.patch_loss (losses.py): the student's patch has to predict that summary's assignment to prototypes.
"""
import torch
from timm.layers import Mlp, trunc_normal_
from torch import nn

from selfpatch.errors import ConfigError
from selfpatch.method.neighbours import (  # noqa: F401 (users import neighbour_similarity from here)
    check_grid,
    gather_patches,
    neighbour_similarity,
    patch_rows,
    positive_matching,
)
from selfpatch.method.packed_crops import (
    Layout,
    packed_class_tokens,
    packed_features,
    packed_summaries,
    packed_targets,
)
from selfpatch.method.vision_transformer import CropLogits, Logits, VisionTransformer, init_weights


class ClassAttention(nn.Module):
    """Multi-head attention with the class token as its only query (CaiT, Touvron et al. 2021, Sec. 3).

    This is the plain form. attend_absorbed and attend_projected in packed_crops.py compute the same faster.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """softmax(q kᵀ / √d) v with q from the class token u[:, 0], and k, v from all of u [B, 1 + M, D] -> [B, D]."""
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, 1 or 1 + M, d]
                   for t in (self.q(u[:, :1]), self.k(u), self.v(u)))
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(1))


class ClassAttentionBlock(nn.Module):
    """Pre-norm class attention and MLP: updates class tokens c, which attend to themselves and the patches x."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = ClassAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, c: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Class tokens c [B, D] over patches x [B, M, D] -> [B, D]."""
        c = c + self.attn(self.norm1(torch.cat([c[:, None], x], dim=1)))
        return c + self.mlp(self.norm2(c))


class SelfPatchHead(nn.Module):
    """Positive matching and aggregation of neighbouring patches (SelfPatch, Sec. 3).

    The student uses forward, the teacher targets. Both have a plain form, summarise and aggregate, and a faster one
    with equal results, in packed_crops.py. Where a plain method is overridden, or a block is of another class, the
    plain form is used; fast = False asks for it.

    Args:
        in_dim: width of the backbone.
        num_heads: attention heads, as many as the backbone has.
        k_num: positives of a patch among its 8 neighbours.

    Raises:
        ConfigError: k_num is not in 1 … 8.
    """

    fast = True

    def __init__(self, in_dim: int, num_heads: int, k_num: int = 4):
        super().__init__()
        if not 1 <= k_num <= 8:
            raise ConfigError(f"k_num is {k_num}, but a patch has 8 neighbours: choose 1 to 8")
        self.k_num = k_num
        self.cls_token = nn.Parameter(torch.zeros(1, 1, in_dim))
        self.cls_blocks = nn.ModuleList(ClassAttentionBlock(in_dim, num_heads) for _ in range(2))
        self.norm = nn.LayerNorm(in_dim, eps=1e-6)
        trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_weights)

    @property
    def is_fast(self) -> bool:
        """Whether the faster form is used, which would ignore overrides."""
        if not self.fast or any(getattr(type(self), name) is not getattr(SelfPatchHead, name)
                                for name in ("summarise", "aggregate", "class_token")):
            return False
        return all(type(block) is ClassAttentionBlock and type(block.attn) is ClassAttention
                   for block in self.cls_blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Student: backbone features x [B, N, D] -> class token over all patches, and the patches, [B, 1 + N, D]."""
        return self.norm(torch.cat([self.class_token(x)[:, None], x], dim=1))

    def image_token(self, x: torch.Tensor) -> torch.Tensor:
        """Row 0 of forward and of targets, [B, 1, D]: all that DINO's loss needs."""
        return self.norm(self.class_token(x)[:, None])

    def targets(self, x: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """Teacher: x [B, N, D] -> class token over all patches, and over each patch's positives, [B, 1 + N, D].

        Args:
            grid: rows and columns of patches; None for a square.

        Raises:
            ConfigError: the grid does not have N patches, or has fewer than 3 on a side.
        """
        positives = positive_matching(x, check_grid(x.shape[1], grid), self.k_num)
        if self.is_fast:
            c, targets = self.aggregate_projected(x, positives)
        else:
            c, targets = self.class_token(x), self.aggregate(x, positives)
        return self.norm(torch.cat([c[:, None], targets], dim=1))

    def class_token(self, x: torch.Tensor) -> torch.Tensor:
        return self.summarise_absorbed(x) if self.is_fast else self.summarise(x)

    def summarise(self, x: torch.Tensor) -> torch.Tensor:
        """The class token after attending to patches x [B, M, D] in both blocks, [B, D]."""
        c = self.cls_token[:, 0].expand(len(x), -1)
        for block in self.cls_blocks:
            c = block(c, x)
        return c

    def aggregate(self, x: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
        """Each patch's target [B, N, D]: summarise applied to its positives alone (indices [B, N, k])."""
        return self.summarise(gather_patches(x, positives)).unflatten(0, positives.shape[:2])

    def summarise_absorbed(self, x: torch.Tensor) -> torch.Tensor:
        """summarise without projecting the patches."""
        return packed_class_tokens(self, x.flatten(0, 1), Layout([len(x)], [(1, x.shape[1])]))

    def aggregate_projected(self, x: torch.Tensor, positives: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """summarise(x) and aggregate(x, positives), projecting each patch once, however often it is a positive."""
        c = packed_summaries(self, x.flatten(0, 1), patch_rows(positives), Layout([len(x)], [(1, x.shape[1])]))
        return c[:len(x)], c[len(x):].view_as(x)


class MultiCropWrapper(nn.Module):
    """Backbone and heads over a list of crops, one forward pass per resolution.

    The student computes wrapper(crops), the teacher wrapper.targets(crops). The names of the four parts are prefixes in
    every checkpoint.

    Args:
        backbone: returns patch features [B, N, D], and has grid_size(images).
        ca_head: a SelfPatchHead.
        c_head, p_head: projection heads (DINOHead) for the class token and for the patches.
        use_patches: False for DINO: no patch logits, and the teacher sees the two global crops only.
    """

    def __init__(self, backbone: nn.Module, ca_head: nn.Module, c_head: nn.Module, p_head: nn.Module,
                 use_patches: bool = True):
        super().__init__()
        self.backbone, self.ca_head, self.c_head, self.p_head = backbone, ca_head, c_head, p_head
        self.use_patches = use_patches

    def forward(self, crops: list[torch.Tensor]) -> CropLogits:
        """Student: logits of each crop's class token and of its patches.

        Args:
            crops: V tensors [B, 3, H, W]; equal sizes are adjacent, the two global crops come first.
        """
        head = self.ca_head if self.use_patches else self.ca_head.image_token
        return self.project([head(x) for x, _ in self.features(crops)])

    def targets(self, crops: list[torch.Tensor]) -> CropLogits:
        """Teacher: logits of each crop's class token, and of its patches' targets."""
        if not self.use_patches:
            return self.project([self.ca_head.image_token(x) for x, _ in self.features(crops[:2])])
        return self.project([self.ca_head.targets(x, grid) for x, grid in self.features(crops)])

    def compile(self, **kwargs) -> None:
        """Compile forward and targets in place; the state dict's names stay."""
        super().compile(**kwargs)
        self.targets = torch.compile(self.targets, **kwargs)

    def features(self, crops: list[torch.Tensor]) -> list[tuple[torch.Tensor, tuple[int, int]]]:
        """Backbone features [V_r·B, N_r, D] of each run of V_r equally sized crops, and the grid of their patches."""
        return [(self.backbone(images), self.backbone.grid_size(images)) for images in self.batches(crops)]

    @staticmethod
    def batches(crops: list[torch.Tensor]) -> list[torch.Tensor]:
        """Each run of V_r equally sized crops as one tensor [V_r·B, 3, H_r, W_r]."""
        runs = []
        for crop in crops:  # torch 2.6 cannot compile itertools.groupby over shapes
            if runs and runs[-1][0].shape == crop.shape:
                runs[-1].append(crop)
            else:
                runs.append([crop])
        return [torch.cat(run) for run in runs]

    def project(self, tokens: list[torch.Tensor]) -> CropLogits:
        """Tokens [V_r·B, 1 + N_r, D] of each resolution -> logits, by one pass of each projection head."""
        image, patches = torch.cat([t[:, 0] for t in tokens]), torch.cat([t[:, 1:].flatten(0, 1) for t in tokens])
        return self.logits(image, patches, [(len(t), t.shape[1] - 1) for t in tokens])

    def logits(self, image: torch.Tensor, patches: torch.Tensor | None, shapes: list[tuple[int, int]]) -> CropLogits:
        """Logits of image tokens [I, D] and patches [T, D]; shapes: (images, patches per image) of each resolution."""
        image = self.c_head.factors(image)
        if not self.use_patches:
            return CropLogits(image, [])
        z, prototypes = self.p_head.factors(patches)
        parts = z.split([images * patches for images, patches in shapes])
        return CropLogits(image, [Logits(part.unflatten(0, shape), prototypes)
                                  for part, shape in zip(parts, shapes, strict=True)])


class PackedMultiCropWrapper(MultiCropWrapper):
    """MultiCropWrapper with a single pass over all resolutions (packed_crops.py); its state dict is the same.

    If backbone or ca_head is of a different class than VisionTransformer (without class token) and SelfPatchHead, which
    may compute something else, it makes a pass for each resolution.
    """

    @property
    def packs(self) -> bool:
        return type(self.backbone) is VisionTransformer and type(self.ca_head) is SelfPatchHead and self.ca_head.is_fast

    def packed_features(self, crops: list[torch.Tensor]) -> tuple[torch.Tensor, Layout]:
        return packed_features(self.backbone, self.batches(crops))

    def features(self, crops: list[torch.Tensor]) -> list[tuple[torch.Tensor, tuple[int, int]]]:
        if not self.packs:
            return super().features(crops)
        x, layout = self.packed_features(crops)
        return list(zip(layout.split(x), layout.grids, strict=True))

    def forward(self, crops: list[torch.Tensor]) -> CropLogits:
        if not self.packs:
            return super().forward(crops)
        x, layout = self.packed_features(crops)
        tokens = self.ca_head.norm(packed_class_tokens(self.ca_head, x, layout))
        return self.logits(tokens, self.ca_head.norm(x) if self.use_patches else None, layout.shapes)

    def targets(self, crops: list[torch.Tensor]) -> CropLogits:
        if not self.packs or not self.use_patches:
            return super().targets(crops)
        x, layout = self.packed_features(crops)
        for grid in layout.grids:
            check_grid(grid[0] * grid[1], grid)
        return self.logits(*packed_targets(self.ca_head, x, layout), layout.shapes)
