"""Checkpoints: every kind is recognised, and its backbone read strictly.

    model = load_backbone("checkpoint.pth")             # prints one line that says what was loaded
    state, info = read_backbone("dino_vits16.pth")      # float32 tensors under our names, and what they are
    head = build_head(info)                             # the SelfPatchHead of a training run

Read are: training runs of SelfPatch and of DINO, bare backbones, VISSL's nesting, state_dict and model wrappers,
timm's files, detectors and segmenters of mmdet and mmseg (in mmseg's own names too), as .pth or .safetensors.
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
# beside a bare backbone: a classifier or projection head, timm's norm after pooling, a detector's pyramid
NOT_BACKBONE = ("head.", "fc_norm.", "pre_logits.", "fpn1.", "fpn2.", "fpn3.", "fpn4.")
MMSEG_NAMES = (("blocks.", "layers."), ("patch_embed.proj.", "patch_embed.projection."),
               (".norm1.", ".ln1."), (".norm2.", ".ln2."),
               (".attn.qkv.", ".attn.attn.in_proj_"), (".attn.proj.", ".attn.attn.out_proj."),
               (".mlp.fc1.", ".ffn.layers.0.0."), (".mlp.fc2.", ".ffn.layers.1."))


@dataclass
class CheckpointInfo:
    """What a checkpoint holds; as a string, the one line that jobs print."""
    path: Path
    kind: str
    key: str | None  # which network of a run
    arch: str
    patch_size: int
    grid: int  # patches a side that the position embedding is laid out for
    class_token: bool
    final_norm: bool
    tensors: int
    epoch: int | None
    args: dict = field(repr=False)  # the run's options, where the file has them
    beside: dict[str, torch.Tensor] = field(repr=False)  # heads and whatever else is not the backbone, as it stands

    @property
    def embed_dim(self) -> int:
        return next(width for width, arch in ARCH_OF_WIDTH.items() if arch == self.arch)

    @property
    def k_num(self) -> int:
        k_num = self.args.get("k_num") or 4
        if not isinstance(k_num, int) or not 1 <= k_num <= 8:
            raise CheckpointError(f"{self.path} says k_num {k_num!r}, which is no number from 1 to 8: give --k_num")
        return k_num

    def __str__(self) -> str:
        parts = [f"{self.path}: {self.kind}", f"key {self.key}" if self.key else "no key",
                 f"{self.arch}, patch size {self.patch_size}", f"{self.tensors} tensors",
                 f"epoch {self.epoch}" if self.epoch is not None else "epoch not given"]
        if self.beside:
            tops = {name.removeprefix("backbone.").split(".")[0] for name in self.beside}
            parts.append(f"left out {' '.join(sorted(tops))}")
        return ", ".join(parts)


def to_mmseg_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A backbone's state dict under the names of mmseg's VisionTransformer (layers.{i}.ln1, …)."""
    renamed = {}
    for name, tensor in state.items():
        for ours, theirs in MMSEG_NAMES:
            name = name.replace(ours, theirs)
        renamed[re.sub(r"^norm\.", "ln1.", name)] = tensor
    return renamed


def from_mmseg_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The way back from to_mmseg_names."""
    renamed = {}
    for name, tensor in state.items():
        name = re.sub(r"^ln1\.", "norm.", name)
        for ours, theirs in reversed(MMSEG_NAMES):
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    return renamed


def _network(content: dict, key: str, path: Path) -> tuple[dict, str | None]:
    """The state dict that key asks for, and the key if the file has networks to choose from."""
    if isinstance(content.get(key), dict):
        return content[key], key
    if key != "teacher" or "student" in content:
        names = [str(k) for k, v in content.items() if not isinstance(v, torch.Tensor)] or ["one network, with no key"]
        raise CheckpointError(f"{path} has no network {key!r}: it has {', '.join(names)}")
    if "classy_state_dict" in content:
        for step in ("classy_state_dict", "base_model", "model", "trunk"):
            content = content.get(step)
            if not isinstance(content, dict):
                raise CheckpointError(f"{path} is from VISSL, but has no {step} in classy_state_dict")
    for wrapper in ("state_dict", "model"):
        if isinstance(content.get(wrapper), dict):
            return _network(content[wrapper], key, path)
    return content, None


def _split(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The backbone's tensors, float32 under our names, and what stands beside them, as it is."""
    prefix = "backbone." if any(name.startswith("backbone.") for name in tensors) else ""
    backbone, beside = {}, {}
    for name, tensor in tensors.items():
        own = name.removeprefix(prefix)
        if prefix and name.startswith(("blocks.", "layers.", "patch_embed.", "pos_embed", "cls_token")):
            raise CheckpointError(f"a second backbone stands beside {prefix}*, with {name}")
        if not name.startswith(prefix) or own.startswith(NOT_BACKBONE):
            beside[name] = tensor
        else:
            backbone[own] = tensor.float().contiguous() if tensor.is_floating_point() else tensor
    if any(name.startswith("layers.") for name in backbone):
        renamed = from_mmseg_names(backbone)
        if len(renamed) < len(backbone):
            raise CheckpointError("some of the backbone stands there twice, under mmseg's names and under ours")
        backbone = renamed
    return backbone, beside


