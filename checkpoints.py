"""Load the backbone of any supported checkpoint, strictly.

    model = load_backbone("checkpoint.pth")             # prints one line about what was loaded
    state, info = read_backbone("dino_vits16.pth")      # float32 tensors under this project's names, and metadata
    head = build_head(info)                             # the SelfPatchHead of a training run

Supported are training runs of SelfPatch, DINO and other methods, bare backbones, VISSL checkpoints, wrappers, timm
and Hugging Face files, and mmdet and mmseg models, as .pth or .safetensors; docs/CHECKPOINTS.md lists them.
"""
import argparse
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

import checkpoint_layouts as layouts
from checkpoint_files import CheckpointError, printable, read_checkpoint
from checkpoint_layouts import from_mmseg_names as from_mmseg_names
from checkpoint_layouts import to_mmseg_names as to_mmseg_names
from selfpatch_head import SelfPatchHead
from vision_transformer import ARCHS, VisionTransformer

ARCH_OF_WIDTH = {192: "vit_tiny", 384: "vit_small", 768: "vit_base"}


@dataclass
class CheckpointInfo:
    """Metadata of a checkpoint. str() gives the one-line summary that jobs print.

    Attributes:
        path: the file.
        kind: its format, such as "SelfPatch run" or "mmdet detector".
        key: the selected network of a training run (teacher or student); None for other files.
        prefix: of the backbone's names in the file, without module. and _orig_mod.
        arch, patch_size, class_token, final_norm: arguments that rebuild the backbone.
        grid: patches per side that the position embedding is made for.
        num_tensors: number of tensors in the backbone.
        epoch: number of completed epochs, if the file has it.
        num_heads: attention heads, where the kind of file determines another number than the arch does.
        args: options of the training run, empty if the file has none.
        other_tensors: heads and everything else that is not part of the backbone, under the file's own names.
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

    @property
    def embed_dim(self) -> int:
        return next(width for width, arch in ARCH_OF_WIDTH.items() if arch == self.arch)

    @property
    def k_num(self) -> int:
        """Number of positive patches that the run was trained with, 4 if unknown."""
        k_num = self.args.get("k_num") or 4
        if not isinstance(k_num, int) or not 1 <= k_num <= 8:
            raise CheckpointError(f"{self.path} has k_num {k_num!r}, which is not an integer from 1 to 8: give --k_num")
        return k_num

    def __str__(self) -> str:
        parts = [f"{self.path}: {self.kind}", f"key {self.key}" if self.key else "no key",
                 *([f"prefix {self.prefix}"] if self.prefix not in ("", "backbone.") else []),
                 f"{self.arch}, patch size {self.patch_size}", f"{self.num_tensors} tensors",
                 f"epoch {self.epoch}" if self.epoch is not None else "epoch unknown"]
        if self.other_tensors:
            modules = {layouts.module_of(name.removeprefix(self.prefix or "backbone.")) for name in self.other_tensors}
            parts.append(f"ignored {' '.join(sorted(modules))}")
        return printable(", ".join(parts))


def _select_network(content: dict, key: str, path: Path) -> tuple[dict, str | None]:
    """Unwrap the dictionary of the requested network; the key is None if the file has no dictionary of that name."""
    if isinstance(content.get(key), dict):
        return content[key], key
    if "student" in content:
        raise _no_network(content, key, path)
    if "classy_state_dict" in content:
        for step in layouts.VISSL_STEPS:
            content = content.get(step)
            if not isinstance(content, dict):
                raise CheckpointError(f"{path} is a VISSL checkpoint without {step} in classy_state_dict")
    for wrapper in layouts.WRAPPERS:
        if isinstance(content.get(wrapper), dict):
            return _select_network(content[wrapper], key, path)
    return content, None


def _no_network(content: dict, key: str, path: Path) -> CheckpointError:
    names = [str(k) for k, v in content.items() if not isinstance(v, torch.Tensor)] or ["a single network"]
    return CheckpointError(f"{path} has no network {key!r}: it has {', '.join(names)}")


def _read_tensors(network: dict, path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a network, by their names without the prefixes of DDP and torch.compile."""
    tensors = layouts.collect_tensors(network)
    if not layouts.find_prefixes(tensors):
        nested = layouts.collect_tensors(network, nested=True)
        tensors = nested if layouts.find_prefixes(nested) else tensors
    if invalid := [name for name, t in tensors.items() if t.layout != torch.strided or t.device.type != "cpu"]:
        raise CheckpointError(f"{path} has tensors that are sparse or without data: {', '.join(invalid[:12])}")
    short = {re.sub(r"^(module\.)+", "", name.replace("_orig_mod.", "")): t for name, t in tensors.items()}
    if len(short) < len(tensors):
        raise CheckpointError(f"{path} has the same keys with and without the prefix module. or _orig_mod.")
    return short


