"""Every supported format, built as its authors write it, loads with the features of its source network."""
import argparse
import re
import zipfile

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from golden_rules import set_weights
from torch import nn

from selfpatch.checkpoints.files import CheckpointError, read_checkpoint, write_checkpoint
from selfpatch.checkpoints.layouts import from_mmseg_names, to_mmseg_names
from selfpatch.checkpoints.loading import build_head, load_backbone, read_backbone
from selfpatch.method.selfpatch_head import MultiCropWrapper, SelfPatchHead
from selfpatch.method.vision_transformer import DINOHead, vit_base, vit_small, vit_tiny

HIDDEN_DIM, BOTTLENECK_DIM = 32, 16
IMAGES = torch.randn(1, 3, 48, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def ours():
    """A SelfPatch network; the MLPs of its projection heads are narrow so that the files are small."""
    heads = (DINOHead(192, out_dim, hidden_dim=HIDDEN_DIM, bottleneck_dim=BOTTLENECK_DIM) for out_dim in (24, 16))
    return set_weights(MultiCropWrapper(vit_tiny(), SelfPatchHead(192, 3, 2), *heads), 0).eval()


@pytest.fixture(scope="module")
def dino():
    head = DINOHead(192, 24, hidden_dim=HIDDEN_DIM, bottleneck_dim=BOTTLENECK_DIM)
    return set_weights(nn.ModuleDict({"backbone": vit_tiny(class_token=True, final_norm=True), "head": head}), 0).eval()


@torch.no_grad()
def assert_same_features(model, source):
    assert not model.training
    torch.testing.assert_close(model(IMAGES), source(IMAGES), rtol=1e-5, atol=1e-5)


def training_checkpoint(network: nn.Module, teacher: nn.Module | None = None) -> dict:
    """The layout of a training run in float16: the student wrapped by DDP, options as a Namespace."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    student = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    args = argparse.Namespace(arch="vit_tiny", patch_size=16, k_num=2, global_crops_scale=(0.25, 1.0), lr=5e-4)
    centers = {"center": torch.zeros(1, 1, 24), "patch_center": torch.zeros(1, 16)}
    return {"student": student, "teacher": (teacher or network).state_dict(), "optimizer": optimizer.state_dict(),
            "epoch": 200, "args": args, "dino_loss": centers,
            "fp16_scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 7}}


@pytest.mark.parametrize("core", [b"numpy._core.", b"numpy.core."])  # as NumPy 2 and NumPy 1 write it
def test_numpy_learning_rates_of_published_runs(tmp_path, ours, core):
    """The published loop sets each group's lr to an np.float64, which becomes part of the optimizer's state."""
    state = training_checkpoint(ours)
    state["optimizer"]["param_groups"][0]["lr"] = np.float64(2.5e-4)
    torch.save(state, tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as source, zipfile.ZipFile(tmp_path / "run.pth", "w") as target:
        for name in source.namelist():
            target.writestr(name, re.sub(rb"numpy\._?core\.", core, source.read(name))
                            if name.endswith("data.pkl") else source.read(name))
    assert read_checkpoint(tmp_path / "run.pth")["optimizer"]["param_groups"][0]["lr"] == 2.5e-4
    assert_same_features(load_backbone(tmp_path / "run.pth"), ours.backbone)


def test_selfpatch_run(tmp_path, ours, capsys):
    other = set_weights(vit_tiny(), 0).eval()
    teacher = MultiCropWrapper(other, *(nn.Identity() for _ in range(3)))
    torch.save(training_checkpoint(ours, teacher), tmp_path / "checkpoint.pth")
    assert_same_features(load_backbone(tmp_path / "checkpoint.pth", "student"), ours.backbone)
    assert capsys.readouterr().out == (
        f"loaded {tmp_path}/checkpoint.pth: SelfPatch run, key student, vit_tiny, patch size 16, 147 tensors, "
        "epoch 200, ignored c_head ca_head p_head\n")
    assert_same_features(load_backbone(tmp_path / "checkpoint.pth"), other)
    assert "key teacher" in capsys.readouterr().out
    assert_same_features(load_backbone(tmp_path), other)  # the run's folder


def test_selfpatch_head(tmp_path, ours):
    write_checkpoint(training_checkpoint(ours), tmp_path / "run.pth")
    state, info = read_backbone(tmp_path / "run.pth", "student")
    head = build_head(info)
    assert head.k_num == 2 and build_head(info, 5).k_num == 5
    assert not head.training
    assert_equal(head.state_dict(), ours.ca_head.state_dict())
    others = info.other_tensors
    others["ca_head.norm.bias"] = others.pop("ca_head.norm.weight")[:7]
    with pytest.raises(CheckpointError, match=r"missing \(1\): norm.weight; wrong shape.*norm.bias is \[7\], expected"):
        build_head(info)
    others.clear()
    with pytest.raises(CheckpointError, match="no ca_head"):
        build_head(info)


def test_args_as_a_dictionary(tmp_path, ours):
    checkpoint = training_checkpoint(ours)
    checkpoint["args"] = vars(checkpoint["args"])
    write_checkpoint(checkpoint, tmp_path / "run.pth")
    assert read_backbone(tmp_path / "run.pth")[1].k_num == 2


def bare(model, dtype=torch.float32):
    return {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("make, kind", [
    (lambda ours: bare(ours.backbone), "SelfPatch backbone"),
    (lambda ours: ours.state_dict(), "SelfPatch run"),
    (lambda ours: {"state_dict": bare(ours.backbone), "epoch": 12}, "SelfPatch backbone"),
    (lambda ours: {"model": {f"module.{k}": v for k, v in bare(ours.backbone).items()}}, "SelfPatch backbone"),
    (lambda ours: {f"_orig_mod.{k}": v for k, v in bare(ours.backbone).items()}, "SelfPatch backbone"),
    (lambda ours: {"classy_state_dict": {"base_model": {"model": {
        "trunk": bare(ours.backbone), "heads": {"0.clf.0.weight": torch.zeros(5, 192)}}}, "train": True}}, "VISSL run"),
], ids=["bare", "wrapper", "state_dict", "model", "compiled", "vissl"])
def test_wrappers_of_a_selfpatch_backbone(tmp_path, ours, make, kind):
    torch.save(make(ours), tmp_path / "file.pth")
    state, info = read_backbone(tmp_path / "file.pth")
    assert (info.kind, info.key, info.arch, info.patch_size, len(state)) == (kind, None, "vit_tiny", 16, 147)
    assert_same_features(load_backbone(tmp_path / "file.pth"), ours.backbone)


def test_vissl_trunk_with_class_token(tmp_path, dino):
    torch.save({"classy_state_dict": {"base_model": {"model": {"trunk": bare(dino["backbone"])}}}}, tmp_path / "f.pth")
    assert read_backbone(tmp_path / "f.pth")[1].class_token
    assert_same_features(load_backbone(tmp_path / "f.pth"), dino["backbone"])


def test_number_of_heads_of_a_detector(tmp_path, capsys):
    source = set_weights(vit_tiny(num_heads=4), 0).eval()
    state = {f"backbone.{k}": v for k, v in source.state_dict().items()}
    torch.save({"state_dict": state | {"rpn_head.rpn_conv.weight": torch.zeros(1)}}, tmp_path / "detector.pth")
    load_backbone(tmp_path / "detector.pth")
    assert "note: 3 attention heads" in capsys.readouterr().out
    assert_same_features(load_backbone(tmp_path / "detector.pth", num_heads=4), source)
    assert "note" not in capsys.readouterr().out


@pytest.mark.parametrize("number", [np.float32(1), np.int32(2), np.bool_(True), np.float64(3)])
def test_numpy_scalars_in_args(tmp_path, ours, number):
    state = training_checkpoint(ours)
    state["args"].lr = number
    torch.save(state, tmp_path / "run.pth")
    assert read_backbone(tmp_path / "run.pth")[1].args["lr"] == number


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_become_float32(tmp_path, ours, dtype):
    torch.save(bare(ours.backbone, dtype), tmp_path / "file.pth")
    source = vit_tiny().eval()
    source.load_state_dict(bare(ours.backbone, dtype))
    model = load_backbone(tmp_path / "file.pth")
    assert {p.dtype for p in model.parameters()} == {torch.float32} and all(p.requires_grad for p in model.parameters())
    assert_same_features(model, source)


def test_safetensors_and_legacy_torch_format(tmp_path, ours):
    safetensors.torch.save_file(bare(ours.backbone), tmp_path / "model.safetensors")
    assert_same_features(load_backbone(tmp_path / "model.safetensors"), ours.backbone)
    assert read_backbone(tmp_path / "model.safetensors")[1].kind == "SelfPatch backbone (safetensors)"
    write_checkpoint(bare(ours.backbone), tmp_path / "ours.safetensors")
    assert_same_features(load_backbone(tmp_path / "ours.safetensors"), ours.backbone)
    torch.save(training_checkpoint(ours), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same_features(load_backbone(tmp_path / "old.pth"), ours.backbone)


def test_dino_backbone_and_run(tmp_path, dino):
    torch.save(bare(dino["backbone"]), tmp_path / "backbone.pth")
    model = load_backbone(tmp_path / "backbone.pth")
    assert model.pos_embed.shape == (1, 197, 192)
    assert_same_features(model, dino["backbone"])
    torch.save(training_checkpoint(dino), tmp_path / "run.pth")
    for key in ("teacher", "student"):
        assert_same_features(load_backbone(tmp_path / "run.pth", key), dino["backbone"])
    state, info = read_backbone(tmp_path / "run.pth")
    assert (info.kind, info.epoch, info.class_token, info.final_norm) == ("DINO run", 200, True, True)
    assert {"head.last_layer.weight_g", "head.last_layer.weight_v"} < info.other_tensors.keys()


@pytest.mark.parametrize("options", [{}, {"global_pool": "avg"}, {"num_classes": 0, "final_norm": False}])
@torch.no_grad()
def test_timm(tmp_path, options):
    source = set_weights(timm.create_model("vit_tiny_patch16_224", **options), 0).eval()
    torch.save(source.state_dict(), tmp_path / "timm.pth")
    x = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(load_backbone(tmp_path / "timm.pth")(x), source.forward_features(x)[:, 1:],
                               rtol=1e-5, atol=1e-5)
    if "num_classes" not in options:
        info = read_backbone(tmp_path / "timm.pth")[1]
        assert info.kind == "timm backbone" and "ignored" in str(info) and "head" in str(info)


class MMSegLayer(nn.Module):
    """A layer with the parameter names of mmseg's VisionTransformer."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"attn": nn.MultiheadAttention(dim, num_heads, batch_first=True)})
        self.ffn = nn.ModuleDict({"layers": nn.Sequential(
            nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(0.0)), nn.Linear(4 * dim, dim))})

    def forward(self, x):
        u = self.ln1(x)
        x = x + self.attn["attn"](u, u, u)[0]
        return x + self.ffn["layers"](self.ln2(x))


