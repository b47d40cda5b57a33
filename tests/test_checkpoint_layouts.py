"""Weights under the names of other projects become this project's backbone, or the error says what they have."""
import runpy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from golden_rules import set_weights

from checkpoint_files import CheckpointError
from checkpoint_layouts import UNSUPPORTED, LayoutError, collect_tensors
from checkpoints import load_backbone, read_backbone
from convert_checkpoint import convert_file
from vision_transformer import vit_small

ROOT = Path(__file__).parents[1]
IMAGE = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def network():
    """timm's ViT-Ti with class token, norm and head, for images of 48 pixels."""
    return set_weights(timm.create_model("vit_tiny_patch16_224", img_size=48, num_classes=5), 0).eval()


@pytest.fixture(scope="module")
def sd(network):
    """Its state dict in float16, so that the files are small."""
    return {name: tensor.half() for name, tensor in network.state_dict().items()}


@pytest.fixture(scope="module")
def other(sd):
    """Another network of the same shapes: expanded scalars, of which torch.save writes one number each."""
    return {name: torch.zeros((), dtype=torch.half).expand(tensor.shape) for name, tensor in sd.items()}


def under(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def saved(tmp_path, content):
    torch.save(content, tmp_path / "file.pth")
    return tmp_path / "file.pth"


def assert_is(path, state, key="teacher"):
    """The backbone in the file is that of a timm state dict, to the bit; returns the metadata."""
    loaded, info = read_backbone(path, key)
    expected = {name: tensor.float() for name, tensor in state.items() if not name.startswith("head.")}
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)
    return info


PAIRS = [  # how the file is made from teacher t and student s, its kind, the prefixes of t and s
    ("MoCo v3", lambda t, s: {"state_dict": under("module.momentum_encoder.", t) | under("module.base_encoder.", s)},
     "MoCo v3 run", "momentum_encoder.", "base_encoder."),
    ("MSN", lambda t, s: {"encoder": under("module.", s), "target_encoder": under("module.", t), "epoch": 3},
     "MSN run", "target_encoder.module.", "encoder.module."),
    ("Lightning", lambda t, s: {"state_dict": under("teacher_backbone.vit.", t) | under("student_backbone.vit.", s)},
     "Lightning run", "teacher_backbone.vit.", "student_backbone.vit."),
    ("solo-learn", lambda t, s: {"state_dict": under("backbone.", s) | under("momentum_backbone.", t)
                                 | {"classifier.weight": torch.zeros(5, 192)}},
     "solo-learn run", "momentum_backbone.", "backbone."),
    ("DINOv2", lambda t, s: {"model": under("student.backbone.", s) | under("teacher.backbone.", t)},
     "run", "teacher.backbone.", "student.backbone."),
]


@pytest.mark.parametrize("make, kind, teacher, student", [pair[1:] for pair in PAIRS], ids=[pair[0] for pair in PAIRS])
def test_two_networks_in_one_file(tmp_path, sd, other, make, kind, teacher, student):
    path = saved(tmp_path, make(sd, other))
    for key, state, prefix in (("teacher", sd, teacher), ("student", other, student)):
        info = assert_is(path, state, key)
        assert (info.kind, info.key, info.prefix) == (kind, key, prefix)
        where = f"key {key}, prefix {prefix}," if prefix != "backbone." else f"key {key},"  # as in a detector
        assert f"file.pth: {kind}, {where} vit_tiny, patch size 16, 150 tensors, epoch" in str(info)
    with pytest.raises(CheckpointError, match=rf"no network 'predictor': it has .*{teacher}"):
        read_backbone(path, "predictor")
    assert_is(path, sd, teacher.split(".")[0])  # the first word of a prefix is a key too


def test_only_a_student(tmp_path, sd):
    path = saved(tmp_path, {"state_dict": under("student_backbone.vit.", sd)})
    with pytest.raises(CheckpointError, match="no network 'teacher': it has student_backbone.vit.$"):
        read_backbone(path)
    assert_is(path, sd, "student")