def _find_network(tensors: dict[str, torch.Tensor], content: dict, key: str, selected: bool,
                  path: Path) -> tuple[str, str | None, str | None]:
    """Prefix of the requested network, its key where the file has several, and its kind where the prefix tells it."""
    prefixes = layouts.find_prefixes(tensors)
    prefix = layouts.choose_prefix(prefixes, "teacher" if selected else key)
    if prefix is None:
        if not selected and any(prefix not in ("", "backbone.") for prefix in prefixes):
            raise CheckpointError(f"{path} has no network {key!r}: it has {', '.join(prefixes)}")
        if key != "teacher" and not selected:
            raise _no_network(content, key, path)
        prefix = "backbone." if any(name.startswith("backbone.") for name in tensors) else ""
    network, kind = layouts.network_of(prefix, prefixes)
    if selected or key != "teacher":
        network = key
    return prefix, network, None if kind == "run" else kind


def _kind(content: dict, key: str | None, prefix: str, names: list[str]) -> str:
    """Classify a file by its wrapper and the keys of its network."""
    modules = {name.split(".")[0] for name in names}
    if "ca_head" in modules:
        return "SelfPatch run"
    if key is not None:
        return "DINO run" if "head" in modules else "run"
    if "classy_state_dict" in content:
        return "VISSL run"
    if any(name.startswith(f"{prefix}embeddings.patch_embeddings.") for name in names):
        return "Hugging Face ViT"
    if f"{prefix}decoder_pos_embed" in names:
        return "MAE"
    if "backbone" in modules:
        return ("mmseg segmenter" if "decode_head" in modules else
                "mmdet detector" if modules & {"rpn_head", "roi_head", "bbox_head"} else "wrapped backbone")
    if prefix:
        return "wrapped backbone"
    if "layers" in modules:
        return "backbone with mmseg names"
    if modules & {"head", "fc_norm", "pre_logits"}:
        return "timm backbone"
    return "DINO or timm backbone" if modules & {"cls_token", "norm"} else "SelfPatch backbone"


def resolve_path(path: str | Path) -> Path:
    """The checkpoint file for a path: checkpoint.pth inside a run's folder, or the path itself."""
    if not str(path):
        raise CheckpointError("the path of the checkpoint is empty")
    path = Path(path)
    return path / "checkpoint.pth" if os.path.isfile(path / "checkpoint.pth") else path