class MMSegViT(nn.Module):
    def __init__(self, dim=192, num_heads=3, patches=9, class_token=False):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"projection": nn.Conv2d(3, dim, 16, 16)})
        self.pos_embed = nn.Parameter(torch.randn(1, patches + class_token, dim))
        if class_token:
            self.cls_token, self.ln1 = nn.Parameter(torch.randn(1, 1, dim)), nn.LayerNorm(dim, eps=1e-6)
        self.class_token = class_token
        self.layers = nn.ModuleList(MMSegLayer(dim, num_heads) for _ in range(12))

    def forward(self, x):
        x = self.patch_embed["projection"](x).flatten(2).transpose(1, 2)
        if self.class_token:
            x = torch.cat([self.cls_token, x], 1)
        x = x + self.pos_embed
        for layer in self.layers:
            x = layer(x)
        return self.ln1(x)[:, 1:] if self.class_token else x


@pytest.mark.parametrize("class_token", [False, True])
@torch.no_grad()
def test_mmseg_names(tmp_path, class_token):
    source = set_weights(MMSegViT(class_token=class_token), 0).eval()
    segmenter = {f"backbone.{k}": v for k, v in source.state_dict().items()}
    segmenter |= {"neck.lateral_convs.0.conv.weight": torch.zeros(4), "decode_head.conv_seg.bias": torch.zeros(150)}
    torch.save({"meta": {"epoch": 3, "CLASSES": ("wall", "sky")}, "state_dict": segmenter}, tmp_path / "segmenter.pth")
    state, info = read_backbone(tmp_path / "segmenter.pth")
    assert (info.kind, info.grid, info.epoch) == ("mmseg segmenter", 3, 3)
    x = torch.randn(1, 3, 48, 48)
    torch.testing.assert_close(load_backbone(tmp_path / "segmenter.pth")(x), source(x), rtol=1e-5, atol=1e-5)
    assert to_mmseg_names(state).keys() == source.state_dict().keys()
    assert from_mmseg_names(to_mmseg_names(state)).keys() == state.keys()
    torch.save(source.state_dict(), tmp_path / "backbone.pth")
    assert read_backbone(tmp_path / "backbone.pth")[1].kind == "backbone with mmseg names"
    assert_equal(read_backbone(tmp_path / "backbone.pth")[0], state)


