"""Positive matching and aggregation: the published figures, other grids, and the wrapper's layout."""
import pytest
import torch
from golden_rules import assert_close, load, rand, set_weights
from networks import small_wrapper

from selfpatch.method.selfpatch_head import (
    ClassAttentionBlock,
    MultiCropWrapper,
    SelfPatchHead,
    gather_patches,
    positive_matching,
)
from selfpatch.method.vision_transformer import DINOHead, vit_tiny


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize("key, n, k", [
    ("loc_k1_n196", 196, 1), ("loc_k4_n196", 196, 4), ("loc_k8_n196", 196, 8), ("loc_k1_n36", 36, 1),
    ("loc_k4_n36", 36, 4), ("loc_k8_n36", 36, 8), ("noloc_n196", 196, 4), ("noloc_n36", 36, 4)])
@torch.no_grad()
def test_golden_selfpatch_head(key, n, k, fast):
    golden = load("selfpatch_head.npz")
    head = set_weights(SelfPatchHead(192, 3, k), golden["salt"]).eval()
    head.fast = fast
    x = rand(n, 2, n, 192, salt=golden["salt"])
    out = head(x) if key.startswith("noloc") else head.targets(x)
    assert_close(out[:, ::3] if n == 196 else out, golden[key])


@pytest.mark.parametrize("n, side", [(196, 14), (36, 6)])
def test_golden_selfpatch_head_neighbours(n, side):
    golden = load("selfpatch_head.npz")
    ours = positive_matching(torch.randn(1, n, 8), (side, side), 8).sort(-1).values
    assert torch.equal(ours[0], torch.from_numpy(golden[f"neighbours_{n}"]))


def plain_positives(x, grid, k):
    """The definition, patch by patch."""
    rows, columns = grid
    x = torch.nn.functional.normalize(x, dim=-1).unflatten(1, grid)
    picks = []
    for r in range(rows):
        for c in range(columns):
            around = [((r + dy) % rows, (c + dx) % columns)
                      for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]
            cosine = torch.stack([(x[:, r, c] * x[:, rr, cc]).sum(-1) for rr, cc in around], -1)
            index = torch.tensor([rr * columns + cc for rr, cc in around])
            picks.append(index[cosine.topk(k).indices])
    return torch.stack(picks, 1)


@pytest.mark.parametrize("grid", [(7, 7), (5, 9), (9, 5), (3, 3), (3, 8)])
def test_positive_matching_on_any_grid(grid):
    torch.manual_seed(0)
    x = torch.randn(2, grid[0] * grid[1], 16)
    for k in (1, 4, 8):
        assert torch.equal(positive_matching(x, grid, k), plain_positives(x, grid, k))


@torch.no_grad()
def test_aggregation_is_class_attention_over_the_positives_alone():
    """A patch's target is row 0 of the head run on nothing but that patch's positives."""
    torch.manual_seed(0)
    head, grid = SelfPatchHead(24, 3, 4).eval(), (5, 9)
    x = torch.randn(2, 45, 24)
    targets = head.targets(x, grid)
    positives = positive_matching(x, grid, 4)
    for patch in (0, 8, 22, 44):
        own = torch.stack([x[b, positives[b, patch]] for b in range(2)])
        torch.testing.assert_close(targets[:, 1 + patch], head(own)[:, 0])
    torch.testing.assert_close(targets[:, 0], head(x)[:, 0])


def test_fast_and_plain_forms_are_the_same(monkeypatch):
    """Outputs, and gradients of the input and of every parameter, of the student's and of the teacher's call."""
    torch.manual_seed(0)
    head, x = set_weights(SelfPatchHead(24, 3, 4), salt=0), torch.randn(2, 45, 24, requires_grad=True)
    for call in (head, lambda x: head.targets(x, (5, 9)), head.image_token):
        outputs, gradients = [], []
        for head.fast in (True, False):
            other = ("summarise", "aggregate") if head.fast else ("summarise_absorbed", "aggregate_projected")
            with monkeypatch.context() as patch:
                for name in other:
                    patch.setattr(head, name, lambda *_, name=name: pytest.fail(f"used {name}"))
                outputs.append(call(x))
            leaves = [x, *head.parameters()]
            gradients.append(torch.autograd.grad(outputs[-1].square().mean(), leaves, allow_unused=True))
        torch.testing.assert_close(*outputs)
        for fast, plain in zip(*gradients, strict=True):
            torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-6)


def test_a_changed_aggregation_is_used():
    class MeanAggregation:
        def aggregate(self, x, positives):
            return gather_patches(x, positives).mean(1).unflatten(0, positives.shape[:2])

    class Mean(MeanAggregation, SelfPatchHead):
        pass

    head, x = Mean(24, 3, 4), torch.randn(2, 45, 24)
    expected = head.norm(head.aggregate(x, positive_matching(x, (5, 9), 4)))
    torch.testing.assert_close(head.targets(x, (5, 9))[:, 1:], expected)
    assert not head.is_fast


def test_another_block_and_another_class_token_are_used():
    class Halved(ClassAttentionBlock):
        def forward(self, c, x):
            return super().forward(c, x) / 2

    class First(SelfPatchHead):
        def class_token(self, x):
            return x[:, 0]

    x, head = torch.randn(2, 45, 24), SelfPatchHead(24, 3)
    assert head.is_fast
    head.cls_blocks[1].__class__ = Halved
    assert not head.is_fast and torch.equal(head.class_token(x), head.summarise(x))
    first = First(24, 3)
    torch.testing.assert_close(first.targets(x, (5, 9))[:, 0], first.norm(x[:, 0]))


