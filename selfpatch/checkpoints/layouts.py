"""The layouts of weights that load, as tables, and how to bring each to this project's names.

docs/CHECKPOINTS.md is printed from these tables, by docs/checkpoints_page.py.
"""
import re

import torch

VISSL_STEPS = ("classy_state_dict", "base_model", "model", "trunk")
WRAPPERS = ("state_dict", "model", "module", *VISSL_STEPS)  # dictionaries whose names do not describe the network

# Two networks in one file: (word for --checkpoint_key teacher, word for student, kind, written by)
NETWORKS = (
    ("teacher", "student", "run", "SelfPatch, DINO, iBOT, DINOv2"),
    ("momentum_encoder", "base_encoder", "MoCo v3 run", "MoCo v3 (its ViT-S has 12 attention heads)"),
    ("encoder_k", "encoder_q", "MoCo run", "MoCo"),
    ("target_encoder", "encoder", "MSN run", "MSN, I-JEPA"),
    ("target_encoder", "online_encoder", "BYOL run", "BYOL"),
    ("teacher_backbone", "student_backbone", "Lightning run", "Lightning modules with a teacher"),
    ("teacher_backbone", "backbone", "Lightning run", "Lightly"),
    ("momentum_backbone", "backbone", "solo-learn run", "solo-learn"),
)
SMALL_HEADS = {"MoCo v3 run": 12}  # attention heads of a kind's ViT-S, if not 6
GENERIC_STUDENTS = ("encoder", "backbone")  # mean a student only beside their teacher

# (ours, theirs), applied in this order when reading
MMSEG_NAMES = (("blocks.", "layers."), ("patch_embed.proj.", "patch_embed.projection."),
               (".norm1.", ".ln1."), (".norm2.", ".ln2."),
               (".attn.qkv.", ".attn.attn.in_proj_"), (".attn.proj.", ".attn.attn.out_proj."),
               (".mlp.fc1.", ".ffn.layers.0.0."), (".mlp.fc2.", ".ffn.layers.1."))
HUGGING_FACE_NAMES = (
    ("cls_token", "embeddings.cls_token"), ("mask_token", "embeddings.mask_token"),
    ("register_tokens", "embeddings.register_tokens"), ("dist_token", "embeddings.distillation_token"),
    ("pos_embed", "embeddings.position_embeddings"), ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("blocks.", "encoder.layer."), ("blocks.", "layers."), (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".attn.query.", ".attention.q_proj."), (".attn.key.", ".attention.k_proj."),
    (".attn.value.", ".attention.v_proj."), (".attn.proj.", ".attention.o_proj."),
    (".attn.proj.", ".attention.output.dense."), (".attn.", ".attention.attention."),
    (".mlp.fc1.", ".intermediate.dense."), (".mlp.fc2.", ".output.dense."), ("norm.", "layernorm."))

TORCHVISION_NAMES = (
    ("cls_token", "class_token"), ("pos_embed", "encoder.pos_embedding"), ("patch_embed.proj.", "conv_proj."),
    ("blocks.", "encoder.layers.encoder_layer_"), (".norm1.", ".ln_1."), (".norm2.", ".ln_2."),
    (".attn.qkv.", ".self_attention.in_proj_"), (".attn.proj.", ".self_attention.out_proj."),
    (".mlp.fc1.", ".mlp.linear_1."), (".mlp.fc2.", ".mlp.linear_2."), (".mlp.fc1.", ".mlp.0."),
    (".mlp.fc2.", ".mlp.3."), ("norm.", "encoder.ln."))

# Tensors that reveal a Vision Transformer: (name, written by, what its names become)
PATCH_EMBEDDINGS = (
    ("patch_embed.proj.weight", "SelfPatch, DINO, timm, DeiT, MAE, MoCo v3, MSN", "taken as they are"),
    ("patch_embed.projection.weight", "mmseg", "`layers.{i}.ln1`, … become `blocks.{i}.norm1`, …"),
    ("embeddings.patch_embeddings.projection.weight", "Hugging Face: ViT, DINO, MAE, MSN",
     "`encoder.layer.{i}.…` become `blocks.{i}.…`; query, key and value become one `qkv`"),
    ("conv_proj.weight", "torchvision", "`encoder.layers.encoder_layer_{i}.ln_1`, … become `blocks.{i}.norm1`, …"),
    ("embeddings.patch_embeddings.weight", "Hugging Face: DINOv3", "refused, see below"),
    ("embeddings.patch_embedding.weight", "Hugging Face: CLIP, SigLIP", "refused, see below"),
    ("ln_pre.weight", "CLIP, OpenCLIP", "refused, see below"),
)

