"""One pass over the crops of all sizes, against the plain form: a pass for each size."""
import pytest
import torch
from functorch.compile import make_boxed_func
from golden_rules import assert_close, load, rand, set_weights
from networks import small_wrapper
from torch._dynamo.backends.common import aot_autograd

from selfpatch.errors import ConfigError
from selfpatch.method.optim import scale_together
from selfpatch.method.packed_crops import (
    CastTogether,
    Layout,
    branch_scales,
    packed_block,
    packed_class_tokens,
    packed_features,
    packed_positives,
    packed_targets,
)
from selfpatch.method.selfpatch_head import PackedMultiCropWrapper, SelfPatchHead, positive_matching
from selfpatch.method.vision_transformer import RECOMPUTED

DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]


def pair(use_patches=True, device="cpu", drop_path_rate=0.0):
    """The plain wrapper and the packed one, with the same weights."""
    plain = small_wrapper(use_patches=use_patches, drop_path_rate=drop_path_rate)
    packed = PackedMultiCropWrapper(plain.backbone, plain.ca_head, plain.c_head, plain.p_head, use_patches)
    return plain.to(device), packed.to(device)


def make_crops(device="cpu"):
    return [torch.randn(3, 3, *size, device=device) for size in [(40, 32)] * 2 + [(24, 32)] * 3]


def dense(logits):
    return [logits.image.dense(), *[part.dense() for part in logits.patches]]


def gradients(network, crops, method):
    network.zero_grad()
    sum((i + 1) * out.float().pow(3).sum() for i, out in enumerate(dense(getattr(network, method)(crops)))).backward()
    return [p.grad for p in network.parameters() if p.requires_grad]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("use_patches", [True, False], ids=["selfpatch", "dino"])
