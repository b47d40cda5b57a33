"""Load the backbone of any supported checkpoint, strictly.

    model = load_backbone("checkpoint.pth")             # prints one line about what was loaded
    state, info = read_backbone("dino_vits16.pth")      # float32 tensors under this project's names, and metadata
    head = build_head(info)                             # the SelfPatchHead of a training run

Supported are training runs of SelfPatch and DINO, bare backbones, VISSL checkpoints, `state_dict` and `model`
wrappers, timm files, and mmdet and mmseg models (including those with mmseg's own names), as .pth or .safetensors.
"""
import argparse
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

from checkpoint_files import CheckpointError, read_checkpoint
from selfpatch_head import SelfPatchHead
from vision_transformer import ARCHS, VisionTransformer

ARCH_OF_WIDTH = {192: "vit_tiny", 384: "vit_small", 768: "vit_base"}
# heads of bare backbones, timm's norm after pooling, and the layers between backbone and FPN in a detector
NOT_BACKBONE = ("head.", "fc_norm.", "pre_logits.", "fpn1.", "fpn2.", "fpn3.", "fpn4.")
MMSEG_NAMES = (("blocks.", "layers."), ("patch_embed.proj.", "patch_embed.projection."),
               (".norm1.", ".ln1."), (".norm2.", ".ln2."),
               (".attn.qkv.", ".attn.attn.in_proj_"), (".attn.proj.", ".attn.attn.out_proj."),
               (".mlp.fc1.", ".ffn.layers.0.0."), (".mlp.fc2.", ".ffn.layers.1."))


@dataclass
class CheckpointInfo:
    """Metadata of a checkpoint. str() gives the one-line summary that jobs print.

    Attributes:
        path: the file.
        kind: its format, such as "SelfPatch run" or "mmdet detector".
        key: the selected network of a training run (teacher or student); None for other files.
        arch, patch_size, class_token, final_norm: arguments that rebuild the backbone.
        grid: patches per side that the position embedding is made for.
        num_tensors: number of tensors in the backbone.
        epoch: number of completed epochs, if the file has it.
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
                 f"{self.arch}, patch size {self.patch_size}", f"{self.num_tensors} tensors",
                 f"epoch {self.epoch}" if self.epoch is not None else "epoch unknown"]
        if self.other_tensors:
            modules = {name.removeprefix("backbone.").split(".")[0] for name in self.other_tensors}
            parts.append(f"ignored {' '.join(sorted(modules))}")
        return ", ".join(parts)


def to_mmseg_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a backbone's state dict to the keys of mmseg's VisionTransformer (layers.{i}.ln1, …)."""
    renamed = {}
    for name, tensor in state.items():
        for ours, theirs in MMSEG_NAMES:
            name = name.replace(ours, theirs)
        renamed[re.sub(r"^norm\.", "ln1.", name)] = tensor
    return renamed


def from_mmseg_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inverse of to_mmseg_names."""
    renamed = {}
    for name, tensor in state.items():
        name = re.sub(r"^ln1\.", "norm.", name)
        for ours, theirs in reversed(MMSEG_NAMES):
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    return renamed


def _select_network(content: dict, key: str, path: Path) -> tuple[dict, str | None]:
    """Unwrap the state dict of the requested network; the key is None if the file has a single network."""
    if isinstance(content.get(key), dict):
        return content[key], key
    if key != "teacher" or "student" in content:
        names = [str(k) for k, v in content.items() if not isinstance(v, torch.Tensor)] or ["a single network"]
        raise CheckpointError(f"{path} has no network {key!r}: it has {', '.join(names)}")
    if "classy_state_dict" in content:
        for step in ("classy_state_dict", "base_model", "model", "trunk"):
            content = content.get(step)
            if not isinstance(content, dict):
                raise CheckpointError(f"{path} is a VISSL checkpoint without {step} in classy_state_dict")
    for wrapper in ("state_dict", "model"):
        if isinstance(content.get(wrapper), dict):
            return _select_network(content[wrapper], key, path)
    return content, None


def _split(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Separate the backbone (float32, this project's names) from the other tensors, which stay unchanged."""
    prefix = "backbone." if any(name.startswith("backbone.") for name in tensors) else ""
    backbone, others = {}, {}
    for name, tensor in tensors.items():
        short_name = name.removeprefix(prefix)
        if prefix and name.startswith(("blocks.", "layers.", "patch_embed.", "pos_embed", "cls_token")):
            raise CheckpointError(f"there is a second backbone next to {prefix}*, with {name}")
        if not name.startswith(prefix) or short_name.startswith(NOT_BACKBONE):
            others[name] = tensor
        else:
            backbone[short_name] = tensor.float().contiguous() if tensor.is_floating_point() else tensor
    if any(name.startswith("layers.") for name in backbone):
        renamed = from_mmseg_names(backbone)
        if len(renamed) < len(backbone):
            raise CheckpointError("parts of the backbone occur twice, under mmseg's names and under this project's")
        backbone = renamed
    return backbone, others