# Not part of the backbone; the line names them: (starts of names, what they are)
IGNORED = (
    (("head.", "heads.", "fc.", "classifier.", "fc_norm.", "pre_logits.", "pooler."),
     "heads, and the norm after pooling"),
    (("fpn1.", "fpn2.", "fpn3.", "fpn4."), "the layers between backbone and FPN in a detector"),
    (("mask_token", "masked_embed"), "the token in place of masked patches: MAE, iBOT, DINOv2"),
    (("decoder_",), "MAE's decoder"),
    (("n_averaged",), "the counter of an averaged model (SWA, EMA)"),
)

# Parts that our backbone lacks: (what, pattern of names after renaming, written by)
LAYER_SCALE = re.compile(r"\.(ls[12]\.gamma|gamma_[12]|layer_scale[12]\.lambda1|lambda_[12])$")
UNSUPPORTED = (
    ("register tokens", r"(^|\.)(register_tokens|reg_token|storage_tokens)$", "DINOv2 with registers, DINOv3"),
    ("a rotary position embedding", r"(^|\.)(rope|rope_embed)\.|^embeddings\.patch_embeddings\.weight$",
     "DINOv3, EVA-02"),
    ("a relative position bias", r"relative_position|\.rel_pos_", "BEiT, ViTDet"),
    ("LayerScale", LAYER_SCALE.pattern, "DINOv2, DINOv3, DeiT III, BEiT; left out if all its factors are 1"),
    ("SwiGLU", r"\.mlp\.(w12?|w2|w3|fc1_[gx]|gate_proj|up_proj|weights_(in|out))\.", "DINOv2 ViT-g, DINOv3, EVA-02"),
    ("a distillation token", r"^dist_token$", "DeiT distilled"),
    ("q and v biases without one for k", r"\.attn\.[qv]_bias$", "BEiT, EVA-02"),
    ("norms of q and k", r"\.attn\.[qk]_norm\.", "timm's qk_norm models"),
    ("a norm before the blocks", r"^(norm_pre|ln_pre|pre_layrnorm)\.", "CLIP, OpenCLIP"),
    ("the embeddings of CLIP or SigLIP", r"^embeddings\.patch_embedding\.", "Hugging Face's CLIP and SigLIP"),
)
LARGEST_SCALE = 10_000  # numbers
# parts of a backbone outside the prefix; narrow, since a head may have a layers.0.weight
STRAY_BACKBONE = re.compile(r"(blocks|layers)\.\d+\.(norm|ln|attn|mlp|ffn)|patch_embed\.|(pos_embed|cls_token)$")


class LayoutError(ValueError):
    """Weights do not fit; the message completes "… does not fit:"."""


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


def _renamed(state: dict[str, torch.Tensor], table: tuple) -> dict[str, torch.Tensor]:
    """Rename a state dict to this project's names by a table of (ours, theirs)."""
    renamed = {}
    for name, tensor in state.items():
        for ours, theirs in table:
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    return renamed


