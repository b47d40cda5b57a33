"""Backbone and projection head: the published figures, and what must hold for any size."""
import pytest
import torch
from golden_rules import assert_close, load, rand, set_weights

from selfpatch.method.vision_transformer import DINOHead, VisionTransformer, vit_base, vit_small, vit_tiny


@pytest.mark.parametrize("key, height, width", [
    ("s224", 224, 224), ("s96", 96, 96), ("s96x160", 96, 160), ("s160x96", 160, 96), ("s480x832", 480, 832)])
@torch.no_grad()
def test_golden_backbone(key, height, width):
    golden = load("backbone.npz")
    model = set_weights(vit_tiny(), golden["salt"]).eval()
    features = model(rand(height * 10000 + width, 1, 3, height, width, salt=golden["salt"]))
    assert_close(features[:, ::13] if key == "s480x832" else features, golden[key])


@torch.no_grad()
def test_golden_backbone_layers():
    golden = load("backbone.npz")
    model = set_weights(vit_tiny(), golden["salt"]).eval()
    layers = model.get_intermediate_layers(rand(960160, 1, 3, 96, 160, salt=golden["salt"]), 3)
    assert_close(torch.stack(layers), golden["layers_s96x160_n3"])


@torch.no_grad()
def test_golden_backbone_patch8():
    golden = load("backbone_patch8.npz")
    model = set_weights(vit_tiny(patch_size=8), golden["salt"]).eval()
    assert_close(model(rand(64, 1, 3, 64, 64, salt=golden["salt"])), golden["s64"])


@pytest.mark.parametrize("key, options", [("plain", {}), ("nlayers1", {"nlayers": 1})])
@torch.no_grad()
def test_golden_dino_head(key, options):
    golden = load("dino_head.npz")
    head = set_weights(DINOHead(192, 512, **options), golden["salt"]).eval()
    assert_close(head(rand(3, 2, 5, 192, salt=golden["salt"])), golden[key])


@torch.no_grad()
def test_golden_dino_head_batchnorm():
    golden = load("dino_head.npz")
    head = set_weights(DINOHead(192, 512, use_bn=True), golden["salt"]).train()
    x = rand(3, 2, 5, 192, salt=golden["salt"])
    assert_close(head(x.reshape(10, 192)), golden["use_bn_train"])
    assert_close(head(x), golden["use_bn_train"].reshape(2, 5, 512))  # tokens are counted alike, in whatever shape


@pytest.mark.parametrize("make, width, heads", [(vit_tiny, 192, 3), (vit_small, 384, 6), (vit_base, 768, 12)])
def test_state_dict_keys_and_shapes(make, width, heads):
    model = make()
    expected = {"pos_embed": (1, 196, width), "patch_embed.proj.weight": (width, 3, 16, 16),
                "patch_embed.proj.bias": (width,)}
    for i in range(12):
        for name, shape in {"norm1": (width,), "norm2": (width,), "attn.qkv": (3 * width, width),
                            "attn.proj": (width, width), "mlp.fc1": (4 * width, width),
                            "mlp.fc2": (width, 4 * width)}.items():
            expected[f"blocks.{i}.{name}.weight"] = shape
            expected[f"blocks.{i}.{name}.bias"] = shape[:1]
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == expected
    assert model.blocks[0].attn.num_heads == heads


def test_initialisation():
    torch.manual_seed(0)
    model = vit_tiny()
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    for name, p in model.named_parameters():
        if "norm" in name:
            assert (p == float(name.endswith("weight"))).all()
        elif name.startswith("blocks"):
            assert (p == 0).all() if name.endswith("bias") else abs(p.std().item() - 0.02) < 0.001, name
    head = DINOHead(192, 512, norm_last_layer=False)
    assert (head.last_layer.weight_g == 1).all() and head.last_layer.weight_g.requires_grad
    assert head.last_layer.weight_v.abs().max() <= 256 ** -0.5  # torch.nn.Linear's own uniform bound
    assert not DINOHead(192, 512).last_layer.weight_g.requires_grad


def test_trainable_gain_scales_logits():
    head = DINOHead(8, 5, norm_last_layer=False, hidden_dim=16, bottleneck_dim=4)
    x = torch.randn(3, 8)
    before = head(x)
    before.sum().backward()
    assert head.last_layer.weight_g.grad is not None
    with torch.no_grad():
        head.last_layer.weight_g[2] = 3
    torch.testing.assert_close(head(x)[:, 2], 3 * before[:, 2])
    assert before.abs().max() <= 1 + 1e-6  # cosines


