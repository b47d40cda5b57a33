"""Metadata of a checkpoint: its kind, architecture and options, and the line that jobs print about it."""
import argparse
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path

import torch

from selfpatch.checkpoints import layouts
from selfpatch.checkpoints.files import CheckpointError
from selfpatch.checkpoints.networks import Network
from selfpatch.checkpoints.pickled_classes import StandIn
from selfpatch.errors import printable

ARCH_OF_WIDTH = {96: "vit_pico", 192: "vit_tiny", 384: "vit_small", 768: "vit_base"}
LARGEST_GRID = 512  # patches per side, as in images of 8192 pixels with patches of 16
OWN_WORDS = {"teacher", "student"}  # dictionaries of a run; the line names them as its key


@dataclass
class CheckpointInfo:
    """Metadata of a checkpoint. str() gives the one-line summary that jobs print.

    Attributes:
        path: the file.
        kind: its format, such as "SelfPatch run" or "mmdet detector".
        key: network of several (teacher, student, or the word it was asked for by); None if the file has one.
        prefix: of the backbone's names in the file, with the dictionaries that lead there, without module., _orig_mod.
            and the like.
        arch, patch_size, class_token, final_norm: arguments that rebuild the backbone.
        grid: patches per side of the position embedding.
        num_tensors: number of tensors in the backbone.
        epoch: as recorded; this project counts completed epochs, others may count from 0.
        num_heads: attention heads if the file records them or its kind differs from the arch, otherwise None.
        heads_from: source of num_heads, for the line: "recorded", "as published", …
        args: options of the training run; empty if the file has none.
        other_tensors: everything beside the backbone, such as heads, under the file's own names.
        ignored: modules of other_tensors that belong to no other network.
        also: prefixes of the other networks in the file.
    """
    path: Path
    kind: str
    key: str | None
    arch: str
    patch_size: int
    grid: int
    class_token: bool
    final_norm: bool
    num_tensors: int
    epoch: int | None
    args: dict = field(repr=False)
    other_tensors: dict[str, torch.Tensor] = field(repr=False)
    prefix: str = ""
    num_heads: int | None = None
    heads_from: str = ""
    ignored: tuple[str, ...] = ()
    also: tuple[str, ...] = ()

    @property
    def embed_dim(self) -> int:
        return next(width for width, arch in ARCH_OF_WIDTH.items() if arch == self.arch)

    @property
    def k_num(self) -> int:
        """Number of positive patches in training, 4 if unknown."""
        k_num = self.args.get("k_num") or 4
        if not isinstance(k_num, int) or not 1 <= k_num <= 8:
            raise CheckpointError(f"{self.path} has k_num {k_num!r}, which is not an integer from 1 to 8")
        return k_num

    @property
    def has_selfpatch_head(self) -> bool:
        """Whether the file has a SelfPatch head (ca_head), see loading.build_head."""
        return any(name.startswith("ca_head.") for name in self.other_tensors)

    def __str__(self) -> str:
        parts = [f"{self.path}: {self.kind}", f"key {self.key}" if self.key else "no key",
                 *([f"prefix {self.prefix}"] if self.prefix not in ("", "backbone.") else []),
                 f"{self.arch}, patch size {self.patch_size}", *self._heads(), f"{self.num_tensors} tensors",
                 f"epoch {self.epoch}" if self.epoch is not None else "epoch unknown"]
        if self.ignored:
            parts.append(f"ignored {' '.join(self.ignored)}")
        if self.also:
            parts.append(f"also in the file: {' '.join(name or 'one without prefix' for name in self.also)}")
        return printable(", ".join(parts))

    def _heads(self) -> list[str]:
        if self.num_heads:
            return [f"{self.num_heads} attention heads ({self.heads_from})"]
        # only ViT-S is published with different numbers, which its tensors do not tell
        known = self.arch != "vit_small" or self.kind.startswith(("SelfPatch", "DINO run"))
        return [] if known else ["6 attention heads (assumed)"]

    def with_heads(self, num_heads: int, source: str) -> "CheckpointInfo":
        """Copy with another number of attention heads.

        Raises:
            CheckpointError: the number does not divide the width.
        """
        if not isinstance(num_heads, int) or num_heads < 1 or self.embed_dim % num_heads:
            raise CheckpointError(f"{self.path}: {num_heads!r} attention heads ({source}) do not divide the width "
                                  f"{self.embed_dim} of {self.arch}")
        return replace(self, num_heads=num_heads, heads_from=source)


def _recorded_k_num(meta: dict) -> dict[str, int]:
    """Read the number of positives that convert_checkpoint.py records in a release, as an option of the run."""
    k_num = str(meta.get("k_num", ""))
    return {"k_num": int(k_num)} if k_num.isdecimal() and len(k_num) < 5 else {}