@pytest.mark.parametrize("method", ["forward", "targets"])
@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
def test_logits_and_gradients_are_those_of_a_pass_for_each_size(device, use_patches, method, dtype, rtol):
    plain, packed = pair(use_patches, device)
    crops = make_crops(device)
    with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours, expected = dense(getattr(packed, method)(crops)), dense(getattr(plain, method)(crops))
        assert len(ours) == len(expected) == 1 + 2 * use_patches
        for a, b in zip(ours, expected, strict=True):
            assert (a - b).norm() < rtol * b.norm()
        grads, expected = ([g.clone() for g in gradients(network, crops, method) if g is not None]
                           for network in (packed, plain))
    assert len(grads) == len(expected)
    largest = max(g.norm() for g in expected)
    for a, b in zip(grads, expected, strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() < rtol * max(b.norm(), 0.01 * largest)


@pytest.mark.parametrize("sizes, qkv_bias", [([(32, 32)] * 2, True), ([(32, 32)] * 2 + [(24, 24)], False)])
def test_crops_of_one_size_and_projections_without_bias(sizes, qkv_bias):
    plain, packed = pair()
    set_weights(plain, 0)  # large enough for attention to matter
    for block in plain.backbone.blocks if not qkv_bias else ():
        block.attn.qkv.bias = None
    crops = [torch.randn(3, 3, *size) for size in sizes]
    for a, b in zip(dense(packed(crops)), dense(plain(crops)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(dense(packed(crops)), dense(plain(crops)), strict=True):
            assert (a - b).norm() < 0.05 * b.norm()


def test_the_state_dict_is_the_same():
    plain, packed = pair()
    assert packed.state_dict().keys() == plain.state_dict().keys()


def test_recomputed_activations_give_the_same_gradients():
    _, packed = pair(drop_path_rate=0.5)
    crops, grads, calls, counts = make_crops(), [], [], []
    packed.backbone.blocks[1].mlp.act.register_forward_hook(lambda *_: calls.append(1))
    for packed.backbone.checkpoint_activations in ("", *RECOMPUTED):
        torch.manual_seed(0)
        calls.clear()
        grads.append([g.clone() for g in gradients(packed, crops, "forward")])
        counts.append(len(calls))
    assert counts == [1, 2, 1, 2]  # nothing, block, attention, mlp
    for kept, *recomputed in zip(*grads, strict=True):
        assert all(torch.equal(kept, grad) for grad in recomputed)


class Mean(SelfPatchHead):
    def summarise(self, x):
        return x.mean(1)


class Shifted(SelfPatchHead):
    def targets(self, x, grid=None):
        return super().targets(x.roll(1, 1), grid)

    def forward(self, x):
        return super().forward(x.roll(1, 1))


@pytest.mark.parametrize("head_class", [Mean, Shifted])
def test_a_head_with_methods_of_its_own_is_used(head_class):
    plain, packed = pair()
    plain.ca_head.__class__ = head_class  # which is the packed wrapper's head as well
    crops = make_crops()
    for method in ("forward", "targets"):
        for a, b in zip(dense(getattr(packed, method)(crops)), dense(getattr(plain, method)(crops)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("n, side, k", [(196, 14, 1), (196, 14, 4), (196, 14, 8), (36, 6, 4)])
@torch.no_grad()
def test_golden_selfpatch_head(n, side, k):
    golden = load("selfpatch_head.npz")
    head = set_weights(SelfPatchHead(192, 3, k), golden["salt"]).eval()
    x, layout = rand(n, 2, n, 192, salt=golden["salt"]).flatten(0, 1), Layout([2], [(side, side)])
    parts = {f"loc_k{k}_n{n}": packed_targets(head, x, layout),
             f"noloc_n{n}": (head.norm(packed_class_tokens(head, x, layout)), head.norm(x))}
    for key, (c, patches) in parts.items():
        out = torch.cat([c[:, None], patches.unflatten(0, (2, n))], dim=1)
        if key != f"noloc_n{n}" or k == 4:
            assert_close(out[:, ::3] if n == 196 else out, golden[key])


def test_positives_are_rows_of_the_image_that_the_patch_is_in():
    tokens, layout = torch.randn(2 * 20 + 3 * 12, 8), Layout([2, 3], [(5, 4), (3, 4)])
    rows, start = packed_positives(tokens, layout, 4), 0
    for x, grid in zip(layout.split(tokens), layout.grids, strict=True):
        for image in x:
            expected = positive_matching(image[None], grid, 4)[0] + start
            assert torch.equal(rows[start:start + len(image)], expected)
            start += len(image)
    assert start == len(rows)


def test_stochastic_depth_drops_branches_of_whole_images_at_the_blocks_rates():
    _, packed = pair(drop_path_rate=0.4)
    x, layout = torch.randn(2000 * 5 + 3000 * 2, 24), Layout([2000, 3000], [(5, 1), (1, 2)])
    first, scales = branch_scales(packed.backbone, x, layout)
    assert first is None and scales.shape == (2, 16000, 1)
    assert scales.unique().tolist() == pytest.approx([0, 1 / 0.6])
    by_image = [part.unflatten(1, shape)[..., 0] for part, shape in
                zip(scales.split(layout.sizes, dim=1), layout.shapes, strict=True)]
    assert all((part == part[..., :1]).all() for part in by_image)
    kept = torch.cat([part[..., 0] for part in by_image], dim=1) > 0
    assert kept.float().mean(1).tolist() == pytest.approx([0.6, 0.6], abs=0.03)
    assert (kept[0] != kept[1]).any()
    assert branch_scales(packed.backbone.eval(), x, layout) == [None, None]


def test_blocks_whose_branches_are_dropped_change_nothing(monkeypatch):
    _, network = pair(drop_path_rate=0.4)
    batches = network.batches(make_crops())
    monkeypatch.setattr("selfpatch.method.packed_crops.branch_scales", lambda backbone, x, layout: [
        None, torch.zeros(2, len(x), 1)])
    ours, layout = packed_features(network.backbone, batches)
    del network.backbone.blocks[1]
    for features, images in zip(layout.split(ours), batches, strict=True):
        torch.testing.assert_close(features, network.backbone(images))


def test_grids_without_8_neighbours_are_refused():
    _, packed = pair()
    with pytest.raises(ConfigError, match="2×2 grid"):
        packed.targets([torch.randn(1, 3, 32, 32)] * 2 + [torch.randn(1, 3, 16, 16)])


def test_a_dropped_branch_leaves_an_image_as_it_was():
    block = small_wrapper().backbone.blocks[0]
    x, layout = torch.randn(2 * 6, 24), Layout([2], [(2, 3)])
    scales = torch.tensor([1.0, 0.0]).repeat_interleave(6)[None, :, None].expand(2, -1, -1)
    out = packed_block(block, x, layout, scales)
    torch.testing.assert_close(out[:6], block(x[None, :6])[0])
    assert torch.equal(out[6:], x[6:])


def test_casting_together_gives_gradients_in_the_dtype_of_each():
    tensors = [torch.randn(3, 2, requires_grad=True), torch.randn(4), torch.randn(5, requires_grad=True)]
    a, b, unused = CastTogether.apply(torch.bfloat16, *tensors)
    assert {a.dtype, b.dtype, unused.dtype} == {torch.bfloat16} and torch.equal(a, tensors[0].bfloat16())
    (2 * a).sum().backward()
    assert torch.equal(tensors[0].grad, torch.full((3, 2), 2.0)) and tensors[1].grad is tensors[2].grad is None


def test_scaling_together():
    tensors, factors = [torch.randn(3, 2), torch.randn(()), torch.randn(5)], torch.tensor([0.5, 1.0, 0.25])
    expected = [tensor * factor for tensor, factor in zip(tensors, factors, strict=True)]
    scale_together(tensors, factors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))


def test_compiled_code_casts_the_weights_of_a_block_by_one_launch():
    """And their gradients: a kernel for each would be 16."""
    casts = []

    def count(graph, _):
        casts.append(sum(node.target is torch.ops.selfpatch.cast_copies.default for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    (_, packed), crops = pair(), make_crops()
    block, (x, layout) = packed.backbone.blocks[0], packed.packed_features(crops)
    compiled = torch.compile(packed_block, backend=aot_autograd(fw_compiler=count), fullgraph=True)
    results = []
    for function in (packed_block, compiled):
        block.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            function(block, x.detach(), layout).sum().backward()
        results.append([p.grad for p in block.parameters()])
    assert casts == [1, 1]
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0.05, atol=0.05)
