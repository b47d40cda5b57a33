"""timm's plain Vision Transformers with the interface of this project's backbone, and what jobs ask of either.

    model = build_timm("vit_small_patch14_dinov2.lvd142m")      # untrained; loading.load_backbone adds a file's weights
    class_token, patches, keys = model.features(images, layer=-1, keys=True)
"""
import contextlib
import difflib
import io
from collections.abc import Callable, Sequence

import timm
import torch
from timm.layers import PatchEmbed, apply_rot_embed_cat
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import nn

from selfpatch.data.normalisation import IMAGENET_MEAN, IMAGENET_STD
from selfpatch.errors import ConfigError
from selfpatch.method.vision_transformer import Features, VisionTransformer

PREFIX = "timm:"


def project_queries_keys(attn: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Project the input x [B, N, D] of a timm attention to queries and keys [B, heads, N, d].

    Norms of q and k are applied, if any; a rotary position embedding is not.
    """
    if getattr(attn, "qkv", None) is not None:
        bias = attn.qkv.bias
        if getattr(attn, "q_bias", None) is not None:  # EVA learns none for k
            bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        qkv = nn.functional.linear(x, attn.qkv.weight, bias).unflatten(-1, (3, attn.num_heads, -1))
        q, k = qkv.permute(2, 0, 3, 1, 4)[:2]
    else:
        q = attn.q_proj(x).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
        k = attn.k_proj(x).unflatten(-1, (-1, q.shape[-1])).transpose(1, 2)
    if hasattr(attn, "q_norm"):  # not in every attention of older timm
        q, k = attn.q_norm(q), attn.k_norm(k)
    return q, k


def rotate(tokens: torch.Tensor, rope: torch.Tensor | None, attn: nn.Module) -> torch.Tensor:
    """Apply a rotary position embedding to queries or keys [B, heads, N, d], except to prefix tokens."""
    if rope is None:
        return tokens
    half = {"half": True} if getattr(attn, "rotate_half", False) else {}  # older timm knows one layout only
    prefix, patches = tokens.split([attn.num_prefix_tokens, tokens.shape[2] - attn.num_prefix_tokens], dim=2)
    return torch.cat([prefix, apply_rot_embed_cat(patches, rope, **half).to(prefix.dtype)], dim=2)


class TimmBackbone(nn.Module):
    """A timm Vision Transformer with the interface of vision_transformer.VisionTransformer.

    Images may have any size: pixels beyond whole patches, at the right and bottom, are ignored, and positions are
    timm's own, interpolated or rotary. Patch features exclude class token and registers.

    Args:
        network: timm's VisionTransformer or Eva, built with dynamic_img_size.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.embed_dim = self.num_features = network.embed_dim
        self.patch_size = network.patch_embed.patch_size[0]
        self.num_heads = network.blocks[0].attn.num_heads
        self.num_prefix_tokens = network.num_prefix_tokens
        self.has_class_token = network.cls_token is not None

    @property
    def blocks(self) -> nn.Module:
        """The network's transformer blocks, in order."""
        return self.network.blocks

    def grid_size(self, x: torch.Tensor) -> tuple[int, int]:
        """Rows and columns of patches in images x [B, 3, H, W]."""
        return x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] -> patch features [B, N, D] of timm's forward_features, row by row."""
        return self.features(x).patches

    def get_intermediate_layers(self, x: torch.Tensor, n: int | Sequence[int] = 1) -> list[torch.Tensor]:
        """Patch features [B, N, D] of the last n blocks or of given block indices, without final norm."""
        depth = len(self.blocks)
        layers = range(max(depth - n, 0), depth) if isinstance(n, int) else n
        return [tokens[:, self.num_prefix_tokens:] for tokens in self._run(x, layers, norm=False)]

    def features(self, x: torch.Tensor, layer: int = -1, keys: bool = False) -> Features:
        """Class token, patches and optionally keys of one block; see VisionTransformer.features."""
        return self.intermediate_features(x, [layer], keys)[0]

    def intermediate_features(self, x: torch.Tensor, layers: Sequence[int], keys: bool = False) -> list[Features]:
        """features() of several blocks in one pass; keys as in project_queries_keys."""
        wanted = [range(len(self.blocks))[layer] for layer in layers]
        found, start = {}, self.num_prefix_tokens

        def keep(i: int) -> Callable:
            def hook(attn: nn.Module, inputs: tuple, kwargs: dict) -> None:
                k = project_queries_keys(attn, inputs[0])[1]
                found[i] = k[:, :, start:].transpose(1, 2).flatten(2)
            return hook

        with self._watch({i: keep(i) for i in wanted} if keys else {}):
            outputs = self._run(x, wanted, norm=True)
        return [Features(tokens[:, 0] if self.has_class_token else None, tokens[:, start:], found.get(i))
                for i, tokens in zip(wanted, outputs, strict=True)]

    def queries_and_keys(self, x: torch.Tensor, layer: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys [B, heads, N, d] of all tokens, prefix first, after a rotary position embedding if any."""
        found = []

        def keep(attn: nn.Module, inputs: tuple, kwargs: dict) -> None:
            found.extend(rotate(part, kwargs.get("rope"), attn) for part in project_queries_keys(attn, inputs[0]))

        with self._watch({layer: keep}):
            self._run(x, [layer], norm=False)
        q, k = found
        return q, k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # fewer heads in grouped-query attention

    @contextlib.contextmanager
    def _watch(self, hooks: dict[int, Callable]):
        """Call hooks[i] with the inputs of block i's attention; only they contain the rotary embedding."""
        handles = [self.blocks[i].attn.register_forward_pre_hook(hook, with_kwargs=True) for i, hook in hooks.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _run(self, x: torch.Tensor, layers: Sequence[int], norm: bool) -> list[torch.Tensor]:
        """All tokens [B, prefix + N, D] after the given blocks, with the final norm on request."""
        rows, columns = self.grid_size(x)
        x = x[..., :rows * self.patch_size, :columns * self.patch_size]
        numbers = [range(len(self.blocks))[layer] for layer in layers]
        order = sorted(set(numbers))
        with_prefix = self.num_prefix_tokens > 0
        outputs = self.network.forward_intermediates(x, order, return_prefix_tokens=with_prefix, norm=norm,
                                                     stop_early=True, output_fmt="NLC", intermediates_only=True)
        if with_prefix:
            outputs = [torch.cat([prefix, patches], dim=1) for patches, prefix in outputs]
        return [outputs[order.index(number)] for number in numbers]


Backbone = VisionTransformer | TimmBackbone


def build_timm(name: str, **kwargs) -> TimmBackbone:
    """Build an untrained Vision Transformer of timm by its name (without "timm:"), in eval mode.

    Args:
        kwargs: further arguments of timm's network, such as depth.

    Raises:
        ConfigError: timm does not know the name, or the network is not a plain Vision Transformer.
    """
    base = name.split(".")[0]
    if not timm.is_model(base):
        near = difflib.get_close_matches(base, timm.list_models("*vit*") + timm.list_models("*eva*"), 3)
        raise ConfigError(f"--arch {PREFIX}{name}: timm {timm.__version__} has no such network"
                          + (f"; near it are {', '.join(near)}" if near else ""))
    plain = ConfigError(f"--arch {PREFIX}{name} is not a plain Vision Transformer (timm's VisionTransformer or Eva, "
                        "with patches cut straight from the image): choose another")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            network = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True, **kwargs)
    except TypeError:  # networks of one image size
        raise plain from None
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--arch {PREFIX}{name}: {str(error).splitlines()[0]}") from None
    if not (isinstance(network, TimmViT | Eva) and isinstance(network.patch_embed, PatchEmbed)
            and hasattr(network.blocks[0], "attn")):
        raise plain
    network.fc_norm, network.attn_pool = nn.Identity(), None
    return TimmBackbone(network).eval()


def check_layer(model: Backbone, layer: int) -> None:
    """Raise ConfigError if the network has no block of this index (0 is the first, -1 the last)."""
    depth = len(model.blocks)
    if not -depth <= layer < depth:
        raise ConfigError(f"--layer {layer}: the network has {depth} blocks, so give {-depth} to {depth - 1}; -1 is "
                          "the last")


def image_statistics(model: Backbone) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the RGB mean and standard deviation, in 0 … 1, that normalise the network's images."""
    config = getattr(model.network, "pretrained_cfg", None) or {} if isinstance(model, TimmBackbone) else {}
    return tuple(config.get("mean", IMAGENET_MEAN)), tuple(config.get("std", IMAGENET_STD))
