"""Weights under the names of other projects become this project's backbone, or the error says what they have."""
import re
import runpy

import numpy as np
import pytest
import timm
import torch
import torchvision
from golden_rules import set_weights
from layout_files import assert_is, saved, timm_network, under
from repository import ROOT

from selfpatch.checkpoints.files import CheckpointError
from selfpatch.checkpoints.layouts import UNSUPPORTED
from selfpatch.checkpoints.loading import load_backbone, read_backbone

IMAGE = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def network():
    return timm_network()


def renamed(state, pattern, replacement):
    return {re.sub(pattern, replacement, name, count=1): tensor for name, tensor in state.items()}


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
     "prefix encoder., vit_tiny"),
    (lambda sd: sd | under("pooler.dense.", {"weight": torch.zeros(192, 192)}), "timm backbone, no key, vit_tiny"),
    (lambda sd: {"model": renamed(sd, "", "_fsdp_wrapped_module.")}, "timm backbone, no key, vit_tiny"),
    (lambda sd: {"model": renamed(sd, r"(blocks\.\d+\.)", r"\1_checkpoint_wrapped_module.")}, "timm backbone, no key"),
    (lambda sd: {"teacher": renamed(sd, r"blocks\.([0-5])\.", r"blocks.0.\1.")}, "run, key teacher"),
    (lambda sd: {"state_dict": under("module.", sd) | {"n_averaged": torch.tensor(3)}}, "timm backbone, no key"),
], ids=["model", "visual.trunk", "nested", "MAE", "iBOT", "MSN's encoder alone", "pooler", "FSDP", "checkpointing",
        "DINOv2's chunks", "SWA"])
def test_prefixes_and_extras(tmp_path, sd, make, summary):
    info = str(assert_is(saved(tmp_path, make(sd)), sd))
    assert summary in info
    for extra in ("mask_token decoder" if "MAE" in info else "masked_embed" if "DINO run" in info else "").split():
        assert extra in info.split("ignored")[1]


def test_features_of_a_prefixed_network(tmp_path, network, capsys):
    path = saved(tmp_path, {"state_dict": under("visual.trunk.", network.state_dict())})
    with torch.no_grad():
        torch.testing.assert_close(load_backbone(path)(IMAGE), network.forward_features(IMAGE)[:, 1:],
                                   rtol=1e-5, atol=1e-5)
    assert "prefix visual.trunk., vit_tiny, patch size 16, 150 tensors" in capsys.readouterr().out


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


def test_hugging_face_names_with_projections(tmp_path, sd):
    """As later versions name them: layers.{i}.attention.q_proj, mlp.fc1."""
    state = hugging_face(sd, "")
    for theirs, later in (("encoder.layer.", "layers."), ("attention.output.dense", "attention.o_proj"),
                          ("attention.attention.query", "attention.q_proj"), ("intermediate.dense", "mlp.fc1"),
                          ("attention.attention.key", "attention.k_proj"), ("output.dense", "mlp.fc2"),
                          ("attention.attention.value", "attention.v_proj")):
        state = {name.replace(theirs, later): tensor for name, tensor in state.items()}
    assert "layers.3.attention.q_proj.bias" in state and "layers.3.mlp.fc2.weight" in state
    assert assert_is(saved(tmp_path, state), sd).kind == "Hugging Face ViT"


@pytest.mark.parametrize("older", [False, True])  # its published files have mlp.linear_1 and mlp.linear_2
def test_torchvision(tmp_path, older):
    network = torchvision.models.VisionTransformer(48, 16, 12, 3, 192, 768, num_classes=5)
    source = set_weights(network, 0).eval()
    state = source.state_dict()
    if older:
        state = {name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): tensor
                 for name, tensor in state.items()}
    model = load_backbone(saved(tmp_path, state))
    tokens = torch.cat([source.class_token, source._process_input(IMAGE)], 1)
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGE), source.encoder(tokens)[:, 1:], rtol=1e-5, atol=1e-5)


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
    ("Hugging Face BEiT", lambda sd: without(hugging_face(sd, "beit."), *(
        f"beit.encoder.layer.{i}.attention.attention.key.bias" for i in range(12)))
     | layer_scale("beit.encoder.layer.{i}.lambda_{j}"), ["LayerScale", "q and v biases without one for k"]),
    ("OpenCLIP", lambda sd: {"visual.conv1.weight": sd["patch_embed.proj.weight"], "visual.class_embedding":
                             torch.zeros(192), "visual.positional_embedding": torch.zeros(10, 192),
                             "visual.ln_pre.weight": torch.ones(192), "logit_scale": torch.ones(())},
     ["a norm before the blocks"]),
    ("Hugging Face CLIP", lambda sd: {
        "vision_model.embeddings.patch_embedding.weight": sd["patch_embed.proj.weight"],
        "vision_model.embeddings.position_embedding.weight": torch.zeros(10, 192),
        "vision_model.pre_layrnorm.weight": torch.ones(192)},
     ["a norm before the blocks", "the embeddings of CLIP or SigLIP"]),
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


def test_position_embedding_of_rows_and_columns(tmp_path, other):
    state = without(other, "cls_token") | {"pos_embed": torch.zeros(1, 3, 3, 192)}
    with pytest.raises(CheckpointError, match=r"rows and columns, \[1, 3, 3, 192\], as in SAM .* load it with timm$"):
        read_backbone(saved(tmp_path, under("image_encoder.", state)))


def test_missing_and_unexpected_keys_under_a_prefix(tmp_path, other):
    state = under("visual.trunk.", without(other, "blocks.3.norm1.bias") | {"blocks.0.extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"missing \(1\): blocks.3.norm1.bias; unexpected \(1\): blocks.0.extra"):
        read_backbone(saved(tmp_path, state))


def test_names_with_escape_codes(tmp_path, sd):
    torch.save({"state_dict": under("model.", sd) | {"\x1b[2J\nhead": torch.zeros(1)}}, tmp_path / "\x1b[31mred.pth")
    info = str(read_backbone(tmp_path / "\x1b[31mred.pth")[1])
    assert info.isprintable() and "/?[31mred.pth" in info and "ignored ?[2J?head" in info
    torch.save(sd | {"\x1b[2J": torch.zeros(1)}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=r"unexpected \(1\): \?\[2J$"):
        read_backbone(tmp_path / "file.pth")


def test_page_is_what_the_command_prints(capsys):
    runpy.run_module("docs.checkpoints_page", run_name="__main__")
    assert capsys.readouterr().out == (ROOT / "docs" / "CHECKPOINTS.md").read_text(encoding="utf-8")
