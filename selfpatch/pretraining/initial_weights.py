"""Start a run from a checkpoint's weights: its backbone for student and teacher, and the heads that fit.

    source, info = read_initial_weights("dino_vits16.pth", "vit_small", patch_size=16)
    print(set_initial_weights(student, teacher, source, info))

It can be any file that checkpoints/loading.py reads. From a training run, student and teacher both take the teacher's
weights, so that they start equal, as in a run from scratch.
"""
from dataclasses import replace

import torch
from torch import nn

from selfpatch.checkpoints import layouts
from selfpatch.checkpoints.info import CheckpointInfo
from selfpatch.checkpoints.loading import build_backbone, check_state_dict, print_line, read_backbone
from selfpatch.distributed.processes import is_main_process
from selfpatch.errors import ConfigError, printable
from selfpatch.method.selfpatch_head import MultiCropWrapper
from selfpatch.method.vision_transformer import ARCHS, VisionTransformer

OURS = "SelfPatch run"
HEADS = {"ca_head": "", "c_head": "--out_dim", "p_head": "--out_dim_selfpatch"}  # head: the option that sets its size


def read_initial_weights(path: str, arch: str, patch_size: int) -> tuple[VisionTransformer, CheckpointInfo]:
    """Read the network of --init_weights and its metadata; rank 0 prints the loader's line about it.

    Args:
        path: as in checkpoints.published.resolve_path.
        arch, patch_size: of the run.

    Raises:
        ConfigError: the file cannot be read, or its network is not the one the options ask for.
    """
    state, info = read_backbone(path)
    source = build_backbone(state, info)
    if is_main_process():
        heads = HEADS if info.kind.startswith(OURS) else ()  # set_initial_weights reports on them
        print_line(source, replace(info, ignored=tuple(name for name in info.ignored if name not in heads)))
    if ARCHS[arch] is not ARCHS[info.arch]:
        raise ConfigError(f"--arch {arch} contradicts --init_weights {info.path}, which holds {info.arch}: give --arch "
                          f"{info.arch}, or another file")
    if patch_size != info.patch_size:
        raise ConfigError(f"--patch_size {patch_size} contradicts --init_weights {info.path}, whose patch size is "
                          f"{info.patch_size}: give --patch_size {info.patch_size}, or another file")
    with torch.device("meta"):
        num_heads = ARCHS[arch](patch_size=patch_size).num_heads
    if source.num_heads != num_heads:  # the run's checkpoints could not tell, so every job would misread them
        raise ConfigError(f"--arch {arch} trains with {num_heads} attention heads, and the network of --init_weights "
                          f"{info.path} has {source.num_heads} ({info.heads_from}): give another file")
    return source, info


def backbone_state(source: VisionTransformer, grid: int) -> tuple[dict[str, torch.Tensor], list[str]]:
    """A network's weights for this project's backbone, and descriptions of what was changed.

    Class token and final norm are dropped. A run's position embedding always has the grid of 224-pixel images, whatever
    its crops, so that its options suffice to resume and to read it: other grids are resized to it (bicubic, by the rule
    of the forward pass, so features of 224-pixel images stay the same).

    Args:
        grid: patches per side of the run's position embedding.
    """
    side = round((source.pos_embed.shape[1] - source.num_prefix_tokens) ** 0.5)
    left_out = [part for part, has in (("class token", source.has_class_token),
                                       ("final norm", not isinstance(source.norm, nn.Identity))) if has]
    changes = [f"without its {' and '.join(left_out)}"] if left_out else []
    if side != grid:
        changes.append(f"position embedding resized from {side}×{side} to {grid}×{grid}")
    state = {name: tensor for name, tensor in source.state_dict().items()
             if name != "cls_token" and not name.startswith("norm.")}
    with torch.no_grad():
        return state | {"pos_embed": source.interpolate_pos_encoding((grid, grid))}, changes


def head_state(head: nn.Module, name: str, info: CheckpointInfo) -> tuple[dict[str, torch.Tensor] | None, str]:
    """A training run's weights of a head, or None if they do not fit, and the reason in words.

    DINO's only head is the image head.

    Raises:
        CheckpointError: their shapes fit, but they are sparse, not floating point or not finite.
    """
    ours = info.kind.startswith(OURS)
    prefix = f"{name}." if ours else "head." if name == "c_head" else None
    state = {key.removeprefix(prefix): tensor for key, tensor in info.other_tensors.items()
             if prefix and key.startswith(prefix)}
    if not state or not (ours or "last_layer.weight_v" in state):  # a classifier, if anything
        return None, ""
    expected = head.state_dict()
    if {key: tensor.shape for key, tensor in state.items()} != {key: t.shape for key, t in expected.items()}:
        return None, f"another shape, see {HEADS[name]}" if HEADS[name] else "another shape"
    message = f"the {name} in {info.path} does not fit"
    try:
        layouts.check_plain(state)
    except layouts.LayoutError as error:
        raise ConfigError(printable(f"{message}: {error}")) from None
    check_state_dict(state, expected, message)
    gain = state.get("last_layer.weight_g")
    if gain is not None and not head.last_layer.weight_g.requires_grad and (gain != 1).any():
        return None, "prototypes of other lengths than 1, see --norm_last_layer"
    return state, ""


def set_initial_weights(student: MultiCropWrapper, teacher: MultiCropWrapper, source: VisionTransformer,
                        info: CheckpointInfo) -> str:
    """Load the file's weights into both networks; heads that it lacks stay as they are.

    The loss's centres start at zero, as in every new run.

    Args:
        source, info: from read_initial_weights.

    Returns:
        a line that says what came from where.
    """
    grid = round(student.backbone.pos_embed.shape[1] ** 0.5)
    state, changes = backbone_state(source, grid)
    student.backbone.load_state_dict(state)
    taken, fresh = ["backbone" + (f" ({'; '.join(changes)})" if changes else "")], []
    for name in HEADS:
        head = getattr(student, name)
        state, reason = head_state(head, name, info)
        if state is None:
            fresh.append(name + (f" ({reason})" if reason else ""))
        else:
            head.load_state_dict(state)
            taken.append(name)
    teacher.load_state_dict(student.state_dict())
    return printable(f"student and teacher start with {', '.join(taken)} from {info.path}; "
                     + (f"fresh: {', '.join(fresh)}" if fresh else "nothing is fresh"))