def assert_equal(state, expected):
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_mmdet_detector(tmp_path, ours):
    detector = {f"backbone.{k}": v for k, v in bare(ours.backbone).items()}
    detector |= {"backbone.fpn1.0.weight": torch.zeros(2), "backbone.fpn2.0.bias": torch.zeros(2),
                 "rpn_head.rpn_conv.weight": torch.zeros(2), "roi_head.bbox_head.fc_cls.bias": torch.zeros(81)}
    torch.save({"meta": {"epoch": 12}, "state_dict": detector}, tmp_path / "detector.pth")
    info = read_backbone(tmp_path / "detector.pth")[1]
    assert str(info).endswith("mmdet detector, no key, vit_tiny, patch size 16, 147 tensors, epoch 12, "
                              "ignored fpn1 fpn2 roi_head rpn_head")
    assert_same_features(load_backbone(tmp_path / "detector.pth"), ours.backbone)
    assert load_backbone(tmp_path / "detector.pth", num_heads=6).blocks[0].attn.num_heads == 6


@pytest.mark.parametrize("make, arch", [(vit_small, "vit_small"), (vit_base, "vit_base")])
def test_arch_patch_size_and_grid_are_inferred(tmp_path, make, arch):
    with torch.device("meta"):
        source = make(patch_size=8, img_size=96)
    # expanded scalars, of which torch.save writes one number each
    state = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in source.state_dict().items()}
    torch.save(state, tmp_path / "file.pth")
    info = read_backbone(tmp_path / "file.pth")[1]
    assert (info.arch, info.patch_size, info.grid, info.class_token) == (arch, 8, 12, False)
    model = load_backbone(tmp_path / "file.pth", arch=arch.replace("vit", "deit"), patch_size=8, drop_path_rate=0.1)
    assert model.num_heads == source.num_heads and model.blocks[11].drop_path1.drop_prob == pytest.approx(0.1)


