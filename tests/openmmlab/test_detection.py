"""detection/: features of the backbone, released models, whole jobs on a tiny COCO, and invalid input."""
import sys

import pytest
import torch
import torch.nn.functional as F
from forked import free_port
from openmmlab_data import (
    check_stored_pixels,
    script_error,
    skip_without_packages,
    start,
    write_coco,
)
from repository import ROOT

skip_without_packages()

from mmdet.datasets import CocoDataset  # noqa: E402
from mmdet.registry import MODELS, TRANSFORMS  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.logging import HistoryBuffer  # noqa: E402

from detection.backbone import ViTPyramid  # noqa: E402
from selfpatch.checkpoints.files import CheckpointError, read_checkpoint  # noqa: E402
from selfpatch.checkpoints.loading import check_state_dict, read_backbone  # noqa: E402
from selfpatch.errors import ConfigError  # noqa: E402
from selfpatch.method.vision_transformer import vit_small, vit_tiny  # noqa: E402
from selfpatch.openmmlab import jobs as openmmlab  # noqa: E402
from selfpatch.openmmlab.config import load_config  # noqa: E402

CONFIGS = ROOT / "detection" / "configs"
RECIPE = CONFIGS / "mask-rcnn_vit-small-16_1x_coco.py"
TINY = {"embed_dim": 192, "num_heads": 3}


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    for split in ("train", "val"):
        write_coco(root, split, list(CocoDataset.METAINFO["classes"]))
    return root


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The recipe with ViT-Ti and small heads, for images of 96×64."""
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(f"""
_base_ = [{str(RECIPE)!r}]
model = dict(
    backbone=dict({', '.join(f'{name}={value}' for name, value in TINY.items())}),
    neck=dict(in_channels=[192] * 4),
    roi_head=dict(bbox_head=dict(fc_out_channels=32), mask_head=dict(num_convs=1, conv_out_channels=32)),
    train_cfg=dict(rpn_proposal=dict(nms_pre=100, max_per_img=20), rcnn=dict(sampler=dict(num=16))),
    test_cfg=dict(rpn=dict(nms_pre=100, max_per_img=20), rcnn=dict(score_thr=0.0, max_per_img=5)))