def _kind(path: Path, content: dict, key: str | None, names: list[str]) -> str:
    """What to call a file whose network has these names."""
    tops = {name.split(".")[0] for name in names}
    if "ca_head" in tops:
        kind = "SelfPatch run"
    elif key is not None:
        kind = "DINO run" if "head" in tops else "run"
    elif "classy_state_dict" in content:
        kind = "VISSL run"
    elif "backbone" in tops:
        kind = ("mmseg segmenter" if "decode_head" in tops else
                "mmdet detector" if tops & {"rpn_head", "roi_head", "bbox_head"} else "wrapped backbone")
    elif "layers" in tops:
        kind = "backbone in mmseg's names"
    elif tops & {"head", "fc_norm", "pre_logits"}:
        kind = "timm backbone"
    else:
        kind = "DINO or timm backbone" if tops & {"cls_token", "norm"} else "SelfPatch backbone"
    return f"{kind} (safetensors)" if path.suffix == ".safetensors" else kind


def checkpoint_file(path: str | Path) -> Path:
    """The file that path means: itself, or the checkpoint.pth of a run's folder."""
    if not str(path):
        raise CheckpointError("the path of the checkpoint is empty")
    folder = Path(path)
    return folder / "checkpoint.pth" if (folder / "checkpoint.pth").is_file() else folder


def read_backbone(path: str | Path, key: str = "teacher") -> tuple[dict[str, torch.Tensor], CheckpointInfo]:
    """The backbone in a checkpoint of any kind, as float32 tensors under our names, and what it is.

    Args:
        path: the file, or a run's folder with a checkpoint.pth in it.
        key: which network of a training run, teacher or student; other files have one only.

    Raises:
        CheckpointError: not a checkpoint, no such key, not a ViT, or keys missing, left over or of another shape.
    """
    path = checkpoint_file(path)
    content = read_checkpoint(path)
    network, key = _network(content, key, path)
    network = {str(name): tensor for name, tensor in network.items() if isinstance(tensor, torch.Tensor)}
    if odd := [name for name, t in network.items() if t.layout != torch.strided or t.device.type != "cpu"]:
        raise CheckpointError(f"{path} has tensors that are sparse or hold no values: {', '.join(odd[:12])}")
    # DDP and torch.compile put their own names before ours
    tensors = {re.sub(r"^(module\.)+", "", name.replace("_orig_mod.", "")): t for name, t in network.items()}
    if len(tensors) < len(network):
        raise CheckpointError(f"{path} has the same keys with and without module. or _orig_mod. before them")
    try:
        state, beside = _split(tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path} does not fit: {error}") from None
    arch, patch_size, grid = _shape(state, path)
    args, meta, epoch = (content.get(name) for name in ("args", "meta", "epoch"))
    if epoch is None and isinstance(meta, dict):
        epoch = meta.get("epoch")
    info = CheckpointInfo(
        path=path, kind=_kind(path, content, key, list(tensors)), key=key, arch=arch, patch_size=patch_size, grid=grid,
        class_token="cls_token" in state, final_norm="norm.weight" in state, tensors=len(state),
        epoch=epoch if isinstance(epoch, int) else None, beside=beside,
        args=vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {})
    check_fits(state, _empty_backbone(info).state_dict(), f"{path} does not fit {arch} with patch size {patch_size}")
    return state, info


def _shape(state: dict[str, torch.Tensor], path: Path) -> tuple[str, int, int]:
    """Arch, patch size and grid side that a backbone's tensors are made for."""
    if any(name.startswith(("layer1.", "_feature_blocks.layer1.")) for name in state):
        raise CheckpointError(f"{path} holds a ResNet: SelfPatch's backbone is a Vision Transformer")
    if missing := [name for name in ("patch_embed.proj.weight", "pos_embed") if name not in state]:
        raise CheckpointError(f"{path} holds no Vision Transformer: missing {', '.join(missing)}; "
                              f"{_listed('it has', list(state))}")
    patch, pos = state["patch_embed.proj.weight"].shape, state["pos_embed"].shape
    if len(patch) != 4 or patch[2] != patch[3] or not patch[2] or patch[0] not in ARCH_OF_WIDTH:
        raise CheckpointError(f"{path} does not fit: patch_embed.proj.weight is {list(patch)}, and ours are "
                              f"[D, 3, p, p] with D one of {', '.join(map(str, ARCH_OF_WIDTH))}")
    patches = pos[1] - ("cls_token" in state) if len(pos) == 3 else 0
    side = round(patches ** 0.5)
    if side * side != patches or not side:
        token = "with" if "cls_token" in state else "without"
        raise CheckpointError(f"{path} does not fit: pos_embed is {list(pos)}, {token} class token: not a square grid")
    return ARCH_OF_WIDTH[patch[0]], patch[2], side


