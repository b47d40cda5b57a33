"""Load the backbone of any supported checkpoint, strictly: missing or unexpected tensors are errors.

    model = load_backbone("checkpoint.pth")             # prints one line about what was loaded
    model, info = load_with_info("checkpoint.pth")      # also the file's metadata
    head = build_head(info)                             # the SelfPatchHead of a training run
    state, info = read_backbone("dino_vits16.pth")      # float32 tensors under this project's names, and metadata
    model = build_backbone(state, info)                 # the network that holds them

    model = load_backbone("dinov2.safetensors", arch="timm:vit_small_patch14_dinov2.lvd142m")   # any plain ViT of timm

Supported are training runs of SelfPatch, DINO and other methods, bare backbones, VISSL checkpoints, wrappers, timm
and Hugging Face files, and mmdet and mmseg models, as .pth or .safetensors; docs/CHECKPOINTS.md lists them. A path may
be a folder with weights, an https:// address or hf-hub:NAME, see published.py.
"""
import contextlib
import io
import re
import sys
from pathlib import Path

import torch
from torch import nn

from selfpatch.checkpoints import layouts, networks
from selfpatch.checkpoints.backbones import PREFIX, Backbone, TimmBackbone, build_timm
from selfpatch.checkpoints.files import CheckpointError, read_checkpoint, read_metadata
from selfpatch.checkpoints.info import OWN_WORDS, CheckpointInfo, describe, summarise
from selfpatch.checkpoints.pickled_classes import StandIn
from selfpatch.checkpoints.published import recorded_heads, resolve_path
from selfpatch.method.selfpatch_head import SelfPatchHead
from selfpatch.method.vision_transformer import ARCHS, VisionTransformer

AFTER_POOLING = ("head.", "fc_norm.", "attn_pool.")  # modules of timm that take no part in the features
RESNET = re.compile(r"(^|\.)layer1\.\d+\.conv1\.weight$")


def read_backbone(path: str | Path, key: str = "teacher") -> tuple[dict[str, torch.Tensor], CheckpointInfo]:
    """Read the backbone of any supported checkpoint.

    Args:
        path: checkpoint file, or another form of published.resolve_path.
        key: network of a training run: teacher, student, or a word of its path or prefix. Files with one network need
            none.

    Returns:
        The backbone's state dict, in float32 under this project's names, and the checkpoint's metadata.

    Raises:
        CheckpointError: not a checkpoint, no such key, not a ViT, a ViT with parts that this project's backbone lacks,
            or missing, unexpected or mis-shaped tensors.
    """
    path = resolve_path(path)
    content = read_checkpoint(path)
    network, others = _find_network(content, key, path)
    try:
        beside = [one.prefix for one in others if one.path == network.path]
        backbone, rest = layouts.split_backbone(network.tensors, network.prefix, beside)
        shapes = layouts.to_our_names(layouts.shapes_of(backbone))
        if parts := layouts.unsupported_parts(shapes):
            raise CheckpointError(f"{path} holds a Vision Transformer with {', '.join(parts)}, which this project's "
                                  "backbone does not have: load it with timm")
        info = describe(content, recorded_heads(path) | read_metadata(path), network, shapes, path)
    except layouts.LayoutError as error:
        raise CheckpointError(f"{path} does not fit: {error}") from None
    info.key, info.other_tensors = key if network.role or key != "teacher" else None, rest
    info.ignored = layouts.modules_of([name.removeprefix(network.prefix) for name in rest
                                       if not name.startswith(tuple(filter(None, beside)))])
    own = OWN_WORDS.intersection(network.path)
    info.also = tuple(one.name for one in others if not (own and OWN_WORDS.intersection(one.path)))
    expected = _meta_backbone(info).state_dict()
    message = f"{path} does not fit {info.arch} with patch size {info.patch_size}"
    check_state_dict(shapes, expected, message)  # before any of their data is touched
    state = layouts.to_our_names({name: tensor.float().contiguous() for name, tensor in backbone.items()})
    check_state_dict(state, expected, message)
    return state, info


def _find_network(content: dict, key: str, path: Path) -> tuple[networks.Network, list[networks.Network]]:
    """The network of a file's content for a key, and the file's others.

    Raises:
        CheckpointError: there is none, or its tensors do not fit together.
    """
    try:
        found = networks.list_networks(content)
        network = networks.choose_network(found, key)
    except layouts.LayoutError as error:
        raise CheckpointError(f"{path} does not fit: {error}") from None
    if network is None:
        raise _no_network(content, [one.name for one in found], key, path)
    return network, [one for one in found if one is not network]