train_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=(96, 64), keep_ratio=True), dict(type='PackDetInputs')]
loader = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline), **loader)
test_pipeline = [train_pipeline[0], train_pipeline[2], train_pipeline[1], dict(
    type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline), **loader)
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=1)
default_hooks = dict(logger=dict(interval=1))
""")
    return path


@pytest.fixture(scope="module")
def source():
    """The pretrained backbone."""
    torch.manual_seed(1)
    return vit_tiny().eval()


@pytest.fixture(scope="module")
def pretrained(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("pretrained") / "checkpoint.pth"
    student = {f"module.backbone.{name}": torch.zeros_like(tensor) for name, tensor in source.state_dict().items()}
    teacher = {f"backbone.{name}": tensor for name, tensor in source.state_dict().items()}
    torch.save({"student": student, "teacher": teacher, "epoch": 3}, path)
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Features and released models


@pytest.mark.parametrize("size", [(224, 224), (512, 512), (200, 300)])
def test_features_equal_those_of_the_backbone(source, pretrained, size):
    model = ViTPyramid(**TINY, norm_cfg={"type": "BN"},
                       init_cfg={"type": "Pretrained", "checkpoint": str(pretrained)}).eval()
    model.init_weights()
    pad = Config.fromfile(RECIPE).model.data_preprocessor
    images = MODELS.build(pad)({"inputs": [torch.randint(0, 256, (3, *size), dtype=torch.uint8)],
                                "data_samples": None})["inputs"]
    rows, columns = images.shape[2] // 16, images.shape[3] // 16
    assert rows == -(-size[0] // 32) * 2 and columns == -(-size[1] // 32) * 2  # multiples of 32
    with torch.no_grad():
        shapes = [features.shape for features in model(images)]
        assert shapes == [(1, 192, rows * 4, columns * 4), (1, 192, rows * 2, columns * 2), (1, 192, rows, columns),
                          (1, 192, rows // 2, columns // 2)]
        model.fpn1 = model.fpn2 = model.fpn3 = model.fpn4 = torch.nn.Identity()
        expected = source.get_intermediate_layers(images, (3, 5, 7, 11))
        for features, tokens in zip(model(images), expected, strict=True):
            torch.testing.assert_close(features.flatten(2).transpose(1, 2), tokens, atol=1e-5, rtol=0)


@torch.no_grad()
def test_fpn_layers_are_the_published_ones():
    def build(patch_size):
        return ViTPyramid(patch_size=patch_size, embed_dim=24, num_heads=3, depth=1, norm_cfg={"type": "BN"}).eval()

    def upsample(x, layer):
        return F.conv_transpose2d(x, state[f"{layer}.weight"], state[f"{layer}.bias"], stride=2)
    x, ours = torch.randn(2, 24, 8, 4), build(16)
    state = ours.state_dict()
    norm = [state[f"fpn1.1.{name}"].uniform_(0.5, 1.5) for name in ("running_mean", "running_var", "weight", "bias")]
    by_hand = upsample(F.gelu(F.batch_norm(upsample(x, "fpn1.0"), *norm)), "fpn1.3")
    torch.testing.assert_close(ours.fpn1(x), by_hand)
    torch.testing.assert_close(ours.fpn2(x), upsample(x, "fpn2.0"))
    assert torch.equal(ours.fpn3(x), x) and torch.equal(ours.fpn4(x), F.max_pool2d(x, 2))
    ours = build(8)
    state = ours.state_dict()
    torch.testing.assert_close(ours.fpn1(x), upsample(x, "fpn1.0"))
    assert torch.equal(ours.fpn2(x), x)
    assert torch.equal(ours.fpn3(x), F.max_pool2d(x, 2)) and torch.equal(ours.fpn4(x), F.max_pool2d(x, 4))


def test_strides_with_patches_of_8_pixels():
    model = ViTPyramid(patch_size=8, depth=2, out_indices=(0, 0, 1, 1), **TINY)
    with torch.no_grad():
        assert [features.shape[-1] for features in model(torch.rand(1, 3, 64, 64))] == [16, 8, 4, 2]
    assert {name for name in model.state_dict() if name.startswith("fpn")} == {"fpn1.0.weight", "fpn1.0.bias"}
    with pytest.raises(ConfigError, match="patch_size 32"):
        ViTPyramid(patch_size=32, depth=1, **TINY)


def test_dino_backbone_keeps_its_class_token(tmp_path):
    dino = vit_tiny(class_token=True, final_norm=True).eval()
    torch.save(dino.state_dict(), tmp_path / "dino.pth")
    model = ViTPyramid(**TINY, class_token=True, norm_cfg={"type": "BN"},
                       init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "dino.pth")}).eval()
    model.init_weights()
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(model(images)[2].flatten(2).transpose(1, 2),
                                   dino.get_intermediate_layers(images, [7])[0], atol=1e-5, rtol=0)


PUBLISHED = ["backbone.pos_embed", "backbone.blocks.0.attn.qkv.weight", "backbone.fpn1.0.weight",
             "backbone.fpn1.1.running_mean", "backbone.fpn1.3.bias", "backbone.fpn2.0.weight",
             "neck.lateral_convs.0.conv.weight", "neck.fpn_convs.3.conv.bias", "rpn_head.rpn_conv.weight",
             "rpn_head.rpn_cls.weight", "rpn_head.rpn_reg.bias", "roi_head.bbox_head.fc_cls.weight",
             "roi_head.bbox_head.shared_fcs.1.weight", "roi_head.mask_head.convs.0.conv.weight",
             "roi_head.mask_head.upsample.weight", "roi_head.mask_head.conv_logits.bias"]


def test_released_detectors_load(source, config, tmp_path):
    def detector(seed):
        torch.manual_seed(seed)
        return MODELS.build(load_config(config).model).eval()
    released = detector(1)
    released.backbone.load_state_dict(source.state_dict(), strict=False)
    assert set(PUBLISHED) <= set(released.state_dict())
    torch.save({"meta": {"epoch": 12, "CLASSES": ("person",)}, "state_dict": released.state_dict(),
                "optimizer": {"state": {}, "param_groups": []}}, tmp_path / "detector.pth")
    state, info = openmmlab.read_model(tmp_path / "detector.pth", load_config(config))
    assert info.kind == "mmdet detector"
    model = detector(2)
    check_state_dict(state, model.state_dict(), "")
    model.load_state_dict(state)
    images = torch.rand(1, 3, 96, 128)
    with torch.no_grad():
        for ours, theirs in zip(model.extract_feat(images), released.extract_feat(images), strict=True):
            assert torch.equal(ours, theirs)
        tokens = source.get_intermediate_layers(images, [7])[0]
        torch.testing.assert_close(model.backbone(images)[2].flatten(2).transpose(1, 2), tokens, atol=1e-5, rtol=0)
    del state["rpn_head.rpn_cls.weight"]
    with pytest.raises(CheckpointError, match=r"missing \(1\): rpn_head.rpn_cls.weight"):
        check_state_dict(state, model.state_dict(), "")


class Getattr:
    """Pickles as a getattr of a method that mmengine's checkpoints do not use."""

    def __reduce__(self):
        return getattr, (HistoryBuffer, "__init__")