def _kind(path: Path, content: dict, key: str | None, names: list[str]) -> str:
    """Classify a file by its wrapper and the keys of its network."""
    modules = {name.split(".")[0] for name in names}
    if "ca_head" in modules:
        kind = "SelfPatch run"
    elif key is not None:
        kind = "DINO run" if "head" in modules else "run"
    elif "classy_state_dict" in content:
        kind = "VISSL run"
    elif "backbone" in modules:
        kind = ("mmseg segmenter" if "decode_head" in modules else
                "mmdet detector" if modules & {"rpn_head", "roi_head", "bbox_head"} else "wrapped backbone")
    elif "layers" in modules:
        kind = "backbone with mmseg names"
    elif modules & {"head", "fc_norm", "pre_logits"}:
        kind = "timm backbone"
    else:
        kind = "DINO or timm backbone" if modules & {"cls_token", "norm"} else "SelfPatch backbone"
    return f"{kind} (safetensors)" if path.suffix == ".safetensors" else kind


def resolve_path(path: str | Path) -> Path:
    """The checkpoint file for a path: checkpoint.pth inside a run's folder, or the path itself."""
    if not str(path):
        raise CheckpointError("the path of the checkpoint is empty")
    path = Path(path)
    return path / "checkpoint.pth" if (path / "checkpoint.pth").is_file() else path


def read_backbone(path: str | Path, key: str = "teacher") -> tuple[dict[str, torch.Tensor], CheckpointInfo]:
    """Read the backbone of any supported checkpoint.

    Args:
        path: checkpoint file, or the folder of a run with a checkpoint.pth in it.
        key: network of a training run, teacher or student; other files have a single network.

    Returns:
        The backbone's state dict, in float32 under this project's names, and the checkpoint's metadata.

    Raises:
        CheckpointError: not a checkpoint, no such key, not a ViT, or missing, unexpected or mis-shaped tensors.
    """
    path = resolve_path(path)
    content = read_checkpoint(path)
    network, key = _select_network(content, key, path)
    network = {str(name): tensor for name, tensor in network.items() if isinstance(tensor, torch.Tensor)}
    if invalid := [name for name, t in network.items() if t.layout != torch.strided or t.device.type != "cpu"]:
        raise CheckpointError(f"{path} has tensors that are sparse or without data: {', '.join(invalid[:12])}")
    # DDP and torch.compile prefix the names of parameters
    tensors = {re.sub(r"^(module\.)+", "", name.replace("_orig_mod.", "")): t for name, t in network.items()}
    if len(tensors) < len(network):
        raise CheckpointError(f"{path} has the same keys with and without the prefix module. or _orig_mod.")
    try:
        state, others = _split(tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path} does not fit: {error}") from None
    arch, patch_size, grid = _infer_architecture(state, path)
    args, meta, epoch = (content.get(name) for name in ("args", "meta", "epoch"))
    if epoch is None and isinstance(meta, dict):
        epoch = meta.get("epoch")
    info = CheckpointInfo(
        path=path, kind=_kind(path, content, key, list(tensors)), key=key, arch=arch, patch_size=patch_size, grid=grid,
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