def from_hugging_face_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the state dict of a Hugging Face ViT to this project's keys.

    Weights of query, key and value [D, D] become one attn.qkv.weight [3D, D], biases likewise. Incomplete triples stay,
    for the check of the keys to list them.
    """
    renamed = _renamed(state, HUGGING_FACE_NAMES)
    key_bias = any(name.endswith(".attn.key.bias") for name in renamed)
    for name in [name for name in renamed if ".attn.query." in name]:
        parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        shapes = {renamed[part].shape if part in renamed else torch.Size() for part in parts}
        if len(shapes) == 1 and torch.Size() not in shapes:
            renamed[name.replace(".query.", ".qkv.")] = torch.cat([renamed.pop(part) for part in parts])
        elif name.endswith(".bias") and not key_bias:  # BEiT: its own code calls it so
            renamed[name.replace(".query.bias", ".q_bias")] = renamed.pop(name)
    return renamed


def split_backbone(tensors: dict[str, torch.Tensor], prefix: str, others: list[str] = (),
                   ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Split a dictionary into a backbone's tensors, named without prefix, and all others.

    Args:
        others: prefixes of other networks in the same dictionary.

    Raises:
        LayoutError: there are parts of a backbone outside the prefix, or tensors that are not plain, see check_plain.
    """
    backbone, rest = {}, {}
    ignored = tuple(start for starts, _ in IGNORED for start in starts)
    inside = tuple(other for other in others if other.startswith(prefix))
    for name, tensor in tensors.items():
        short_name = name.removeprefix(prefix)
        if prefix and "" not in others and STRAY_BACKBONE.match(name):
            raise LayoutError(f"there is a second backbone next to {prefix}*, with {name}")
        if (not name.startswith(prefix) or name.startswith(inside)
                or short_name.removeprefix("embeddings.").startswith(ignored)):
            rest[name] = tensor
        else:
            backbone[short_name] = tensor
    check_plain(backbone)
    scales = {name: tensor for name, tensor in backbone.items() if LAYER_SCALE.search(name)}
    if all(scale.dim() <= 1 and scale.numel() < LARGEST_SCALE and (scale == 1).all() for scale in scales.values()):
        backbone = {name: tensor for name, tensor in backbone.items() if name not in scales}
        rest |= {f"{prefix}{name}": tensor for name, tensor in scales.items()}
    return backbone, rest


def check_plain(tensors: dict[str, torch.Tensor]) -> None:
    """Raise LayoutError unless all tensors are dense, unquantised and on the CPU."""
    invalid = [name for name, tensor in tensors.items() if tensor.is_nested or tensor.layout != torch.strided
               or tensor.is_quantized or tensor.device.type != "cpu"]
    if invalid:
        raise LayoutError(f"tensors that are sparse, nested, quantised or without data: {', '.join(invalid[:12])}")


def shapes_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Make meta tensors of the same shapes: an expanded tensor of a few bytes can claim 10^14 numbers."""
    return {name: torch.empty(tensor.shape, dtype=torch.float32 if tensor.is_floating_point() else tensor.dtype,
                              device="meta") for name, tensor in tensors.items()}


def to_our_names(backbone: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a backbone's tensors to this project's names.

    Raises:
        LayoutError: parts of the backbone occur under two names.
    """
    if "embeddings.patch_embeddings.projection.weight" in backbone:
        backbone = from_hugging_face_names(backbone)
    elif "conv_proj.weight" in backbone:
        backbone = _renamed(backbone, TORCHVISION_NAMES)
    elif any(name.startswith("layers.") for name in backbone):
        renamed = from_mmseg_names(backbone)
        if len(renamed) < len(backbone):
            raise LayoutError("parts of the backbone occur twice, under mmseg's names and under this project's")
        backbone = renamed
    return _with_class_position(backbone)


def _with_class_position(backbone: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Extend a position embedding [1, N, D] of the patches alone (DeiT III) by zeros for the class token."""
    pos = backbone.get("pos_embed")
    if "cls_token" not in backbone or pos is None or pos.dim() != 3:
        return backbone
    n = pos.shape[1]
    if round(n ** 0.5) ** 2 != n or round((n - 1) ** 0.5) ** 2 == n - 1:
        return backbone
    return backbone | {"pos_embed": torch.cat([torch.zeros_like(pos[:, :1]), pos], dim=1)}


def unsupported_parts(backbone: dict[str, torch.Tensor]) -> list[str]:
    """Name the parts of a network that this project's backbone lacks; see UNSUPPORTED."""
    parts = [what for what, pattern, _ in UNSUPPORTED if any(re.search(pattern, name) for name in backbone)]
    if parts and not any(name.startswith("pos") or ".position" in name for name in backbone) and (
            not any("position" in what for what in parts)):
        parts.append("no pos_embed (its positions are rotary or relative)")
    return parts


def modules_of(names: list[str]) -> tuple[str, ...]:
    """Name the modules of ignored tensors, for the line about a checkpoint."""
    return tuple(sorted({"LayerScale" if LAYER_SCALE.search(name) else name.split(".")[0] for name in names}))