def test_getattr_in_checkpoints_is_limited_to_histories(tmp_path):
    torch.save({"history": HistoryBuffer([1.0, 2.0], [1, 1])}, tmp_path / "good.pth")
    assert read_checkpoint(tmp_path / "good.pth")["history"].mean() == 1.5
    torch.save({"history": Getattr()}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match="bad.pth"):
        read_checkpoint(tmp_path / "bad.pth")


def test_attention_heads_of_the_checkpoint_and_the_config(tmp_path):
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in vit_small().state_dict().items()}
    torch.save({f"momentum_encoder.{name}": torch.zeros(()).expand(shape) for name, shape in shapes.items()},
               tmp_path / "moco.pth")
    info, cfg = read_backbone(tmp_path / "moco.pth")[1], Config.fromfile(RECIPE)
    message = r"moco.pth has 12 attention heads \(as published\), but the config says 6: give .*backbone.num_heads=12"
    with pytest.raises(CheckpointError, match=message):
        openmmlab.adapt_backbone(cfg, info, keep_grid=True)
    with pytest.raises(CheckpointError, match=message):
        openmmlab.load_pretrained(ViTPyramid(embed_dim=384, num_heads=6, norm_cfg={"type": "BN"}),
                                  {"type": "Pretrained", "checkpoint": tmp_path / "moco.pth"})
    cfg.model.backbone.num_heads = 12
    openmmlab.adapt_backbone(cfg, info, keep_grid=True)
    assert cfg.model.backbone.class_token is False


# ----------------------------------------------------------------------------------------------------------------------
# Whole jobs


@pytest.mark.slow
def test_training_resumes_and_is_evaluated(config, coco, pretrained, tmp_path):
    def load(**overrides):
        return load_config(config, overrides, data_root=coco, work_dir=tmp_path / "run")

    openmmlab.train(load(), pretrained, keep_grid=True)
    first = read_checkpoint(tmp_path / "run" / "epoch_1.pth")
    assert (first["meta"]["epoch"], first["meta"]["iter"]) == (1, 4)
    openmmlab.train(load(**{"train_cfg.max_epochs": 2}), resume="auto", keep_grid=True)
    second = read_checkpoint(tmp_path / "run" / "epoch_2.pth")
    assert (second["meta"]["epoch"], second["meta"]["iter"]) == (2, 8)
    assert second["optimizer"]["state"][0]["step"] == 8
    metrics = openmmlab.evaluate(load(), tmp_path / "run" / "epoch_2.pth")
    assert {"coco/bbox_mAP", "coco/segm_mAP"} <= metrics.keys()
    output = start(sys.executable, ROOT / "detection" / "test.py", config, tmp_path / "run" / "epoch_2.pth",
                   "--data-root", coco, "--work-dir", tmp_path / "test", "--show-dir", tmp_path / "drawn")
    assert all(f"{name}: {metrics[name]:.4f}" in output for name in ("coco/bbox_mAP", "coco/segm_mAP"))
    assert len(list((tmp_path / "drawn").rglob("*.png"))) == 4


RANK_HOOK = """
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class SaveEveryRank(Hook):
    def before_train(self, runner):
        torch.save(runner.model.module.state_dict(), f'{runner.work_dir}/before{runner.rank}.pth')

    def after_train(self, runner):
        torch.save(runner.model.module.state_dict(), f'{runner.work_dir}/after{runner.rank}.pth')
"""


