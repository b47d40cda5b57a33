"""Which layouts of weights load, and what each becomes: the tables that checkpoints.py loads by, and their page.

    python checkpoint_layouts.py > docs/CHECKPOINTS.md      # prints the page from the tables
"""
import re
from collections import deque

import numpy as np
import torch

WRAPPERS = ("state_dict", "model")
VISSL_STEPS = ("classy_state_dict", "base_model", "model", "trunk")

# Two networks in one file: (the one that --checkpoint_key teacher takes, the one for student, kind, written by)
NETWORKS = (
    ("teacher", "student", "run", "SelfPatch, DINO, iBOT, DINOv2"),
    ("momentum_encoder", "base_encoder", "MoCo v3 run", "MoCo v3 (its ViT-S has 12 attention heads)"),
    ("target_encoder", "encoder", "MSN run", "MSN, I-JEPA"),
    ("teacher_backbone", "student_backbone", "Lightning run", "Lightning modules with a teacher"),
    ("momentum_backbone", "backbone", "solo-learn run", "solo-learn"),
)
SMALL_HEADS = {"MoCo v3 run": 12}  # attention heads of a kind's ViT-S, where they are not 6
GENERIC_STUDENTS = ("encoder", "backbone")  # a student only where its teacher is in the file too

# (ours, theirs), replaced in this order when a file is read
MMSEG_NAMES = (("blocks.", "layers."), ("patch_embed.proj.", "patch_embed.projection."),
               (".norm1.", ".ln1."), (".norm2.", ".ln2."),
               (".attn.qkv.", ".attn.attn.in_proj_"), (".attn.proj.", ".attn.attn.out_proj."),
               (".mlp.fc1.", ".ffn.layers.0.0."), (".mlp.fc2.", ".ffn.layers.1."))
HUGGING_FACE_NAMES = (
    ("cls_token", "embeddings.cls_token"), ("mask_token", "embeddings.mask_token"),
    ("register_tokens", "embeddings.register_tokens"), ("dist_token", "embeddings.distillation_token"),
    ("pos_embed", "embeddings.position_embeddings"), ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("blocks.", "encoder.layer."), (".norm1.", ".layernorm_before."), (".norm2.", ".layernorm_after."),
    (".attn.proj.", ".attention.output.dense."), (".attn.", ".attention.attention."),
    (".mlp.fc1.", ".intermediate.dense."), (".mlp.fc2.", ".output.dense."), ("norm.", "layernorm."))

# A Vision Transformer is where one of these tensors is: (name, written by, what its names become)
PATCH_EMBEDDINGS = (
    ("patch_embed.proj.weight", "SelfPatch, DINO, timm, DeiT, MAE, MoCo v3, MSN", "taken as they are"),
    ("patch_embed.projection.weight", "mmseg", "`layers.{i}.ln1`, … become `blocks.{i}.norm1`, …"),
    ("embeddings.patch_embeddings.projection.weight", "Hugging Face: ViT, DINO, MAE, MSN",
     "`encoder.layer.{i}.…` become `blocks.{i}.…`; query, key and value become one `qkv`"),
    ("embeddings.patch_embeddings.weight", "Hugging Face: DINOv3", "refused, see below"),
)

# Left out of the backbone and named in the line: (starts of names, what they are)
IGNORED = (
    (("head.", "fc.", "classifier.", "fc_norm.", "pre_logits.", "pooler."), "heads, and the norm after pooling"),
    (("fpn1.", "fpn2.", "fpn3.", "fpn4."), "the layers between backbone and FPN in a detector"),
    (("mask_token", "masked_embed"), "the token in place of masked patches: MAE, iBOT, DINOv2"),
    (("decoder_",), "MAE's decoder"),
)

# What the backbone does not have: (what it is, pattern of names, written by). The patterns match names after renaming.
LAYER_SCALE = re.compile(r"\.(ls[12]\.gamma|gamma_[12]|layer_scale[12]\.lambda1)$")
UNSUPPORTED = (
    ("register tokens", r"(^|\.)(register_tokens|reg_token|storage_tokens)$", "DINOv2 with registers, DINOv3"),
    ("a rotary position embedding", r"(^|\.)(rope|rope_embed)\.|^embeddings\.patch_embeddings\.weight$",
     "DINOv3, EVA-02"),
    ("a relative position bias", r"relative_position|\.rel_pos_", "BEiT, ViTDet"),
    ("LayerScale", LAYER_SCALE.pattern, "DINOv2, DINOv3, DeiT III, BEiT; one of ones only is left out"),
    ("SwiGLU", r"\.mlp\.(w12?|w2|w3|fc1_[gx]|gate_proj|up_proj|weights_(in|out))\.", "DINOv2 ViT-g, DINOv3, EVA-02"),
    ("a distillation token", r"^dist_token$", "DeiT distilled"),
    ("q and v biases without one for k", r"\.attn\.[qv]_bias$", "BEiT, EVA-02"),
    ("norms of q and k", r"\.attn\.[qk]_norm\.", "timm's qk_norm models"),
    ("a norm before the blocks", r"^norm_pre\.", "CLIP"),
)
LARGEST = 1_000_000  # tensors and dictionaries: a small file can refer to one dictionary very many times