def read_backbone(path: str | Path, key: str = "teacher") -> tuple[dict[str, torch.Tensor], CheckpointInfo]:
    """Read the backbone of any supported checkpoint.

    Args:
        path: checkpoint file, or the folder of a run with a checkpoint.pth in it.
        key: network of a training run, teacher or student, or a word in its prefix; other files have a single network.

    Returns:
        The backbone's state dict, in float32 under this project's names, and the checkpoint's metadata.

    Raises:
        CheckpointError: not a checkpoint, no such key, not a ViT, a ViT that this project's backbone cannot hold, or
            missing, unexpected or mis-shaped tensors.
    """
    path = resolve_path(path)
    content = read_checkpoint(path)
    network, selected = _select_network(content, key, path)
    try:
        tensors = _read_tensors(network, path)
        prefix, key, kind = _find_network(tensors, content, key, selected is not None, path)
        state, others = layouts.split_backbone(tensors, prefix)
    except layouts.LayoutError as error:
        raise CheckpointError(f"{path} does not fit: {error}") from None
    if parts := layouts.unsupported_parts(state):
        raise CheckpointError(f"{path} holds a Vision Transformer with {', '.join(parts)}, which this project's "
                              "backbone does not have: load it with timm")
    arch, patch_size, grid = _infer_architecture(state, path)
    kind = kind or _kind(content, key, prefix, list(tensors))
    args, meta, epoch = (content.get(name) for name in ("args", "meta", "epoch"))
    if epoch is None and isinstance(meta, dict):
        epoch = meta.get("epoch")
    info = CheckpointInfo(
        path=path, kind=f"{kind} (safetensors)" if path.suffix == ".safetensors" else kind, key=key, prefix=prefix,
        arch=arch, patch_size=patch_size, grid=grid,
        num_heads=layouts.SMALL_HEADS.get(kind) if arch == "vit_small" else None,
        class_token="cls_token" in state, final_norm="norm.weight" in state, num_tensors=len(state),
        epoch=epoch if isinstance(epoch, int) else None, other_tensors=others,
        args=vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {})
    check_state_dict(state, _meta_backbone(info).state_dict(),
                     f"{path} does not fit {arch} with patch size {patch_size}")
    return state, info


def _infer_architecture(state: dict[str, torch.Tensor], path: Path) -> tuple[str, int, int]:
    """Arch, patch size and patches per side, from the shapes of a backbone's tensors."""
    if any(name.startswith(("layer1.", "_feature_blocks.layer1.")) for name in state):
        raise CheckpointError(f"{path} holds a ResNet, but SelfPatch's backbone is a Vision Transformer")
    if missing := [name for name in ("patch_embed.proj.weight", "pos_embed") if name not in state]:
        raise CheckpointError(f"{path} holds no Vision Transformer: missing {', '.join(missing)}; "
                              f"{_summarise('it has', list(state))}")
    patch, pos = state["patch_embed.proj.weight"].shape, state["pos_embed"].shape
    if len(patch) != 4 or patch[2] != patch[3] or not patch[2] or patch[0] not in ARCH_OF_WIDTH:
        raise CheckpointError(f"{path} does not fit: patch_embed.proj.weight is {list(patch)}, expected "
                              f"[D, 3, p, p] with D one of {', '.join(map(str, ARCH_OF_WIDTH))}")
    num_patches = pos[1] - ("cls_token" in state) if len(pos) == 3 else 0
    side = round(num_patches ** 0.5)
    if side * side != num_patches or not side:
        token = "with" if "cls_token" in state else "without"
        raise CheckpointError(f"{path} does not fit: pos_embed is {list(pos)}, {token} class token: not a square grid")
    return ARCH_OF_WIDTH[patch[0]], patch[2], side


def _summarise(what: str, names: list[str]) -> str:
    return f"{what} ({len(names)}): {', '.join(names[:12])}{', …' if len(names) > 12 else ''}"


def check_state_dict(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], message: str) -> None:
    """Check keys, shapes, types and values of a state dict against the one that a model expects.

    Raises:
        CheckpointError: message, then everything that is wrong.
    """
    common = [name for name in expected if name in state]
    errors = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "wrong shape": [f"{name} is {list(state[name].shape)}, expected {list(expected[name].shape)}"
                        for name in common if state[name].shape != expected[name].shape],
        "not floating point": [name for name in common
                               if expected[name].is_floating_point() and not state[name].is_floating_point()],
        "NaN or infinite values": [name for name in common if not state[name].sum().isfinite()]}
    if any(errors.values()):
        raise CheckpointError(
            f"{message}: {'; '.join(_summarise(what, names) for what, names in errors.items() if names)}")


def _meta_backbone(info: CheckpointInfo, **kwargs) -> VisionTransformer:
    if info.num_heads:
        kwargs.setdefault("num_heads", info.num_heads)
    with torch.device("meta"):  # no memory and no initialisation, since every tensor comes from the file
        return ARCHS[info.arch](info.patch_size, img_size=info.grid * info.patch_size, class_token=info.class_token,
                                final_norm=info.final_norm, **kwargs)