def test_on_the_meta_device():
    assert SelfPatchHead(24, 3).to("meta").targets(torch.randn(2, 45, 24, device="meta"), (5, 9)).shape == (2, 46, 24)


@torch.no_grad()
def test_matching_stays_in_float32_under_autocast():
    torch.manual_seed(0)
    x = torch.ones(1, 36, 64) + 1e-3 * torch.randn(1, 36, 64)  # alike to bfloat16, not to float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(positive_matching(x, (6, 6), 4), plain_positives(x, (6, 6), 4))


@pytest.mark.parametrize("k", [0, 9])
def test_k_num_out_of_range(k):
    with pytest.raises(ValueError, match="1 to 8"):
        SelfPatchHead(24, 3, k)


@pytest.mark.parametrize("n, grid", [(16, (2, 8)), (16, (4, 3)), (4, None), (15, None)])
def test_grid_too_small_or_wrong(n, grid):
    with pytest.raises(ValueError, match="grid"):
        SelfPatchHead(24, 3).targets(torch.randn(1, n, 24), grid)


def dense(output):
    image, patches = output
    return image.dense(), [p.dense() for p in patches]


def test_wrapper_state_dict():
    wrapper = MultiCropWrapper(vit_tiny(), SelfPatchHead(192, 3), DINOHead(192, 32), DINOHead(192, 16))
    expected = {f"backbone.{k}": tuple(v.shape) for k, v in vit_tiny().state_dict().items()}
    expected["ca_head.cls_token"] = (1, 1, 192)
    linears = {f"ca_head.cls_blocks.{i}.{name}": shape for i in (0, 1) for name, shape in {
        "norm1": (192,), "norm2": (192,), "attn.q": (192, 192), "attn.k": (192, 192), "attn.v": (192, 192),
        "attn.proj": (192, 192), "mlp.fc1": (768, 192), "mlp.fc2": (192, 768)}.items()}
    linears["ca_head.norm"] = (192,)
    for head, out in (("c_head", 32), ("p_head", 16)):
        linears |= {f"{head}.mlp.0": (2048, 192), f"{head}.mlp.2": (2048, 2048), f"{head}.mlp.4": (256, 2048)}
        expected |= {f"{head}.last_layer.weight_g": (out, 1), f"{head}.last_layer.weight_v": (out, 256)}
    for name, shape in linears.items():
        expected |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    assert {k: tuple(v.shape) for k, v in wrapper.state_dict().items()} == expected


@pytest.mark.parametrize("call", [MultiCropWrapper.forward, MultiCropWrapper.targets], ids=["student", "teacher"])
@torch.no_grad()
def test_wrapper_batches_each_resolution(call):
    torch.manual_seed(0)
    wrapper = small_wrapper().eval()
    crops = [torch.randn(2, 3, s, w) for s, w in ((32, 32), (32, 32), (24, 40), (24, 40), (24, 40))]
    sizes = []
    wrapper.backbone.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape)))
    image, patches = dense(call(wrapper, crops))
    assert sizes == [(4, 3, 32, 32), (6, 3, 24, 40)]
    assert image.shape == (10, 12) and [tuple(p.shape) for p in patches] == [(4, 16, 10), (6, 15, 10)]
    for view, crop in enumerate(crops):
        one_image, one_patches = dense(call(wrapper, [crop]))
        torch.testing.assert_close(image[2 * view:2 * view + 2], one_image)
        part = patches[0][2 * view:2 * view + 2] if view < 2 else patches[1][2 * view - 4:2 * view - 2]
        torch.testing.assert_close(part, one_patches[0])


def test_wrapper_without_patches_does_no_patch_work(monkeypatch):
    """DINO's teacher sees the two global crops only."""
    wrapper, full = small_wrapper(use_patches=False), small_wrapper()
    full.load_state_dict(wrapper.state_dict())
    crops = [torch.randn(2, 3, 32, 32)] * 2 + [torch.randn(2, 3, 24, 24)]
    expected = full(crops).image.dense()
    monkeypatch.setattr("selfpatch.method.selfpatch_head.positive_matching", lambda *_: pytest.fail("matched patches"))
    monkeypatch.setattr(wrapper.p_head, "factors", lambda _: pytest.fail("ran the patch head"))
    normalised = []
    wrapper.ca_head.norm.register_forward_pre_hook(lambda _, inputs: normalised.append(tuple(inputs[0].shape)))
    for call, views in ((wrapper, 3), (wrapper.targets, 2)):
        image, patches = call(crops)
        assert patches == []
        torch.testing.assert_close(image.dense(), expected[:2 * views])
    assert normalised == [(4, 1, 24), (2, 1, 24), (4, 1, 24)]


def test_batchnorm_counts_all_tokens_of_a_forward():
    torch.manual_seed(0)
    wrapper = small_wrapper(use_bn=True).train()
    seen = []
    wrapper.p_head.mlp[1].register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    image, patches = wrapper([torch.randn(2, 3, 32, 32)] * 2 + [torch.randn(2, 3, 24, 24)] * 3)
    assert seen == [(4 * 16 + 6 * 9, 16)]
    image, patches = dense((image, patches))
    (image.square().mean() + sum(p.square().mean() for p in patches)).backward()
    assert all(p.grad is not None for p in wrapper.parameters() if p.requires_grad)