class LayoutError(ValueError):
    """Weights that do not fit; the message goes after "it does not fit:"."""


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


def from_hugging_face_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the state dict of a Hugging Face ViT to this project's keys.

    The weights of query, key and value, [D, D] each, become one attn.qkv.weight [3D, D], and their biases likewise; an
    incomplete triple stays as it is, so that the check of the keys lists it.
    """
    renamed = {}
    for name, tensor in state.items():
        for ours, theirs in HUGGING_FACE_NAMES:
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    for name in [name for name in renamed if ".attn.query." in name]:
        parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(part in renamed for part in parts):
            renamed[name.replace(".query.", ".qkv.")] = torch.cat([renamed.pop(part) for part in parts])
    return renamed


def collect_tensors(content: dict, nested: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of a dictionary by name; NumPy arrays of numbers become tensors.

    Args:
        nested: also those of dictionaries in it, up to five deep, under names joined by dots.

    Raises:
        LayoutError: more than a million tensors and dictionaries.
    """
    tensors, left = {}, deque([("", content, 0)])
    while left:
        prefix, part, depth = left.popleft()
        for name, value in part.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{prefix}{name}"] = value
            elif isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
                tensors[f"{prefix}{name}"] = torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
            elif nested and isinstance(value, dict) and depth < 5:
                left.append((f"{prefix}{name}.", value, depth + 1))
        if len(tensors) + len(left) > LARGEST:
            raise LayoutError(f"more than {LARGEST} tensors and dictionaries")
    return tensors


def find_prefixes(names: dict | list) -> list[str]:
    """Prefixes under which there is a Vision Transformer, such as "" or "visual.trunk.", in the file's order."""
    prefixes = {}
    for name in names:
        for end, *_ in PATCH_EMBEDDINGS:
            if f".{name}".endswith(f".{end}"):
                prefixes[name[:len(name) - len(end)]] = None
    return list(prefixes)


def network_of(prefix: str, prefixes: list[str]) -> tuple[str | None, str | None]:
    """Key (teacher or student) and kind of the network under a prefix; (None, None) where it is the only one."""
    modules, all_modules = prefix.split("."), {module for other in prefixes for module in other.split(".")}
    for teacher, student, kind, _ in NETWORKS:
        if teacher in modules:
            return "teacher", kind
        if student in modules and (student not in GENERIC_STUDENTS or teacher in all_modules):
            return "student", kind
    return None, None


def choose_prefix(prefixes: list[str], key: str) -> str | None:
    """The prefix of the network for a key; None where no network is under that key.

    Args:
        prefixes: as find_prefixes returns them.
        key: teacher, student, or a module in the prefix of the network, such as momentum_encoder.

    Raises:
        LayoutError: several networks fit.
    """
    fits = [prefix for prefix in prefixes if network_of(prefix, prefixes)[0] == key]
    fits = fits or [prefix for prefix in prefixes if f".{key.rstrip('.')}." in f".{prefix}"]
    if not fits and key == "teacher":
        fits = [prefix for prefix in prefixes if network_of(prefix, prefixes)[0] is None]
        if "backbone." in fits:  # of a detector or segmenter
            fits = ["backbone."]
    if len(fits) > 1:
        raise LayoutError(f"it holds several Vision Transformers, under {', '.join(p or 'no prefix' for p in fits)}:"
                              " give the one to load as the key (--checkpoint_key)")
    return fits[0] if fits else None