@pytest.mark.parametrize("make, summary", [
    (lambda sd: {"state_dict": under("model.", sd)}, "wrapped backbone, no key, prefix model., vit_tiny"),
    (lambda sd: {"state_dict": under("visual.trunk.", sd) | {"text.token_embedding.weight": torch.zeros(9, 8)}},
     "wrapped backbone, no key, prefix visual.trunk., vit_tiny"),
    (lambda sd: {"net": {"encoder": sd}, "step": 3}, "wrapped backbone, no key, prefix net.encoder., vit_tiny"),
    (lambda sd: {"model": sd | {"mask_token": torch.zeros(1, 1, 192), "decoder_embed.weight": torch.zeros(64, 192),
                                "decoder_pos_embed": torch.zeros(1, 10, 64), "decoder_blocks.0.norm1.bias":
                                torch.zeros(64)}}, "MAE, no key, vit_tiny"),
    (lambda sd: {"teacher": under("backbone.", sd) | {"backbone.masked_embed": torch.zeros(1, 192),
                                                      "head.mlp.0.bias": torch.zeros(3)}}, "DINO run, key teacher"),
    (lambda sd: {"encoder": under("module.", sd) | {"module.fc.fc1.weight": torch.zeros(3, 192)}},
     "prefix encoder.module."),
    (lambda sd: sd | under("pooler.dense.", {"weight": torch.zeros(192, 192)}), "timm backbone, no key, vit_tiny"),
], ids=["model", "visual.trunk", "nested", "MAE", "iBOT", "MSN's encoder alone", "pooler"])
def test_prefixes_and_extras(tmp_path, sd, make, summary):
    info = str(assert_is(saved(tmp_path, make(sd)), sd))
    assert summary in info
    for extra in ("mask_token decoder" if "MAE" in info else "masked_embed" if "DINO" in info else "").split():
        assert extra in info.split("ignored")[1]


def test_features_of_a_prefixed_network(tmp_path, network, capsys):
    path = saved(tmp_path, {"state_dict": under("visual.trunk.", network.state_dict())})
    with torch.no_grad():
        torch.testing.assert_close(load_backbone(path)(IMAGE), network.forward_features(IMAGE)[:, 1:],
                                   rtol=1e-5, atol=1e-5)
    assert "prefix visual.trunk., vit_tiny, patch size 16, 150 tensors" in capsys.readouterr().out


def test_several_networks_without_a_teacher(tmp_path, sd, other):
    path = saved(tmp_path, {"state_dict": under("left.vit.", sd) | under("right.vit.", other)})
    with pytest.raises(CheckpointError, match="several Vision Transformers, under left.vit., right.vit.: .*_key"):
        read_backbone(path)
    assert_is(path, sd, "left")
    assert_is(path, other, "right.vit.")


def hugging_face(sd, prefix="vit.", extra=()):
    """The state dict as transformers' ViTModel names it."""
    names = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
             "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
             "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
             "norm.weight": "layernorm.weight", "norm.bias": "layernorm.bias"}
    layer = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
             "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    state = {}
    for name, tensor in sd.items():
        if name in names:
            state[names[name]] = tensor
        elif name.startswith("blocks."):
            _, i, rest = name.split(".", 2)
            module, kind = rest.rsplit(".", 1)
            if module == "attn.qkv":
                for part, chunk in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                    state[f"encoder.layer.{i}.attention.attention.{part}.{kind}"] = chunk.clone()
            else:
                state[f"encoder.layer.{i}.{layer[module]}.{kind}"] = tensor
    return under(prefix, state | dict(extra))


@pytest.mark.parametrize("prefix", ["vit.", "deit.", ""])
def test_hugging_face(tmp_path, sd, prefix):
    extra = {"embeddings.mask_token": torch.zeros(1, 1, 192), "pooler.dense.bias": torch.zeros(192)}
    path = saved(tmp_path, hugging_face(sd, prefix, extra) | {"classifier.weight": torch.zeros(5, 192)})
    info = assert_is(path, sd)
    assert info.kind == "Hugging Face ViT" and info.class_token and info.final_norm
    assert info.prefix == prefix and ("ignored classifier embeddings pooler" in str(info))


def test_hugging_face_without_a_key_bias(tmp_path, sd):
    state = hugging_face(sd)
    del state["vit.encoder.layer.3.attention.attention.key.bias"]
    with pytest.raises(CheckpointError, match=r"missing \(1\): blocks.3.attn.qkv.bias; unexpected \(2\): "
                                              "blocks.3.attn.query.bias, blocks.3.attn.value.bias"):
        read_backbone(saved(tmp_path, state))