def build_backbone(state: dict[str, torch.Tensor], info: CheckpointInfo, arch: str | None = None,
                   patch_size: int | None = None, **kwargs) -> VisionTransformer:
    """Build the network for the result of read_backbone, with its weights, in eval mode.

    Args:
        state, info: as read_backbone returns them; the network shares the tensors of state.
        arch, patch_size: what the user asked for; None accepts the file's.
        kwargs: further arguments of VisionTransformer: drop_path_rate; num_heads, which files do not record (the
            published detectors have 8 in vit_small).

    Raises:
        CheckpointError: arch or patch_size contradicts the file.
    """
    if arch is not None and ARCHS[arch] is not ARCHS[info.arch]:
        raise CheckpointError(f"--arch {arch} contradicts {info.path}, which holds {info.arch}: omit --arch")
    if patch_size is not None and patch_size != info.patch_size:
        raise CheckpointError(f"--patch_size {patch_size} contradicts {info.path}, whose patch size is "
                              f"{info.patch_size}: omit --patch_size")
    model = _meta_backbone(info, **kwargs)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def build_head(info: CheckpointInfo, k_num: int | None = None) -> SelfPatchHead:
    """Build the SelfPatchHead of a training run, with its weights, in eval mode.

    Args:
        info: as read_backbone returns it.
        k_num: number of positive patches; None takes the run's own, 4 if unknown.

    Raises:
        CheckpointError: the file has no such head, or its tensors do not fit.
    """
    state = {name.removeprefix("ca_head."): tensor.float() for name, tensor in info.other_tensors.items()
             if name.startswith("ca_head.")}
    if not state:
        raise CheckpointError(f"{info.path} has no ca_head (it is a {info.kind}): give a SelfPatch training checkpoint")
    backbone = _meta_backbone(info)
    head = SelfPatchHead(backbone.embed_dim, backbone.num_heads, k_num or info.k_num)
    check_state_dict(state, head.state_dict(), f"the ca_head in {info.path} does not fit {info.arch}")
    head.load_state_dict(state)
    return head.eval()


def load_with_info(path: str | Path, key: str = "teacher", arch: str | None = None, patch_size: int | None = None,
                   random_weights: bool = False, **kwargs) -> tuple[VisionTransformer, CheckpointInfo | None]:
    """Load a backbone for a job and print one line about it; see read_backbone and build_backbone.

    Args:
        path: empty only together with random_weights, which builds an untrained network and returns no metadata.

    Raises:
        CheckpointError: as read_backbone and build_backbone, or neither or both of path and random_weights are given.
    """
    if path and random_weights:
        raise CheckpointError(f"--random_weights contradicts --pretrained_weights {path}: give one of the two")
    if path:
        state, info = read_backbone(path, key)
        model = build_backbone(state, info, arch, patch_size, **kwargs)
        print(f"loaded {info}")
        if info.kind.startswith("mmdet") and "num_heads" not in kwargs:
            print(f"note: {model.num_heads} attention heads, as in pretraining; files do not record the number, and "
                  "the published detectors have 8: load_backbone(path, num_heads=8)")
        elif info.num_heads and "num_heads" not in kwargs:
            print(f"note: {model.num_heads} attention heads, as published for this kind of file, which does not record "
                  "the number")
        return model, info
    if not random_weights:
        raise CheckpointError("--pretrained_weights is empty, so the features would be those of a random network: "
                              "give a checkpoint, or --random_weights to run without one")
    arch, patch_size = arch or "vit_small", 16 if patch_size is None else patch_size
    if not 1 <= patch_size <= 224:
        raise CheckpointError(f"--patch_size {patch_size} is not between 1 and 224")
    print(f"random weights: {arch}, patch size {patch_size}, untrained")
    return ARCHS[arch](patch_size, **kwargs).eval(), None


def load_backbone(path: str | Path, key: str = "teacher", arch: str | None = None, patch_size: int | None = None,
                  random_weights: bool = False, **kwargs) -> VisionTransformer:
    """The network of load_with_info, without the metadata."""
    return load_with_info(path, key, arch, patch_size, random_weights, **kwargs)[0]