def split_backbone(tensors: dict[str, torch.Tensor], prefix: str,
                   ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Separate the backbone (float32, this project's names) from the other tensors, which stay unchanged.

    Raises:
        LayoutError: two backbones, a backbone with parts under two names, or one that has what ours has not.
    """
    backbone, others = {}, {}
    ignored = tuple(start for starts, _ in IGNORED for start in starts)
    for name, tensor in tensors.items():
        short_name = name.removeprefix(prefix)
        if prefix and name.startswith(("blocks.", "layers.", "patch_embed.", "pos_embed", "cls_token")):
            raise LayoutError(f"there is a second backbone next to {prefix}*, with {name}")
        if not name.startswith(prefix) or short_name.removeprefix("embeddings.").startswith(ignored):
            others[name] = tensor
        else:
            backbone[short_name] = tensor.float().contiguous() if tensor.is_floating_point() else tensor
    if any(name.startswith("layers.") for name in backbone):
        renamed = from_mmseg_names(backbone)
        if len(renamed) < len(backbone):
            raise LayoutError("parts of the backbone occur twice, under mmseg's names and under this project's")
        backbone = renamed
    elif "embeddings.patch_embeddings.projection.weight" in backbone:
        backbone = from_hugging_face_names(backbone)
    scales = {name: backbone[name] for name in backbone if LAYER_SCALE.search(name)}
    if all((scale == 1).all() for scale in scales.values()):
        backbone = {name: tensor for name, tensor in backbone.items() if name not in scales}
        others |= {f"{prefix}{name}": tensor for name, tensor in scales.items()}
    return _with_class_position(backbone), others


def _with_class_position(backbone: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give the class token a position embedding of zeros where only the patches have one (DeiT III), [1, N + 1, D]."""
    pos = backbone.get("pos_embed")
    if "cls_token" not in backbone or pos is None or pos.dim() != 3:
        return backbone
    n = pos.shape[1]
    if round(n ** 0.5) ** 2 != n or round((n - 1) ** 0.5) ** 2 == n - 1:
        return backbone
    return backbone | {"pos_embed": torch.cat([torch.zeros_like(pos[:, :1]), pos], dim=1)}


def unsupported_parts(backbone: dict[str, torch.Tensor]) -> list[str]:
    """What a network has that this project's backbone does not have, in words; see UNSUPPORTED."""
    parts = [what for what, pattern, _ in UNSUPPORTED if any(re.search(pattern, name) for name in backbone)]
    if parts and "pos_embed" not in backbone and not any("position" in what for what in parts):
        parts.append("no pos_embed (its positions are rotary or relative)")
    return parts


def module_of(name: str) -> str:
    """The module that the line about a checkpoint names for a tensor that is left out."""
    return "LayerScale" if LAYER_SCALE.search(name) else name.split(".")[0]


def _table(header: tuple, rows: list[tuple]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *rows)]


def page() -> str:
    """The page docs/CHECKPOINTS.md, in Markdown."""
    pairs = [(f"`{teacher}`", f"`{student}`", writer) for teacher, student, _, writer in NETWORKS]
    lines = [
        "# Which checkpoints load, and what each becomes", "",
        "Printed by `python checkpoint_layouts.py` from the tables that the loader uses.", "",
        "Every job finds the Vision Transformer of a file, whatever the prefix of its names, and prints which one it "
        "took. Missing and unexpected keys are an error that lists them; nothing in a file is executed.", "",
        "## Where the network is", "",
        f"In the file itself, in {' or '.join(f'`{name}`' for name in WRAPPERS)}, in `{'` → `'.join(VISSL_STEPS)}` "
        "(VISSL), in another dictionary, or under a prefix such as `backbone.` (mmdet, mmseg), `model.` or "
        "`visual.trunk.`. `module.` and `_orig_mod.` (DDP, torch.compile) are read over. NumPy arrays are read as "
        "tensors.", "",
        "Where a file holds two networks, as dictionaries or prefixes, `--checkpoint_key` takes:", "",
        *_table(("`teacher` (default)", "`student`", "written by"), pairs), "",
        "Another word is looked for in the prefixes. If several networks fit, the error lists their prefixes.", "",
        "## What its names become", "",
        *_table(("a network is where this is", "written by", "its names"),
                [(f"`{name}`", *rest) for name, *rest in PATCH_EMBEDDINGS]), "",
        "Depth 12 and widths 192, 384 and 768 become `vit_tiny`, `vit_small` and `vit_base`, in float32, of any patch "
        "size and square grid, with or without class token and final norm. A class token without position embedding "
        "(DeiT III) gets one of zeros.", "",
        "## What is left out, and named in the line", "",
        *_table(("names that start with", "what they are"),
                [(", ".join(f"`{start}`" for start in starts), what) for starts, what in IGNORED]), "",
        "## What is refused", "",
        "This project's backbone does not have these; load such a network with timm.", "",
        *_table(("a network with", "for example"), [(what, writer) for what, _, writer in UNSUPPORTED])]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