@torch.no_grad()
def test_class_token_takes_part_and_is_dropped():
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, embed_dim=24, depth=2, num_heads=3, class_token=True, final_norm=True).eval()
    x = torch.randn(2, 3, 32, 48)
    features = model(x)
    assert features.shape == (2, 24, 24)
    assert model.pos_embed.shape == (1, 17, 24)
    raw = model.get_intermediate_layers(x, 1)[0]
    torch.testing.assert_close(model.norm(raw), features)
    model.cls_token.normal_()
    assert not torch.allclose(model(x), features)


@torch.no_grad()
def test_intermediate_layers_by_index():
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, embed_dim=24, depth=4, num_heads=3).eval()
    x = torch.randn(2, 3, 32, 32)
    last3 = model.get_intermediate_layers(x, 3)
    for ours, same in zip(model.get_intermediate_layers(x, [1, 3]), (last3[0], last3[2]), strict=True):
        assert torch.equal(ours, same)
    assert torch.equal(last3[-1], model(x))


@pytest.mark.parametrize("class_token, final_norm", [(False, False), (True, True)])
@torch.no_grad()
def test_features_of_every_block(class_token, final_norm):
    """The patches of get_intermediate_layers after the final norm; the last block's are the output."""
    model = set_weights(VisionTransformer(32, 8, embed_dim=24, depth=3, num_heads=3, class_token=class_token,
                                          final_norm=final_norm), 0).eval()
    x = torch.randn(2, 3, 32, 48)
    assert torch.equal(model.features(x).patches, model(x))
    for layer, patches in enumerate(model.get_intermediate_layers(x, 3)):
        ours = model.features(x, layer)
        torch.testing.assert_close(ours.patches, model.norm(patches))
        assert ours.keys is None and torch.equal(ours.patches, model.features(x, layer - 3).patches)
        assert ours.class_token.shape == (2, 24) if class_token else ours.class_token is None
    for one, same in zip(model.intermediate_features(x, [-1, 0]), (model.features(x), model.features(x, 0)),
                         strict=True):
        assert torch.equal(one.patches, same.patches)
    with pytest.raises(IndexError):
        model.features(x, 3)


@pytest.mark.parametrize("class_token", [False, True])
@torch.no_grad()
def test_keys_are_those_that_attention_compares(class_token):
    model = set_weights(VisionTransformer(32, 8, embed_dim=24, depth=2, num_heads=3, class_token=class_token), 0).eval()
    x, seen = torch.randn(2, 3, 32, 48), []
    model.blocks[1].attn.qkv.register_forward_hook(lambda _, inputs, output: seen.append(output))
    keys = model.features(x, keys=True).keys
    assert keys.shape == (2, 24, 24)
    expected = seen[-1].reshape(2, -1, 3, 3, 8)[:, :, 1]  # [B, N, query key value, heads, D / heads] as in timm
    torch.testing.assert_close(keys, expected[:, int(class_token):].flatten(2))
    torch.testing.assert_close(model.queries_and_keys(x)[1], expected.transpose(1, 2))


@torch.no_grad()
def test_batched_equals_single():
    torch.manual_seed(0)
    model = vit_tiny().eval()
    x = torch.randn(2, 3, 50, 70)  # what is left over at the right and bottom is not looked at
    both = model(x)
    assert both.shape == (2, 3 * 4, 192)
    torch.testing.assert_close(torch.cat([model(x[:1]), model(x[1:, :, :48, :64])]), both, rtol=1e-4, atol=1e-5)


def test_stochastic_depth_rises_and_drops_whole_samples():
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, embed_dim=24, depth=3, num_heads=3, drop_path_rate=0.5).train()
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0, 0.25, 0.5])
    block, x = model.blocks[2], torch.randn(400, 4, 24)
    change = (block(x) - x).flatten(1).norm(dim=1)
    assert (change == 0).float().mean().item() == pytest.approx(0.25, abs=0.08)  # both branches dropped: 0.5²
    model.eval()
    assert torch.equal(model(torch.ones(1, 3, 32, 32)), model(torch.ones(1, 3, 32, 32)))


def test_what_stochastic_depth_drops_is_not_computed():
    """The same draws, outputs and gradients as timm's blocks, which compute it and multiply by 0."""
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, embed_dim=24, depth=3, num_heads=3, drop_path_rate=0.6)
    x, seen = torch.randn(6, 3, 32, 32), []
    model.blocks[2].mlp.fc1.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))

    def plain(images):
        tokens = model.prepare_tokens(images)
        for block in model.blocks:
            tokens = block(tokens)
        return tokens

    results = []
    for forward in (model, plain):
        torch.manual_seed(1)
        out = forward(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert seen[0] < seen[1] == 6