def test_contradicting_options(tmp_path, ours):
    path = tmp_path / "file.pth"
    torch.save(bare(ours.backbone), path)
    with pytest.raises(CheckpointError, match=r"arch vit_base contradicts .*file.pth.* vit_tiny"):
        load_backbone(path, arch="vit_base")
    with pytest.raises(CheckpointError, match=r"patch size 8 contradicts .*file.pth.* 16"):
        load_backbone(path, patch_size=8)
    with pytest.raises(CheckpointError, match="--random_weights contradicts"):
        load_backbone(path, random_weights=True)


def test_empty_path_needs_random_weights(capsys):
    with pytest.raises(CheckpointError, match="random network.*--random_weights"):
        load_backbone("")
    assert load_backbone("", arch="vit_tiny", patch_size=8, random_weights=True).patch_size == 8
    assert "random weights: vit_tiny, patch size 8" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="patch size 0"):
        load_backbone("", patch_size=0, random_weights=True)


def published_layout(out_dim, out_dim_selfpatch):
    """A MultiCropWrapper with the published code's keys and shapes, made of timm's and torch's own modules."""
    dim = 192

    def attention_block():
        block = nn.Module()
        block.norm1, block.norm2, block.attn = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.Module()
        block.attn.q, block.attn.k, block.attn.v, block.attn.proj = (nn.Linear(dim, dim) for _ in range(4))
        block.mlp = timm.layers.Mlp(dim, 4 * dim)
        return block

    def projection(out):
        head = nn.Module()
        head.mlp = nn.Sequential(nn.Linear(dim, HIDDEN_DIM), nn.GELU(), nn.Linear(HIDDEN_DIM, HIDDEN_DIM), nn.GELU(),
                                 nn.Linear(HIDDEN_DIM, BOTTLENECK_DIM))
        head.last_layer = nn.utils.weight_norm(nn.Linear(BOTTLENECK_DIM, out, bias=False))
        return head

    wrapper = nn.Module()
    wrapper.backbone = timm.create_model("vit_tiny_patch16_224", class_token=False, final_norm=False, num_classes=0,
                                         global_pool="")
    wrapper.ca_head = nn.Module()
    wrapper.ca_head.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
    wrapper.ca_head.cls_blocks = nn.ModuleList(attention_block() for _ in range(2))
    wrapper.ca_head.norm = nn.LayerNorm(dim)
    wrapper.c_head, wrapper.p_head = projection(out_dim), projection(out_dim_selfpatch)
    return wrapper


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_compatible_with_the_published_layout_both_ways(tmp_path, ours):
    write_checkpoint(training_checkpoint(ours), tmp_path / "checkpoint.pth")
    checkpoint = read_checkpoint(tmp_path / "checkpoint.pth")
    published = published_layout(24, 16)
    published.load_state_dict(checkpoint["teacher"], strict=True)
    nn.DataParallel(published).load_state_dict(checkpoint["student"], strict=True)  # prefix module., as under DDP
    # the other way: a file saved by the published code
    torch.save({"teacher": published.state_dict(), "args": argparse.Namespace(k_num=4)}, tmp_path / "published.pth")
    assert_same_features(load_backbone(tmp_path / "published.pth"), ours.backbone)
