"""The backbone and the projection head: a plain ViT without class token or final norm, and DINO's head.

    model = vit_small(patch_size=16)
    features = model(images)                        # [B, 3, 224, 224] -> [B, 196, 384]
    features = model(torch.rand(1, 3, 480, 832))    # any size -> [1, 30 * 52, 384], row by row
    class_token, patches, keys = model.features(images, layer=-2, keys=True)    # from any block
"""
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, trunc_normal_
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils.checkpoint import checkpoint


def init_weights(module: nn.Module) -> None:
    """Initialise one module as DINO does: Linear N(0, 0.02²) truncated at ±2 with bias 0, LayerNorm 1 and 0."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def add_branch(x: torch.Tensor, branch: Callable, drop_rate: float) -> torch.Tensor:
    """x + branch(x) with stochastic depth as in timm's DropPath; skips the computation for dropped samples."""
    keep_prob = 1 - drop_rate
    kept = x.new_empty(len(x), 1, 1).bernoulli_(keep_prob).flatten().nonzero()[:, 0]
    return x.index_add(0, kept, branch(x.index_select(0, kept)).to(x.dtype), alpha=1 / keep_prob)


RECOMPUTED = ("block", "attention", "mlp")


def recomputing(function: Callable, chosen: bool) -> Callable:
    """The function; if chosen, the backward pass recomputes its intermediate results instead of keeping them."""
    return partial(checkpoint, function, use_reentrant=False) if chosen and torch.is_grad_enabled() else function


def run_block(block: Block, tokens: torch.Tensor, recompute: str = "") -> torch.Tensor:
    """Apply a block to tokens [B, N, D].

    On a CPU, samples dropped by stochastic depth are skipped; on a GPU, choosing them would be a host sync.

    Args:
        recompute: one of RECOMPUTED; empty for none.
    """
    if recompute == "block":
        return recomputing(run_block, True)(block, tokens)
    rate = getattr(block.drop_path1, "drop_prob", 0.0) if block.training else 0.0
    chooses = rate and tokens.device.type == "cpu" and not torch.compiler.is_compiling()
    if not chooses and not recompute:
        return block(tokens)
    attend = recomputing(lambda x: block.attn(block.norm1(x)), recompute == "attention")
    mix = recomputing(lambda x: block.mlp(block.norm2(x)), recompute == "mlp")
    if chooses:
        return add_branch(add_branch(tokens, attend, rate), mix, rate)
    tokens = tokens + block.drop_path1(attend(tokens))
    return tokens + block.drop_path2(mix(tokens))


class Features(NamedTuple):
    """Output of a block, after the network's final norm if it has one.

    class_token [B, D], None if the network has none; patches [B, N, D], row by row; keys [B, N, D] of the patches in
    the block's attention, heads concatenated, None unless asked for.
    """
    class_token: torch.Tensor | None
    patches: torch.Tensor
    keys: torch.Tensor | None = None