def _no_network(content: dict, names: list[str], key: str, path: Path) -> CheckpointError:
    """Explain why the file has no network for a key; names are those of its networks."""
    if names:
        return CheckpointError(f"{path} has no network {key!r}: it has "
                               + ", ".join(name or "a single one without a name" for name in names))
    part = content
    for step in layouts.VISSL_STEPS if layouts.VISSL_STEPS[0] in content else ():
        part = part.get(step)
        if not isinstance(part, dict):
            return CheckpointError(f"{path} is a VISSL checkpoint without {step} in {layouts.VISSL_STEPS[0]}")
    for name, part in content.items():
        if isinstance(part, StandIn) and isinstance(part.state, dict) and "_modules" in part.state:
            return CheckpointError(f"{path} has a whole {part.origin} as {name!r}, not its tensors: ask its author for "
                                   "the state_dict")
    tensors = list(networks.collect_tensors(content, nested=True))
    if any(RESNET.search(name) for name in tensors):
        return CheckpointError(f"{path} holds a ResNet, but SelfPatch's backbone is a Vision Transformer")
    return CheckpointError(f"{path} holds no Vision Transformer: no {layouts.PATCH_EMBEDDINGS[0][0]}; "
                           f"{summarise('it has', tensors)}")


def check_state_dict(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], message: str) -> None:
    """Check keys, shapes, types and values of a state dict against the one that a model expects.

    Raises:
        CheckpointError: message, followed by everything that is wrong.
    """
    common = [name for name in expected if name in state]
    errors = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "wrong shape": [f"{name} is {list(state[name].shape)}, expected {list(expected[name].shape)}"
                        for name in common if state[name].shape != expected[name].shape],
        "not floating point": [name for name in common
                               if expected[name].is_floating_point() and not state[name].is_floating_point()],
        "NaN or infinite values": [name for name in common if state[name].shape == expected[name].shape
                                   and state[name].device.type != "meta" and not state[name].sum().isfinite()]}
    if any(errors.values()):
        raise CheckpointError(
            f"{message}: {'; '.join(summarise(what, names) for what, names in errors.items() if names)}")


def _meta_backbone(info: CheckpointInfo, **kwargs) -> VisionTransformer:
    if info.num_heads:
        kwargs.setdefault("num_heads", info.num_heads)
    with torch.device("meta"):  # no initialisation: every tensor comes from the file
        return ARCHS[info.arch](info.patch_size, img_size=info.grid * info.patch_size, class_token=info.class_token,
                                final_norm=info.final_norm, **kwargs)


def build_backbone(state: dict[str, torch.Tensor], info: CheckpointInfo, arch: str | None = None,
                   patch_size: int | None = None, **kwargs) -> VisionTransformer:
    """Build the network of a checkpoint with its weights, in eval mode.

    Args:
        state, info: result of read_backbone; the network shares the tensors of state.
        arch, patch_size: what the user asked for; None accepts the file's.
        kwargs: further arguments of VisionTransformer, such as drop_path_rate, or num_heads, which few files record
            (the published detectors have 8 in vit_small).

    Raises:
        CheckpointError: arch or patch_size contradicts the file.
    """
    if arch is not None and ARCHS[arch] is not ARCHS[info.arch]:
        raise CheckpointError(f"arch {arch} contradicts {info.path}, which holds {info.arch}: ask for {info.arch}, or "
                              "for none")
    if patch_size is not None and patch_size != info.patch_size:
        raise CheckpointError(f"patch size {patch_size} contradicts {info.path}, whose patch size is "
                              f"{info.patch_size}: ask for {info.patch_size}, or for none")
    model = _meta_backbone(info, **kwargs)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def build_head(info: CheckpointInfo, k_num: int | None = None) -> SelfPatchHead:
    """Build the SelfPatchHead of a training run, with its weights, in eval mode.

    Args:
        info: from read_backbone or load_with_info.
        k_num: number of positive patches; default: the run's own, 4 if unknown.

    Raises:
        CheckpointError: the file has no such head, or its tensors do not fit.
    """
    state = {name.removeprefix("ca_head."): tensor for name, tensor in info.other_tensors.items()
             if name.startswith("ca_head.")}
    if not state:
        raise CheckpointError(f"{info.path} has no ca_head (it is a {info.kind}): give a SelfPatch training checkpoint")
    backbone = _meta_backbone(info)
    head = SelfPatchHead(backbone.embed_dim, backbone.num_heads, k_num or info.k_num)
    message = f"the ca_head in {info.path} does not fit {info.arch}"
    try:
        layouts.check_plain(state)
    except layouts.LayoutError as error:
        raise CheckpointError(f"{message}: {error}") from None
    check_state_dict(layouts.shapes_of(state), head.state_dict(), message)
    state = {name: tensor.float() for name, tensor in state.items()}
    check_state_dict(state, head.state_dict(), message)
    head.load_state_dict(state)
    return head.eval()


def print_line(model: VisionTransformer, info: CheckpointInfo) -> None:
    """Print one line about what was loaded, and a note if the number of attention heads is a guess."""
    print(f"loaded {info}")
    if info.kind.startswith("mmdet") and not info.num_heads:
        print(f"note: {model.num_heads} attention heads, as in pretraining; the file does not record the number, "
              "and the published detectors have 8: load_backbone(path, num_heads=8)")


