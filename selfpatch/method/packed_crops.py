"""Crops of all sizes in one pass: token-wise layers run on the tokens of all of them, with half as many GPU launches.

    x, layout = packed_features(backbone, [global_crops, local_crops])  # tokens [T, D] of all images
    image_tokens, targets = packed_targets(head, x, layout)             # [I, D], [T, D]

The functions compute the same as vision_transformer.py and selfpatch_head.py, which are easier to read; those of the
head are its fast form, also for crops of one size. After changing the plain form of the backbone, use --pack_crops off,
and after changing that of the head, SelfPatchHead.fast = False; or make the change here as well:
tests/method/test_packed_crops.py compares the two. Subclasses are not packed. Attention stays within an image, so it
runs once per resolution (as in DINOv3). One launch casts all weights of a block to autocast's precision, instead of one
launch each.
"""
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import Attention, Block
from torch import nn

from selfpatch.method.neighbours import neighbours, window_cells
from selfpatch.method.vision_transformer import VisionTransformer, recomputing

Weights = dict[nn.Linear, tuple[torch.Tensor, torch.Tensor | None]]


@dataclass
class Layout:
    """Layout of T tokens, image by image: for each resolution the number of images (I in all), and their grid."""
    images: list[int]
    grids: list[tuple[int, int]]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(images, tokens per image) of each resolution."""
        return [(images, rows * columns) for images, (rows, columns) in zip(self.images, self.grids, strict=True)]

    @property
    def sizes(self) -> list[int]:
        """Tokens of each resolution."""
        return [images * tokens for images, tokens in self.shapes]

    def split(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Rows [T, D'] -> views [images, tokens per image, D'] for each resolution."""
        return [part.unflatten(0, shape) for part, shape in zip(tokens.split(self.sizes), self.shapes, strict=True)]