@pytest.mark.slow
def test_two_processes_agree(config, coco, pretrained, tmp_path):
    (tmp_path / "rank_hook.py").write_text(RANK_HOOK)
    (tmp_path / "two.py").write_text(f"_base_ = [{str(config)!r}]\ncustom_imports = dict(imports=['rank_hook'])\n"
                                     "custom_hooks = [dict(type='SaveEveryRank')]\nval_dataloader = val_cfg = None\n"
                                     "val_evaluator = None\n"
                                     "train_dataloader = dict(dataset=dict(indices=2))\n")
    start(ROOT / "detection" / "dist_train.sh", tmp_path / "two.py", 2, "--pretrained", pretrained, "--data-root", coco,
          "--work-dir", tmp_path / "run", PYTHON=sys.executable, PORT=free_port(), PYTHONPATH=tmp_path)
    before, *after = (torch.load(tmp_path / "run" / name) for name in ("before0.pth", "after0.pth", "after1.pth"))
    weights = [name for name in before if "running_" not in name and "num_batches" not in name]
    assert all(torch.equal(after[0][name], after[1][name]) for name in weights)
    assert not torch.equal(before["backbone.fpn2.0.weight"], after[0]["backbone.fpn2.0.weight"])
    assert read_checkpoint(tmp_path / "run" / "epoch_1.pth")["meta"]["iter"] == 1


# ----------------------------------------------------------------------------------------------------------------------
# Invalid input


def train_error(capsys, *options) -> str:
    return script_error(capsys, "detection/train.py", *options)


def test_invalid_input_ends_with_one_line(config, coco, pretrained, tmp_path, capsys):
    valid = ["--data-root", coco, "--work-dir", tmp_path / "run"]
    assert "patch size 16, but the config says embed_dim 384 and patch_size 8" in train_error(
        capsys, CONFIGS / "mask-rcnn_vit-small-8_1x_coco.py", *valid, "--pretrained", pretrained)
    assert "says embed_dim 384" in train_error(capsys, RECIPE, *valid, "--pretrained", pretrained)
    assert "the backbone's four maps have 96 channels" in train_error(
        capsys, config, *valid, "--pretrained", pretrained, "--cfg-options", "model.backbone.embed_dim=96")
    assert "there is no nowhere/" in train_error(capsys, config, "--data-root", "nowhere", "--pretrained", pretrained)
    assert "--pretrained is empty" in train_error(capsys, config, *valid)
    assert "--random_weights contradicts" in train_error(
        capsys, config, *valid, "--pretrained", pretrained, "--random_weights")
    assert "--cfg-options lr: give key=value" in train_error(capsys, config, *valid, "--cfg-options", "lr")
    assert "cannot be read" in train_error(capsys, config, *valid, "--pretrained", tmp_path / "none.pth")
    assert "not a detector or segmenter" in script_error(capsys, "detection/test.py", config, pretrained, *valid)
    torch.save({"state_dict": {f"backbone.{name}": tensor for name, tensor in vit_tiny().state_dict().items()}
                | {"rpn_head.rpn_cls.bias": torch.zeros(3)}}, tmp_path / "released.pth")
    assert "has the model alone" in train_error(capsys, config, *valid, "--resume", tmp_path / "released.pth")
    assert "there is no config" in train_error(capsys, tmp_path / "none.py", *valid, "--pretrained", pretrained)
    assert "torchrun" in train_error(capsys, config, *valid, "--pretrained", pretrained, "--launcher", "pytorch")
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "last_checkpoint").write_text(str(tmp_path / "run" / "epoch_1.pth"))
    assert "already has checkpoints of a run" in train_error(capsys, config, *valid, "--pretrained", pretrained)
    assert not list((tmp_path / "run").glob("*.py"))  # no run was started


@pytest.mark.parametrize("tag", [2, 3, 6])
@pytest.mark.parametrize("pipeline", ["train_dataloader", "test_dataloader"])
def test_photographs_are_read_as_stored_like_their_boxes(tmp_path, tag, pipeline):
    check_stored_pixels(TRANSFORMS.build(load_config(RECIPE)[pipeline].dataset.pipeline[0]), tmp_path, tag)


def test_all_80_categories_are_required(config, pretrained, tmp_path, capsys):
    for split in ("train", "val"):
        write_coco(tmp_path / "coco", split, ["person", "bicycle"])
    assert "lists 2 of the 80 categories" in train_error(
        capsys, config, "--data-root", tmp_path / "coco", "--work-dir", tmp_path / "run", "--pretrained", pretrained)