def layer_scale(name, value=0.5, dim=192):
    return {name.format(i=i, j=j): torch.full((dim,), value) for i in range(12) for j in (1, 2)}


def tokens(name, n=4):
    return {name: torch.zeros(1, n, 192)}


def without(state, *names):
    return {name: tensor for name, tensor in state.items() if name not in names}


REFUSED = [
    ("DeiT distilled", lambda sd: {"model": sd | tokens("dist_token", 1) | tokens("pos_embed", 11)},
     ["a distillation token"]),
    ("Hugging Face DeiT", lambda sd: hugging_face(sd, "deit.", tokens("embeddings.distillation_token", 1)),
     ["a distillation token"]),
    ("DeiT III", lambda sd: {"model": sd | tokens("pos_embed", 9) | layer_scale("blocks.{i}.ls{j}.gamma")},
     ["LayerScale"]),
    ("DINOv2", lambda sd: sd | {"mask_token": torch.zeros(1, 192)} | layer_scale("blocks.{i}.ls{j}.gamma"),
     ["LayerScale"]),
    ("DINOv2 with registers", lambda sd: sd | tokens("register_tokens") | layer_scale("blocks.{i}.ls{j}.gamma"),
     ["register tokens", "LayerScale"]),
    ("timm's DINOv2", lambda sd: sd | tokens("reg_token") | layer_scale("blocks.{i}.ls{j}.gamma", 1.0),
     ["register tokens"]),
    ("Hugging Face DINOv2", lambda sd: under("dinov2.", {
        name.replace("layernorm_before", "norm1").replace("layernorm_after", "norm2")
        .replace("intermediate.dense", "mlp.fc1").replace("output.dense", "mlp.fc2")
        .replace("attention.mlp.fc2", "attention.output.dense"): tensor
        for name, tensor in hugging_face(sd, "").items()} | layer_scale("encoder.layer.{i}.layer_scale{j}.lambda1")),
     ["LayerScale"]),
    ("DINOv3", lambda sd: without(sd, "pos_embed") | tokens("storage_tokens") | tokens("mask_token", 1)
     | {"rope_embed.periods": torch.ones(16)} | layer_scale("blocks.{i}.ls{j}.gamma"),
     ["register tokens", "a rotary position embedding", "LayerScale"]),
    ("timm's DINOv3", lambda sd: without(sd, "pos_embed") | tokens("reg_token") | layer_scale("blocks.{i}.gamma_{j}"),
     ["register tokens", "LayerScale", r"no pos_embed \(its positions are rotary or relative\)"]),
    ("Hugging Face DINOv3", lambda sd: {
        "embeddings.patch_embeddings.weight": sd["patch_embed.proj.weight"], "embeddings.cls_token": sd["cls_token"],
        "layer.0.mlp.up_proj.weight": torch.zeros(2, 192), "layer.0.attention.q_proj.weight": torch.zeros(192, 192)}
     | tokens("embeddings.register_tokens") | layer_scale("layer.{i}.layer_scale{j}.lambda1"),
     ["register tokens", "a rotary position embedding", "LayerScale", "SwiGLU"]),
    ("SwiGLU", lambda sd: sd | {"blocks.0.mlp.w12.weight": torch.zeros(4, 192), "blocks.0.mlp.w3.weight":
                                torch.zeros(192, 2)}, ["SwiGLU"]),
    ("BEiT", lambda sd: without(sd, "pos_embed") | {"blocks.0.attn.relative_position_bias_table": torch.zeros(9, 3),
                                                    "blocks.0.attn.q_bias": torch.zeros(192)},
     ["a relative position bias", "q and v biases without one for k"]),
    ("qk_norm", lambda sd: sd | {"blocks.0.attn.q_norm.weight": torch.ones(64)}, ["norms of q and k"]),
    ("CLIP", lambda sd: {"state_dict": under("visual.trunk.", sd | {"norm_pre.weight": torch.ones(192)})},
     ["a norm before the blocks"]),
]