class VisionTransformer(nn.Module):
    """Vision Transformer whose output is its patch tokens (Dosovitskiy et al. 2021).

    Args:
        img_size: side in pixels of images that need no resizing of the position embedding.
        patch_size: side of a patch in pixels.
        embed_dim, depth, num_heads, mlp_ratio, qkv_bias: the usual ones.
        drop_path_rate: stochastic depth of the last block; the rate rises linearly from 0 in the first.
        class_token, final_norm: as in DINO's and timm's ViTs; SelfPatch's backbone has neither.
    """

    def __init__(self, img_size: int = 224, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768,
                 depth: int = 12, num_heads: int = 12, mlp_ratio: float = 4.0, qkv_bias: bool = True,
                 drop_path_rate: float = 0.0, class_token: bool = False, final_norm: bool = False):
        super().__init__()
        self.embed_dim = self.num_features = embed_dim
        self.patch_size, self.num_heads, self.drop_path_rate = patch_size, num_heads, drop_path_rate
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        self.patch_embed = PatchEmbed(None, patch_size, in_chans, embed_dim)  # no fixed image size
        num_patches = (img_size // patch_size) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, num_patches + class_token, embed_dim))
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias, drop_path=rate, norm_layer=norm_layer)
            for rate in torch.linspace(0, drop_path_rate, depth, device="cpu").tolist())  # on meta, too
        self.norm = norm_layer(embed_dim) if final_norm else nn.Identity()
        trunc_normal_(self.pos_embed, std=0.02)
        if class_token:
            trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_weights)
        self.checkpoint_activations = ""  # one of RECOMPUTED, to save memory in training

    def grid_size(self, x: torch.Tensor) -> tuple[int, int]:
        """Rows and columns of patches in images x [B, 3, H, W]."""
        return x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size

    def interpolate_pos_encoding(self, grid: tuple[int, int]) -> torch.Tensor:
        """Position embedding of the patches of a rows × columns grid, [1, rows·columns, D]."""
        pos = self.pos_embed[:, self.num_prefix_tokens:]
        side = int(pos.shape[1] ** 0.5)
        if grid == (side, side):
            return pos
        pos = pos.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        # DINO resizes by a factor, with 0.1 added, not to a size: released weights were trained on that sampling grid
        scale = tuple((n + 0.1) / side for n in grid)
        pos = F.interpolate(pos, scale_factor=scale, mode="bicubic", align_corners=False)
        assert pos.shape[-2:] == grid, f"position embedding came out as {tuple(pos.shape[-2:])}, not {grid}"
        return pos.flatten(2).transpose(1, 2)

    @property
    def has_class_token(self) -> bool:
        return self.cls_token is not None

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: 1 with a class token, else 0."""
        return int(self.has_class_token)

    def prepare_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] -> embedded patches [B, N, D], preceded by the class token if there is one."""
        tokens = self.patch_embed(x) + self.interpolate_pos_encoding(self.grid_size(x))
        if self.cls_token is not None:
            cls = self.cls_token + self.pos_embed[:, :1]
            tokens = torch.cat([cls.expand(x.shape[0], -1, -1), tokens], dim=1)  # len(x) is a constant to torch.export
        return tokens

    def _run(self, block: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        return run_block(block, tokens, self.checkpoint_activations)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] -> patch features [B, N, D], N = ⌊H/p⌋·⌊W/p⌋, row by row."""
        tokens = self.prepare_tokens(x)
        for block in self.blocks:
            tokens = self._run(block, tokens)
        return self.norm(tokens)[:, self.num_prefix_tokens:]

    def get_intermediate_layers(self, x: torch.Tensor, n: int | Sequence[int] = 1) -> list[torch.Tensor]:
        """Patch features [B, N, D] of the last n blocks, or of the blocks with the given indices; no final norm."""
        depth = len(self.blocks)
        wanted = range(max(depth - n, 0), depth) if isinstance(n, int) else n
        return [found.patches for found in self.intermediate_features(x, wanted, final_norm=False)]

    def features(self, x: torch.Tensor, layer: int = -1, keys: bool = False) -> Features:
        """Class token, patches and optionally keys of one block for images x [B, 3, H, W].

        Args:
            layer: 0 for the first block, -1 for the last.
            keys: also return the patches' keys in the block's attention, not normalised.

        Raises:
            IndexError: there is no such block.
        """
        return self.intermediate_features(x, [layer], keys)[0]

    def intermediate_features(self, x: torch.Tensor, layers: Sequence[int], keys: bool = False,
                              final_norm: bool = True) -> list[Features]:
        """features() of several blocks from one pass; the final norm, if any and asked for, is applied to each."""
        wanted = [range(len(self.blocks))[layer] for layer in layers]
        tokens, found, prefix = self.prepare_tokens(x), {}, self.num_prefix_tokens
        for i, block in enumerate(self.blocks[:max(wanted) + 1]):
            k = self._qkv(block, tokens)[1] if keys and i in wanted else None
            tokens = self._run(block, tokens)
            if i in wanted:
                normed = self.norm(tokens) if final_norm else tokens
                found[i] = Features(normed[:, 0] if prefix else None, normed[:, prefix:],
                                    None if k is None else k[:, prefix:])
        return [found[i] for i in wanted]

    def _qkv(self, block: Block, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values [B, N, D] of a block with these tokens as input."""
        return block.attn.qkv(block.norm1(tokens)).chunk(3, dim=-1)

    def queries_and_keys(self, x: torch.Tensor, layer: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys of a block's attention for all tokens, class token first, [B, heads, N, D / heads] each."""
        tokens = self.prepare_tokens(x)
        for block in self.blocks[:layer]:
            tokens = self._run(block, tokens)
        q, k, _ = self._qkv(self.blocks[layer], tokens)
        return tuple(part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (q, k))


def vit_pico(patch_size: int = 8, num_heads: int = 3, img_size: int = 32, **kwargs) -> VisionTransformer:
    """A network for trials that trains on a CPU in minutes: 4 blocks of width 96, 0.5 million parameters.

    It is in no paper, and its features suit small images only. Its position embedding has the size of small crops: most
    of one for 224 pixels would never be trained.
    """
    return VisionTransformer(img_size, patch_size, embed_dim=96, depth=4, num_heads=num_heads, **kwargs)


def vit_tiny(patch_size: int = 16, num_heads: int = 3, **kwargs) -> VisionTransformer:
    return VisionTransformer(patch_size=patch_size, embed_dim=192, depth=12, num_heads=num_heads, **kwargs)


def vit_small(patch_size: int = 16, num_heads: int = 6, **kwargs) -> VisionTransformer:
    return VisionTransformer(patch_size=patch_size, embed_dim=384, depth=12, num_heads=num_heads, **kwargs)


def vit_base(patch_size: int = 16, num_heads: int = 12, **kwargs) -> VisionTransformer:
    return VisionTransformer(patch_size=patch_size, embed_dim=768, depth=12, num_heads=num_heads, **kwargs)


ARCHS = {"vit_pico": vit_pico, "vit_tiny": vit_tiny, "vit_small": vit_small, "vit_base": vit_base,
         "deit_tiny": vit_tiny, "deit_small": vit_small, "deit_base": vit_base}


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose rows are unit vectors times a gain (Salimans & Kingma 2016).

    State-dict keys are those of DINO's checkpoints, weight_g [out, 1] and weight_v [out, in], which
    torch.nn.utils.parametrizations.weight_norm names differently.
    """

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1))
        self.weight_v = nn.Parameter(nn.Linear(in_dim, out_dim, bias=False).weight.detach())

    @property
    def weight(self) -> torch.Tensor:
        """The normalised weight, [out, in]."""
        return torch._weight_norm(self.weight_v, self.weight_g, 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


class Logits(NamedTuple):
    """Logits in factored form, z · prototypesᵀ; dense logits of 87,000 patches × 4,096 prototypes would take 1.4 GB.

    z [..., bottleneck] are unit vectors, prototypes [out, bottleneck] the rows of the last layer.
    """
    z: torch.Tensor
    prototypes: torch.Tensor

    def dense(self) -> torch.Tensor:
        """The logits themselves, [..., out]."""
        return F.linear(self.z, self.prototypes)


class CropLogits(NamedTuple):
    """A network's logits for V crops of B images, view by view.

    image: [V·B, out_dim]. patches: [V_r·B, N_r, out_dim_selfpatch] for each run of V_r crops of equal size; empty
    without a patch loss.
    """
    image: Logits
    patches: list[Logits]


class DINOHead(nn.Module):
    """Projection to prototypes: MLP, L2 normalisation, weight-normalised Linear (Caron et al. 2021, Sec. 3.1).

    Args:
        use_bn: BatchNorm after each hidden Linear.
        norm_last_layer: keep the prototypes at unit length by freezing their gain at 1.
        nlayers: Linear layers before the normalisation, including the one to the bottleneck.
    """

    def __init__(self, in_dim: int, out_dim: int, use_bn: bool = False, norm_last_layer: bool = True,
                 nlayers: int = 3, hidden_dim: int = 2048, bottleneck_dim: int = 256):
        super().__init__()
        if nlayers <= 1:
            self.mlp = nn.Linear(in_dim, bottleneck_dim)
        else:
            layers = []
            for dim in [in_dim] + [hidden_dim] * (nlayers - 2):
                layers.append(nn.Linear(dim, hidden_dim))
                if use_bn:
                    layers.append(nn.BatchNorm1d(hidden_dim))
                layers.append(nn.GELU())
            self.mlp = nn.Sequential(*layers, nn.Linear(hidden_dim, bottleneck_dim))
        self.apply(init_weights)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)
        self.last_layer.weight_g.requires_grad_(not norm_last_layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [..., in_dim] -> logits [..., out_dim]."""
        return self.factors(x).dense()

    def factors(self, x: torch.Tensor) -> Logits:
        """The same logits in factored form. BatchNorm, if any, normalises over all tokens of x."""
        z = self.mlp(x.flatten(0, -2))
        z = F.normalize(z.float(), dim=-1)  # in float32: the eps of 1e-12 would be 0 in half precision
        return Logits(z.unflatten(0, x.shape[:-1]), self.last_layer.weight)