def _listed(what: str, names: list[str]) -> str:
    return f"{what} ({len(names)}): {', '.join(names[:12])}{', …' if len(names) > 12 else ''}"


def check_fits(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], message: str) -> None:
    """CheckpointError, with everything that is wrong, unless state is just what is expected."""
    both = [name for name in expected if name in state]
    wrong = {
        "missing": [name for name in expected if name not in state],
        "left over": [name for name in state if name not in expected],
        "of another shape": [f"{name} {list(state[name].shape)} not {list(expected[name].shape)}" for name in both
                             if state[name].shape != expected[name].shape],
        "not of floating point": [name for name in both
                                  if expected[name].is_floating_point() and not state[name].is_floating_point()],
        "with NaN or infinite values": [name for name in both if not state[name].sum().isfinite()]}
    if any(wrong.values()):
        raise CheckpointError(f"{message}: {'; '.join(_listed(what, names) for what, names in wrong.items() if names)}")


def _empty_backbone(info: CheckpointInfo, **kwargs) -> VisionTransformer:
    with torch.device("meta"):  # neither memory nor initialisation: every tensor comes from the file
        return ARCHS[info.arch](info.patch_size, img_size=info.grid * info.patch_size, class_token=info.class_token,
                                final_norm=info.final_norm, **kwargs)


def build_backbone(state: dict[str, torch.Tensor], info: CheckpointInfo, arch: str | None = None,
                   patch_size: int | None = None, **kwargs) -> VisionTransformer:
    """The network that read_backbone's result is made for, loaded, in eval mode.

    Args:
        arch, patch_size: what the user asked for; None takes what the file has.
        kwargs: more of VisionTransformer's arguments: drop_path_rate; num_heads, which no file tells (the published
            detectors have 8 in vit_small).

    Raises CheckpointError where arch or patch_size contradicts the file.
    """
    if arch is not None and ARCHS[arch] is not ARCHS[info.arch]:
        raise CheckpointError(f"--arch {arch} contradicts {info.path}, which holds {info.arch}: leave --arch out")
    if patch_size is not None and patch_size != info.patch_size:
        raise CheckpointError(f"--patch_size {patch_size} contradicts {info.path}, whose patch size is "
                              f"{info.patch_size}: leave --patch_size out")
    model = _empty_backbone(info, **kwargs)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def build_head(info: CheckpointInfo, k_num: int | None = None) -> SelfPatchHead:
    """The SelfPatchHead of a training run, loaded, in eval mode; k_num None takes the run's own, 4 if not known.

    Raises CheckpointError where the file has none, or where its keys do not fit.
    """
    state = {name.removeprefix("ca_head."): tensor.float() for name, tensor in info.beside.items()
             if name.startswith("ca_head.")}
    if not state:
        raise CheckpointError(f"{info.path} has no ca_head (it is a {info.kind}): give a SelfPatch training checkpoint")
    backbone = _empty_backbone(info)
    head = SelfPatchHead(backbone.embed_dim, backbone.num_heads, k_num or info.k_num)
    check_fits(state, head.state_dict(), f"the ca_head in {info.path} does not fit {info.arch}")
    head.load_state_dict(state)
    return head.eval()


def load_with_info(path: str | Path, key: str = "teacher", arch: str | None = None, patch_size: int | None = None,
                   random_weights: bool = False, **kwargs) -> tuple[VisionTransformer, CheckpointInfo | None]:
    """read_backbone and build_backbone for a job: prints one line that says what was loaded.

    An empty path needs random_weights, which builds an untrained network and gives no info. Errors are CheckpointError.
    """
    if path and random_weights:
        raise CheckpointError(f"--random_weights contradicts --pretrained_weights {path}: give one of the two")
    if path:
        state, info = read_backbone(path, key)
        model = build_backbone(state, info, arch, patch_size, **kwargs)
        print(f"loaded {info}")
        if info.kind.startswith("mmdet") and "num_heads" not in kwargs:
            print(f"note: {model.num_heads} attention heads, as in pretraining; no file tells them, and the published "
                  "detectors have 8: load_backbone(path, num_heads=8)")
        return model, info
    if not random_weights:
        raise CheckpointError("--pretrained_weights is empty, so the features will be those of a random network: "
                              "give a checkpoint, or --random_weights to go on without one")
    arch, patch_size = arch or "vit_small", 16 if patch_size is None else patch_size
    if not 1 <= patch_size <= 224:
        raise CheckpointError(f"--patch_size {patch_size} is not within 1 to 224")
    print(f"random weights: {arch}, patch size {patch_size}, not trained at all")
    return ARCHS[arch](patch_size, **kwargs).eval(), None


def load_backbone(path: str | Path, key: str = "teacher", arch: str | None = None, patch_size: int | None = None,
                  random_weights: bool = False, **kwargs) -> VisionTransformer:
    """The network that load_with_info gives."""
    return load_with_info(path, key, arch, patch_size, random_weights, **kwargs)[0]