def _read_timm_weights(path: str | Path, key: str, network: nn.Module) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Read the tensors of a file for a timm network; also return which modules of the file are left out.

    timm's own conversion handles the original names of DINOv2, DINOv3 and EVA, and positions on another grid.

    Raises:
        CheckpointError: not a checkpoint, none or several networks for the key, or another patch size.
    """
    chosen, _ = _find_network(read_checkpoint(path), key, path)
    state = {name.removeprefix(chosen.prefix): tensor.float() if tensor.is_floating_point() else tensor
             for name, tensor in chosen.tensors.items() if name.startswith(chosen.prefix)}
    ours, theirs = network.patch_embed.proj.weight, state.get("patch_embed.proj.weight")
    if theirs is not None and theirs.shape[-2:] != ours.shape[-2:] and theirs.dim() == 4:
        raise CheckpointError(f"{path} has patches of {theirs.shape[-2]}×{theirs.shape[-1]}, the network of --arch of "
                              f"{ours.shape[-2]}×{ours.shape[-1]}: choose the --arch that the file is for")
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                state = convert(state, network)
        except Exception as error:  # unexpected shapes can raise anything there
            raise CheckpointError(f"{path} does not fit --arch: timm cannot convert it ({error})") from None
    expected = network.state_dict()
    ignored = AFTER_POOLING + tuple(start for starts, _ in layouts.IGNORED for start in starts)
    left_out = [name for name in state if name not in expected and name.startswith(ignored)]
    return ({name: tensor for name, tensor in state.items() if name not in left_out},
            sorted({name.split(".")[0] for name in left_out}))


def _load_timm(path: str | Path, key: str, arch: str, patch_size: int | None, **kwargs) -> TimmBackbone:
    """load_with_info for timm:NAME."""
    model = build_timm(arch.removeprefix(PREFIX), **kwargs)
    if patch_size not in (None, model.patch_size):
        raise CheckpointError(f"--patch_size {patch_size} contradicts --arch {arch}, whose patch size is "
                              f"{model.patch_size}: omit --patch_size")
    prefix = model.num_prefix_tokens
    words = f"{arch}, patch size {model.patch_size}, {len(model.blocks)} blocks, {prefix} prefix token" + (
        "s" * (prefix != 1))
    if not path:
        print(f"random weights: {words}, untrained")
        return model
    path = resolve_path(path)
    state, left_out = _read_timm_weights(path, key, model.network)
    check_state_dict(state, model.network.state_dict(), f"{path} does not fit {arch}")
    model.network.load_state_dict(state)
    print(f"loaded {path}: {words}, {len(state)} tensors" + (f", ignored {' '.join(left_out)}" if left_out else ""))
    return model


def load_with_info(path: str | Path, key: str = "teacher", arch: str | None = None, patch_size: int | None = None,
                   random_weights: bool = False, **kwargs) -> tuple[Backbone, CheckpointInfo | None]:
    """Load a backbone in eval mode with the metadata of its file, and print one line about it.

    Args:
        path: as in read_backbone; empty only together with random_weights.
        key: network of a training run, see read_backbone.
        arch: what the user asked for; None accepts the file's. timm:NAME is a Vision Transformer of timm.
        patch_size: likewise.
        random_weights: build an untrained network.
        kwargs: further arguments of the network, see build_backbone and build_timm.

    Returns:
        The network, and its metadata; None for an untrained network and for timm's.

    Raises:
        ConfigError: as read_backbone, build_backbone and build_timm, or neither or both of path and random_weights
            are given.
    """
    if path and random_weights:
        raise CheckpointError(f"--random_weights contradicts --pretrained_weights {path}: give one of the two")
    if not (path or random_weights):
        raise CheckpointError("--pretrained_weights is empty, so the features would be those of a random network: "
                              "give a checkpoint, or --random_weights to run without one")
    if arch is not None and arch.startswith(PREFIX):
        return _load_timm(path, key, arch, patch_size, **kwargs), None
    if arch is not None and arch not in ARCHS:
        raise CheckpointError(f"arch {arch!r} is neither {', '.join(ARCHS)} nor {PREFIX}NAME, a network of timm")
    if path:
        state, info = read_backbone(path, key)
        if "num_heads" in kwargs:
            info = info.with_heads(kwargs["num_heads"], "as asked for")
        model = build_backbone(state, info, arch, patch_size, **kwargs)
        print_line(model, info)
        return model, info
    arch, patch_size = arch or "vit_small", 16 if patch_size is None else patch_size
    if not 1 <= patch_size <= 224:
        raise CheckpointError(f"patch size {patch_size} is not between 1 and 224")
    print(f"random weights: {arch}, patch size {patch_size}, untrained")
    return ARCHS[arch](patch_size, **kwargs).eval(), None


def load_backbone(path: str | Path, key: str = "teacher", arch: str | None = None, patch_size: int | None = None,
                  random_weights: bool = False, **kwargs) -> Backbone:
    """Load a backbone in eval mode: load_with_info without the metadata."""
    return load_with_info(path, key, arch, patch_size, random_weights, **kwargs)[0]