@pytest.mark.parametrize("make, parts", [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_the_backbone_cannot_hold_is_named(tmp_path, other, make, parts):
    path = saved(tmp_path, make(other))
    with pytest.raises(CheckpointError, match=rf"file.pth holds a Vision Transformer with {', '.join(parts)}, which "
                                              "this project's backbone does not have: load it with timm$"):
        load_backbone(path)


def test_every_unsupported_part_is_tried():
    assert {what for what, *_ in UNSUPPORTED} <= {part for *_, parts in REFUSED for part in parts}


def test_layer_scale_of_ones_and_position_of_patches_only(tmp_path, sd, network):
    state = sd | {"pos_embed": sd["pos_embed"][:, 1:]} | layer_scale("blocks.{i}.ls{j}.gamma", 1.0)
    path = saved(tmp_path, {"model": state})
    zero = torch.zeros(1, 1, 192, dtype=torch.half)
    info = assert_is(path, sd | {"pos_embed": torch.cat([zero, sd["pos_embed"][:, 1:]], 1)})
    assert "ignored LayerScale head" in str(info) and info.grid == 3
    deit3 = timm.create_model("vit_tiny_patch16_224", img_size=48, num_classes=5, no_embed_class=True, init_values=1.0)
    deit3.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(load_backbone(path)(IMAGE), deit3.eval().forward_features(IMAGE)[:, 1:],
                                   rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [lambda arrays: arrays, lambda arrays: {"state_dict": arrays, "note": np.array("x")}])
def test_arrays_in_place_of_tensors(tmp_path, sd, make):
    assert_is(saved(tmp_path, make({name: tensor.numpy() for name, tensor in sd.items()})), sd)


def test_arrays_of_the_other_byte_order_and_of_text():
    content = {"a": np.arange(3, dtype=">f4"), "b": np.array(["text"]), 3: np.float32([1])[::-1],
               "c": {"d": torch.ones(1)}}
    tensors = collect_tensors(content, nested=True)
    assert list(tensors) == ["a", "3", "c.d"] and torch.equal(tensors["a"], torch.arange(3.0))


def test_endless_nesting():
    content = {"a": torch.zeros(1)}
    content["self"] = content
    assert list(collect_tensors(content, nested=True)) == ["self." * i + "a" for i in range(6)]
    many = {}
    for _ in range(6):
        many = {str(i): many for i in range(1000)}
    with pytest.raises(LayoutError, match="more than 1000000"):
        collect_tensors(many, nested=True)


def test_missing_and_unexpected_keys_under_a_prefix(tmp_path, other):
    state = under("visual.trunk.", without(other, "blocks.3.norm1.bias") | {"blocks.0.extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"missing \(1\): blocks.3.norm1.bias; unexpected \(1\): blocks.0.extra"):
        read_backbone(saved(tmp_path, state))


def test_attention_heads_of_moco_v3(tmp_path, capsys):
    """MoCo v3's ViT-S has 12 heads of 32 channels; the line and the converted file's call say so."""
    with torch.device("meta"):
        shapes = vit_small(class_token=True, final_norm=True).state_dict()
    state = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in shapes.items()}
    path = saved(tmp_path, {"state_dict": under("module.momentum_encoder.", state)})
    assert load_backbone(path).num_heads == 12 and load_backbone(path, num_heads=6).num_heads == 6
    assert capsys.readouterr().out.count("note: 12 attention heads, as published") == 1
    for to, call in (("timm", "num_heads=12, checkpoint_path="), ("backbone", "out.pth', num_heads=12)"),
                     ("mmdet", "backbone=dict(num_heads=12, init_cfg")):
        convert_file(path, tmp_path / "out.pth", to, overwrite=True)
        assert call in capsys.readouterr().out


def test_names_with_escape_codes(tmp_path, sd):
    torch.save({"state_dict": under("model.", sd) | {"\x1b[2J\nhead": torch.zeros(1)}}, tmp_path / "\x1b[31mred.pth")
    info = str(read_backbone(tmp_path / "\x1b[31mred.pth")[1])
    assert info.isprintable() and "/?[31mred.pth" in info and "ignored ?[2J?head" in info
    torch.save(sd | {"\x1b[2J": torch.zeros(1)}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=r"unexpected \(1\): \?\[2J$"):
        read_backbone(tmp_path / "file.pth")


def test_page_is_what_the_command_prints(capsys):
    runpy.run_path(str(ROOT / "checkpoint_layouts.py"), run_name="__main__")
    assert capsys.readouterr().out == (ROOT / "docs" / "CHECKPOINTS.md").read_text(encoding="utf-8")
