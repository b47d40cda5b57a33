"""Any Vision Transformer of timm through the interface of ours: timm's own features, keys, sizes and weights."""
import pytest
import timm
import torch
from davis_folder import make_davis, run
from golden_rules import set_weights
from PIL import Image

import visualize
from selfpatch.checkpoints import backbones
from selfpatch.checkpoints.loading import load_backbone
from selfpatch.errors import ConfigError
from selfpatch.method.vision_transformer import VisionTransformer, vit_tiny
from selfpatch.video.davis import read_mask

NETWORKS = {
    "vit_tiny_patch16_224": {},
    "deit3_small_patch16_224": {},
    "vit_small_patch14_dinov2": {},
    "vit_small_patch14_reg4_dinov2": {},
    "vit_small_patch16_dinov3": {},
    "vit_small_patch16_dinov3_qkvb": {},
    "eva02_tiny_patch14_224": {},
    "eva02_base_patch16_clip_224": {"embed_dim": 96, "num_heads": 3},
    "vit_giant_patch14_dinov2": {"embed_dim": 96, "num_heads": 3},
    "vit_medium_patch16_gap_256": {},
    "vit_base_patch16_rope_reg1_gap_256": {"embed_dim": 96, "num_heads": 3},
}


def network(name, **kwargs):
    """Untrained, two blocks, every parameter drawn so that none is 0 or 1: LayerScale and biases take part."""
    if "dinov3" in name and not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no DINOv3")
    model = load_backbone("", arch=f"timm:{name}", random_weights=True, depth=2, **NETWORKS[name], **kwargs)
    set_weights(model.network, 0)
    return model


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_features_are_timms_own(name):
    model = network(name)
    p = model.patch_size
    x = torch.randn(2, 3, 4 * p, 6 * p)
    expected = model.network.forward_features(x)
    ours = model.features(x)
    assert model.grid_size(x) == (4, 6) and ours.patches.shape == (2, 24, model.embed_dim)
    torch.testing.assert_close(ours.patches, expected[:, -24:], rtol=1e-5, atol=1e-5)
    if model.network.cls_token is None:
        assert ours.class_token is None
    else:
        torch.testing.assert_close(ours.class_token, expected[:, 0], rtol=1e-5, atol=1e-5)
    assert torch.equal(model(x), ours.patches)
    torch.testing.assert_close(model.network.norm(model.get_intermediate_layers(x, 2)[1]), ours.patches)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_keys_are_what_attention_compares(name, monkeypatch):
    """Queries and keys, after rotation, are those that scaled_dot_product_attention gets."""
    model, seen = network(name), []
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                        lambda q, k, *args, **kwargs: seen.append((q, k)) or attention(q, k, *args, **kwargs))
    x = torch.randn(1, 3, 4 * model.patch_size, 6 * model.patch_size)
    q, k = model.queries_and_keys(x)
    assert len(seen) == 2
    torch.testing.assert_close(q, seen[-1][0])
    torch.testing.assert_close(k, seen[-1][1])
    keys = model.features(x, keys=True).keys
    assert keys.shape == (1, 24, model.embed_dim)
    same = k[:, :, model.num_prefix_tokens:].transpose(1, 2).flatten(2)
    rotary = getattr(model.network, "rope", None) is not None
    if rotary:  # rotation keeps lengths
        assert not torch.allclose(keys, same)
        torch.testing.assert_close(keys.norm(dim=-1), same.norm(dim=-1), rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close(keys, same)


@torch.no_grad()
def test_sizes_are_rounded_to_whole_patches_and_layers_come_in_any_order():
    model = network("vit_small_patch14_reg4_dinov2")
    x = torch.randn(1, 3, 60, 75)
    torch.testing.assert_close(model(x), model(x[..., :56, :70]))
    last, first = model.intermediate_features(x, [-1, 0], keys=True)
    assert torch.equal(last.patches, model(x)) and torch.equal(first.keys, model.features(x, 0, keys=True).keys)
    assert model.num_prefix_tokens == 5 and not model.blocks[0].attn._forward_pre_hooks
    with pytest.raises(IndexError):
        model.features(x, 2)


@torch.no_grad()
def test_ours_in_timm_is_the_same():
    """A plain ViT of 224 pixels, one set of weights in both."""
    ours = set_weights(vit_tiny(class_token=True, final_norm=True), 0).eval()
    theirs = load_backbone("", arch="timm:vit_tiny_patch16_224", random_weights=True)
    theirs.network.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, 224, 224)
    for one, other in zip(ours.features(x, -2, keys=True), theirs.features(x, -2, keys=True), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    for one, other in zip(ours.queries_and_keys(x), theirs.queries_and_keys(x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrap", [dict, lambda state: {"model": state},
                                  lambda state: {"teacher": {f"module.backbone.{k}": v for k, v in state.items()},
                                                 "student": {f"module.backbone.{k}": -v for k, v in state.items()}}])
@torch.no_grad()
def test_weights_from_a_file(wrap, tmp_path, capsys):
    """Of another grid and with a classifier, as timm publishes them."""
    source = timm.create_model("vit_tiny_patch16_224", num_classes=5, depth=2, img_size=64)
    set_weights(source, 1).eval()
    torch.save(wrap(source.state_dict()), tmp_path / "weights.pth")
    model = load_backbone(tmp_path / "weights.pth", arch="timm:vit_tiny_patch16_224", depth=2)
    line = capsys.readouterr().out
    assert line.startswith("loaded ") and "ignored head" in line and line.count("\n") == 1
    for name, tensor in source.state_dict().items():
        if name not in ("pos_embed", "head.weight", "head.bias"):
            assert torch.equal(model.network.state_dict()[name], tensor)
    assert model.network.pos_embed.shape == (1, 197, 192)  # interpolated by timm


def test_weights_in_the_original_names(tmp_path):
    """DINOv2's published files: a mask token, registers under their first name, positions without the registers'."""
    source = network("vit_small_patch14_reg4_dinov2", img_size=56)
    state = dict(source.network.state_dict())
    state["register_tokens"] = state.pop("reg_token")
    state["mask_token"] = torch.zeros(1, 384)
    state["pos_embed"] = torch.cat([torch.zeros(1, 1, 384), state["pos_embed"]], dim=1)
    cls = state["cls_token"].clone()
    torch.save(state, tmp_path / "dinov2.pth")
    model = load_backbone(tmp_path / "dinov2.pth", arch="timm:vit_small_patch14_reg4_dinov2", depth=2, img_size=56)
    x = torch.randn(1, 3, 56, 70)
    torch.testing.assert_close(model(x), source(x))
    assert torch.equal(model.network.cls_token, cls)


@pytest.mark.parametrize("arch, options, says", [
    ("timm:vit_tiny_patch16_22", {"random_weights": True}, "no such network; near it are vit_tiny_patch16_224"),
    ("timm:resnet18", {"random_weights": True}, "resnet18 is not a plain Vision Transformer"),
    ("timm:swin_tiny_patch4_window7_224", {"random_weights": True}, "not a plain Vision Transformer"),
    ("timm:vit_tiny_patch16_224.nonsense", {"random_weights": True}, "Invalid pretrained tag"),
    ("timm:vit_tiny_patch16_224", {}, "--pretrained_weights is empty"),
    ("timm:vit_tiny_patch16_224", {"random_weights": True, "patch_size": 8}, "--patch_size 8 contradicts"),
    ("timm:vit_small_patch14_dinov2", {"weights": "own.pth"}, "patches of 8×8, the network of --arch of 14×14"),
    ("timm:vit_tiny_patch16_224", {"weights": "deep.pth"}, "does not fit timm:vit_tiny_patch16_224: missing"),
    ("timm:vit_tiny_patch16_224", {"weights": "other.pth"}, "holds no Vision Transformer: no patch_embed"),
    ("timm:vit_tiny_patch16_224", {"weights": "none.pth"}, "No such file"),
])
def test_what_does_not_fit_is_one_line(arch, options, says, tmp_path):
    torch.save(VisionTransformer(32, 8, embed_dim=24, depth=1, num_heads=3).state_dict(), tmp_path / "own.pth")
    torch.save(timm.create_model("vit_tiny_patch16_224", depth=3).state_dict(), tmp_path / "deep.pth")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    options = dict(options)
    weights = options.pop("weights", "")
    with pytest.raises(ConfigError) as error:
        load_backbone(tmp_path / weights if weights else "", arch=arch, **options)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_what_jobs_ask():
    model = network("eva02_base_patch16_clip_224")
    assert backbones.image_statistics(model)[0] != backbones.image_statistics(vit_tiny())[0]
    assert backbones.image_statistics(network("vit_small_patch14_dinov2")) == backbones.image_statistics(vit_tiny())
    backbones.check_layer(model, -2)
    with pytest.raises(ConfigError, match="--layer 2: the network has 2 blocks, so give -2 to 1"):
        backbones.check_layer(model, 2)


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def test_davis_runs_on_any_backbone(name, tmp_path, monkeypatch):
    """480 pixels are no whole number of patches of 14."""
    small_timm(monkeypatch)
    torch.save(network(name).network.state_dict(), tmp_path / "weights.pth")
    data = make_davis(tmp_path / "davis", "square", frames=3)
    assert run(data, tmp_path / "masks", "--arch", f"timm:{name}", "--pretrained_weights", tmp_path / "weights.pth",
               "--layer", 0) == 0
    masks = [read_mask(path)[0] for path in sorted((tmp_path / "masks" / "square").glob("*.png"))]
    assert len(masks) == 3 and set(masks[-1].flatten().tolist()) == {0, 1, 2}


@pytest.mark.parametrize("words", [["attention"], ["attention", "--patch", "1,2"], ["positives", "--layer", "0"]])
def test_pictures_of_any_backbone(words, tmp_path, monkeypatch):
    small_timm(monkeypatch)
    Image.new("RGB", (90, 60), "red").save(tmp_path / "photo.png")
    output = tmp_path / "drawn.png"
    args = visualize.get_args_parser().parse_args(
        [*words, "--arch", "timm:vit_small_patch14_reg4_dinov2", "--random_weights", "--image_size", "56",
         "--image_path", str(tmp_path / "photo.png"), "--output", str(output)])
    visualize.main(args)
    assert output.is_file()


def test_what_has_no_class_token_needs_a_patch(tmp_path, monkeypatch):
    small_timm(monkeypatch)
    Image.new("RGB", (90, 60), "red").save(tmp_path / "photo.png")
    args = visualize.get_args_parser().parse_args(
        ["attention", "--arch", "timm:vit_medium_patch16_gap_256", "--random_weights", "--image_size", "64",
         "--image_path", str(tmp_path / "photo.png"), "--output", str(tmp_path / "drawn.png")])
    with pytest.raises(ConfigError, match="has no class token: give --patch"):
        visualize.main(args)


def small_timm(monkeypatch):
    """Jobs get networks of two blocks."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: create(name, **{"depth": 2} | kwargs))