def describe(content: dict, metadata: dict, network: Network, shapes: dict[str, torch.Tensor],
             path: Path) -> CheckpointInfo:
    """Derive the metadata of a network from the shapes of its tensors and the file's other entries.

    Args:
        content: of the file.
        metadata: of its header, for .safetensors.

    Raises:
        CheckpointError: the shapes fit no supported architecture.
    """
    arch, patch_size, grid = _infer_architecture(shapes, path)
    kind = _kind(network)
    args, meta, epoch = (content.get(name) for name in ("args", "meta", "epoch"))
    meta = metadata | (meta if isinstance(meta, dict) else {})
    epoch = meta.get("epoch") if epoch is None else epoch
    words = [word for word in network.path if word not in OWN_WORDS.union(layouts.WRAPPERS)]
    info = CheckpointInfo(
        path=path, kind=f"{kind} (safetensors)" if path.suffix == ".safetensors" else kind, key=None,
        prefix="".join(f"{word}." for word in words) + network.prefix, arch=arch, patch_size=patch_size, grid=grid,
        class_token="cls_token" in shapes, final_norm="norm.weight" in shapes, num_tensors=len(shapes),
        epoch=int(epoch) if isinstance(epoch, Integral) else None, other_tensors={},
        args=_recorded_k_num(meta) | _options(args))
    if (num_heads := meta.get("num_heads")) is not None:
        number = str(num_heads)
        return info.with_heads(int(number) if number.isdecimal() and len(number) < 5 else num_heads, "recorded")
    if arch == "vit_small" and kind in layouts.SMALL_HEADS:
        return info.with_heads(layouts.SMALL_HEADS[kind], "as published")
    return info


def _options(args: object) -> dict:
    """Options of a run as a dictionary: from argparse's Namespace, a dictionary, or one of an unknown class."""
    if isinstance(args, StandIn):
        return args.entries
    return vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}


def _kind(network: Network) -> str:
    """Classify a file by the names in and beside its network."""
    names, prefix = network.tensors, network.prefix
    modules = {name.split(".")[0] for name in names}
    if "ca_head" in modules:
        return "SelfPatch run"
    if network.kind == "run":
        return "DINO run" if "head" in modules and prefix == "backbone." else "run"
    if network.kind is not None:
        return network.kind
    if layouts.VISSL_STEPS[0] in network.path:
        return "VISSL run"
    if any(name.startswith(f"{prefix}embeddings.patch_embeddings.") for name in names):
        return "Hugging Face ViT"
    if f"{prefix}decoder_pos_embed" in names:
        return "MAE"
    if "backbone" in modules:
        return ("mmseg segmenter" if "decode_head" in modules else
                "mmdet detector" if modules & {"rpn_head", "roi_head", "bbox_head"} else "wrapped backbone")
    if prefix or set(network.path) - set(layouts.WRAPPERS) and network.role is None:
        return "wrapped backbone"
    if "layers" in modules:
        return "backbone with mmseg names"
    if modules & {"head", "fc_norm", "pre_logits"}:
        return "timm backbone"
    return "DINO or timm backbone" if modules & {"cls_token", "norm"} else "SelfPatch backbone"


def _infer_architecture(state: dict[str, torch.Tensor], path: Path) -> tuple[str, int, int]:
    """Infer arch, patch size and patches per side from the shapes of a backbone's tensors."""
    if missing := [name for name in ("patch_embed.proj.weight", "pos_embed") if name not in state]:
        raise CheckpointError(f"{path} holds no Vision Transformer: missing {', '.join(missing)}; "
                              f"{summarise('it has', list(state))}")
    patch, pos = state["patch_embed.proj.weight"].shape, state["pos_embed"].shape
    if len(patch) != 4 or patch[2] != patch[3] or not 1 <= patch[2] <= 224 or patch[0] not in ARCH_OF_WIDTH:
        raise CheckpointError(f"{path} does not fit: patch_embed.proj.weight is {list(patch)}, expected "
                              f"[D, 3, p, p] with D one of {', '.join(map(str, ARCH_OF_WIDTH))}, p at most 224")
    if len(pos) == 4:
        raise CheckpointError(f"{path} holds a Vision Transformer with a position embedding of rows and columns, "
                              f"{list(pos)}, as in SAM and ViTDet, whose attention is within windows: load it with "
                              "timm")
    num_patches = pos[1] - ("cls_token" in state) if len(pos) == 3 else 0
    side = round(num_patches ** 0.5)
    if side * side != num_patches or not 1 <= side <= LARGEST_GRID:
        token = "with" if "cls_token" in state else "without"
        raise CheckpointError(f"{path} does not fit: pos_embed is {list(pos)}, {token} class token: not a square grid "
                              f"of up to {LARGEST_GRID} patches a side")
    return ARCH_OF_WIDTH[patch[0]], patch[2], side


def summarise(what: str, names: list[str]) -> str:
    return f"{what} ({len(names)}): {', '.join(names[:12])}{', …' if len(names) > 12 else ''}"