def cast_copies(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Copies in another dtype, made by one launch."""
    copies = [torch.empty_like(t, dtype=dtype) for t in tensors]
    torch._foreach_copy_(copies, list(tensors))
    return copies


# opaque to the compiler, or it would launch one kernel per tensor
cast_copies_whole = torch.library.custom_op("selfpatch::cast_copies", cast_copies, mutates_args=(),
                                            schema="(Tensor[] tensors, ScalarType dtype) -> Tensor[]")


@cast_copies_whole.register_fake
def _(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.empty_like(t, dtype=dtype) for t in tensors]


def cast_by_one_launch(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    # outside compiled code a custom operator would only cost host time
    return (cast_copies_whole if torch.compiler.is_compiling() else cast_copies)(tensors, dtype)


class CastTogether(torch.autograd.Function):
    """Casts tensors of one dtype to another by one launch, and their gradients back by another."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.dtype = tensors[0].dtype
        ctx.set_materialize_grads(False)
        return tuple(cast_by_one_launch(tensors, dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        copies = iter(cast_by_one_launch([g for g in grads if g is not None], ctx.dtype))
        return None, *[None if g is None else next(copies) for g in grads]


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of a matrix product with x."""
    enabled = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if enabled else x.dtype


def cast_weights(module: nn.Module, x: torch.Tensor) -> Weights:
    """Weight and bias of all Linear layers in a module, in the dtype of products with x."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    weights = [weight for layer in layers for weight in (layer.weight, layer.bias) if weight is not None]
    if autocast_dtype(x) != weights[0].dtype:
        weights = CastTogether.apply(autocast_dtype(x), *weights)
    weights = iter(weights)
    return {layer: (next(weights), None if layer.bias is None else next(weights)) for layer in layers}


# ---------------------------------------------------------------- backbone

def packed_features(backbone: VisionTransformer, batches: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Layout]:
    """Features [T, D] of batches of images [B_r, 3, H_r, W_r], from a backbone without class token."""
    layout = Layout([len(images) for images in batches], [backbone.grid_size(images) for images in batches])
    x = torch.cat([backbone.prepare_tokens(images).flatten(0, 1) for images in batches])
    for block, scales in zip(backbone.blocks, branch_scales(backbone, x, layout), strict=True):
        x = packed_block(block, x, layout, scales, backbone.checkpoint_activations)
    return backbone.norm(x), layout


def packed_block(block: Block, x: torch.Tensor, layout: Layout, scales: torch.Tensor | None = None,
                 recompute: str = "") -> torch.Tensor:
    """A block on tokens x [T, D]. scales [2, T, 1] multiply its two branches, None for 1; recompute as in run_block."""
    if recompute == "block":
        return recomputing(packed_block, True)(block, x, layout, scales)
    weights = cast_weights(block, x)
    attend = recomputing(lambda x: packed_attention(block.attn, block.norm1(x), layout, weights),
                         recompute == "attention")
    mix = recomputing(lambda x: packed_mlp(block.mlp, block.norm2(x), weights), recompute == "mlp")
    attended = attend(x)
    x = x + (attended if scales is None else attended * scales[0])
    mixed = mix(x)
    return x + (mixed if scales is None else mixed * scales[1])


def packed_attention(attn: Attention, x: torch.Tensor, layout: Layout, weights: Weights) -> torch.Tensor:
    """Self-attention within each image, on tokens x [T, D] of all images."""
    outputs = []
    for qkv in layout.split(F.linear(x, *weights[attn.qkv])):
        q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [images, heads, tokens, d] each
        outputs.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1))
    return F.linear(torch.cat(outputs), *weights[attn.proj])


def packed_mlp(mlp: Mlp, x: torch.Tensor, weights: Weights) -> torch.Tensor:
    return F.linear(mlp.act(F.linear(x, *weights[mlp.fc1])), *weights[mlp.fc2])


def branch_scales(backbone: VisionTransformer, x: torch.Tensor, layout: Layout) -> list[torch.Tensor | None]:
    """Stochastic depth of all blocks, drawn at once: [2, T, 1] for each block's two branches, None to drop nothing.

    A dropped branch of an image is scaled by 0, others by 1 / (1 - rate), in the dtype of their output, as in timm.
    """
    depth, rate = len(backbone.blocks), backbone.drop_path_rate
    if not rate or not backbone.training:
        return [None] * depth
    keep = (1 - torch.linspace(0, rate, depth, device=x.device))[:, None, None]
    by_image = (torch.bernoulli(keep.expand(-1, 2, sum(layout.images))) / keep).to(autocast_dtype(x))
    by_token = [part[..., None].expand(-1, -1, -1, tokens).flatten(2)
                for part, (_, tokens) in zip(by_image.split(layout.images, dim=2), layout.shapes, strict=True)]
    return [None, *torch.cat(by_token, dim=2)[1:, ..., None]]  # the first block's rate is 0


# ---------------------------------------------------------------- SelfPatch head

def packed_class_tokens(head: nn.Module, x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """head.summarise(x) for each resolution, [I, D]."""
    c = head.cls_token[:, 0].expand(sum(layout.images), -1)
    for block in head.cls_blocks:
        weights = cast_weights(block, x)
        u = block.norm1(x).to(autocast_dtype(x))
        c = c + attend_absorbed(block.attn, block.norm1(c), u, layout, weights)
        c = c + packed_mlp(block.mlp, block.norm2(c), weights)
    return c


def attend_absorbed(attn: nn.Module, c: torch.Tensor, u: torch.Tensor, layout: Layout,
                    weights: Weights) -> torch.Tensor:
    """ClassAttention of class tokens c [I, D] over themselves and the patches u [T, D], not projected -> [I, D].

    The query absorbs the key projection, q·(K u) = (Kᵀ q)·u, and values are projected after mixing.
    """
    heads = (attn.num_heads, -1)
    (K, k_bias), (V, v_bias) = weights[attn.k], weights[attn.v]
    q = F.linear(c, *weights[attn.q]).unflatten(-1, heads)
    q = q * q.shape[-1] ** -0.5
    bias = (q * k_bias.unflatten(0, heads)).sum(-1, keepdim=True)
    q = torch.einsum("bhd,hdD->bhD", q, K.unflatten(0, heads))
    mixed = [mix_absorbed(*tensors) for tensors in
             zip(*(t.split(layout.images) for t in (q, bias, c[:, None])), layout.split(u), strict=True)]
    mixed = torch.einsum("bhD,hdD->bhd", torch.cat(mixed), V.unflatten(0, heads)).flatten(1) + v_bias
    return F.linear(mixed, *weights[attn.proj])


def mix_absorbed(q: torch.Tensor, bias: torch.Tensor, c: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Mix the class token c [B, 1, D] and patches u [B, N, D] by the attention of q [B, heads, D] -> [B, heads, D].

    bias [B, heads, 1] shifts all scores of a head, which has no effect except that the key's bias gets a gradient.
    """
    p = torch.cat([(q * c).sum(-1, keepdim=True), q @ u.mT], dim=-1).add(bias).softmax(-1)
    return p[..., 1:] @ u + p[..., :1] * c


def packed_targets(head: nn.Module, x: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """head.targets(x, grid) for each resolution: class tokens [I, D], each patch's target [T, D]."""
    c = packed_summaries(head, x, packed_positives(x, layout, head.k_num), layout)
    return head.norm(c).split([sum(layout.images), len(x)])


def packed_summaries(head: nn.Module, x: torch.Tensor, positives: torch.Tensor, layout: Layout) -> torch.Tensor:
    """head.summarise of each image's patches, then of each patch's positives: rows of x [T, k] -> [I + T, D].

    Each patch is projected to key and value once, however often it is a positive.
    """
    c = head.cls_token[:, 0]  # one row shared by all class tokens, of images and then of patches, until they attend
    for block in head.cls_blocks:
        weights, u = cast_weights(block, x), block.norm1(x).to(autocast_dtype(x))
        keys, values = (F.linear(u, *weights[layer]) for layer in (block.attn.k, block.attn.v))
        c = c + attend_projected(block.attn, block.norm1(c).to(u.dtype), keys, values, positives, layout, weights)
        c = c + packed_mlp(block.mlp, block.norm2(c), weights)
    return c


def attend_projected(attn: nn.Module, c: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
                     positives: torch.Tensor, layout: Layout, weights: Weights) -> torch.Tensor:
    """ClassAttention over projected patches, for all images and for the positives of all patches.

    With one query per row a fused kernel would save nothing, and on GPUs it is limited to 65,535 rows.

    Args:
        c: class tokens [I + T, D], or [1, D] if all are equal.
        keys, values: of all patches, [T, D].
        positives: rows of keys and values, [T, k].

    Returns:
        [I + T, D].
    """
    q, k, v = (F.linear(c, *weights[layer]).expand(sum(layout.images) + len(keys), -1)
               .split([*layout.images, len(keys)]) for layer in (attn.q, attn.k, attn.v))
    keys, values = [*layout.split(keys), keys[positives]], [*layout.split(values), values[positives]]
    mixed = [attend_one(*(t.unflatten(-1, (attn.num_heads, -1)) for t in tensors))
             for tensors in zip(q, k, v, keys, values, strict=True)]
    return F.linear(torch.cat(mixed).flatten(1), *weights[attn.proj])


def attend_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor,
               values: torch.Tensor) -> torch.Tensor:
    """Attention of one query to its own key and others: q, k, v [B, heads, d], keys, values [B, M, heads, d]."""
    scores = torch.cat([(q * k).sum(-1)[:, None], (q[:, None] * keys).sum(-1)], dim=1)
    p = (scores * q.shape[-1] ** -0.5).softmax(1)[..., None]
    return p[:, 0] * v + (p[:, 1:] * values).sum(1)


def packed_positives(x: torch.Tensor, layout: Layout, k_num: int) -> torch.Tensor:
    """positive_matching in all images at once, as rows of the tokens: [T, k_num]."""
    rows = neighbour_rows(layout, x.device)
    x = F.normalize(x.float(), dim=-1)
    first_half = torch.stack([(x * x[rows[:, j]]).sum(-1) for j in range(4)], dim=1)  # [T, 4, D] is large
    # similarity is symmetric: a token's in direction j equals that neighbour's in the opposite direction, 7 - j
    opposite = rows[:, 4:] * 4 + torch.arange(3, -1, -1, device=rows.device)
    similarity = torch.cat([first_half, first_half.flatten()[opposite]], dim=1)
    return rows.gather(1, similarity.topk(k_num, dim=1).indices)


def neighbour_rows(layout: Layout, device: torch.device) -> torch.Tensor:
    """Rows of each token's 8 neighbours, [T, 8], in the order of neighbours."""
    start, parts, cells = 0, [], window_cells(device)
    for (images, tokens), grid in zip(layout.shapes, layout.grids, strict=True):
        first = start + tokens * torch.arange(images, device=device)[:, None, None]
        parts.append((first + neighbours(grid, cells)).flatten(0, 1))
        start += images * tokens
    return torch.cat(parts)
