"""detection/: the recipe against the published figures, features, files, and whole jobs on a tiny COCO."""
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

REASON = "OpenMMLab's packages are not all installed: run ./install_openmmlab.sh"
for package in ("mmcv.ops", "mmdet", "mmseg"):  # openmmlab.py imports them all
    pytest.importorskip(package, reason=REASON, exc_type=ImportError)

from mmdet.datasets import CocoDataset  # noqa: E402
from mmdet.registry import MODELS, TRANSFORMS  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.logging import HistoryBuffer  # noqa: E402
from mmengine.optim import build_optim_wrapper  # noqa: E402
from mmengine.registry import PARAM_SCHEDULERS, DefaultScope  # noqa: E402

import openmmlab  # noqa: E402
from checkpoint_files import CheckpointError, read_checkpoint  # noqa: E402
from checkpoints import check_fits  # noqa: E402
from detection.backbone import ViTPyramid, check_widths  # noqa: E402
from vision_transformer import vit_tiny  # noqa: E402

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "detection" / "configs"
RECIPE = CONFIGS / "mask-rcnn_vit-small-16_1x_coco.py"
TINY = {"embed_dim": 192, "num_heads": 3}
SIZES = {short for short in range(480, 801, 32)}


@pytest.fixture(autouse=True)
def scope():
    DefaultScope.get_instance("test_detection", scope_name="mmdet")


def write_coco(root: Path, split: str, categories: list[str]) -> None:
    """4 noisy photographs of 96×64 with two bright boxes each, whose masks are polygons."""
    rng, images, annotations = np.random.default_rng(0), [], []
    (root / f"{split}2017").mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    for i in range(4):
        image = Image.fromarray(rng.integers(0, 80, (64, 96, 3), dtype=np.uint8))
        for j in range(2):
            x, y, w, h = 8 + 44 * j, int(rng.integers(4, 20)), 36, 36
            ImageDraw.Draw(image).rectangle([x, y, x + w, y + h], fill=(255, 60 * i, 200 * j))
            annotations.append({"id": len(annotations) + 1, "image_id": i, "category_id": j + 1, "iscrowd": 0,
                                "bbox": [x, y, w, h], "area": w * h,
                                "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]})
        image.save(root / f"{split}2017" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 96, "height": 64})
    listed = [{"id": i + 1, "name": name} for i, name in enumerate(categories)]
    (root / "annotations" / f"instances_{split}2017.json").write_text(
        json.dumps({"info": {}, "images": images, "annotations": annotations, "categories": listed}))


@pytest.fixture(scope="session")
def coco(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    for split in ("train", "val"):
        write_coco(root, split, list(CocoDataset.METAINFO["classes"]))
    return root


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """The recipe at ViT-Tiny's width, on images of 96×64."""
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


@pytest.fixture(scope="session")
def source():
    """The pretrained backbone."""
    torch.manual_seed(1)
    return vit_tiny().eval()


@pytest.fixture(scope="session")
def pretrained(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("pretrained") / "checkpoint.pth"
    student = {f"module.backbone.{name}": torch.zeros_like(tensor) for name, tensor in source.state_dict().items()}
    teacher = {f"backbone.{name}": tensor for name, tensor in source.state_dict().items()}
    torch.save({"student": student, "teacher": teacher, "epoch": 3}, path)
    return path


def train(*options) -> None:
    openmmlab.train(openmmlab.get_train_parser("").parse_args([str(option) for option in options]), own_grid=True,
                    check=check_widths)


def evaluate(*options) -> None:
    openmmlab.test(openmmlab.get_test_parser("").parse_args([str(option) for option in options]), show=None,
                   check=check_widths)


def build(path: Path) -> torch.nn.Module:
    cfg = Config.fromfile(path)
    openmmlab.fit_to_cpu(Config({"model": cfg.model, "launcher": "none"}))
    return MODELS.build(cfg.model).eval()


# ----------------------------------------------------------------------------------------------------------------------
# The recipe


def test_recipe_is_the_published_one():
    """As it is written: without a GPU, BN takes the place of SyncBN."""
    model = Config.fromfile(RECIPE).model
    backbone, roi_head = model.backbone, model.roi_head
    assert (backbone.out_indices, backbone.drop_path_rate, backbone.norm_cfg) == (
        (3, 5, 7, 11), 0.05, {"type": "SyncBN"})
    assert model.neck == {"type": "FPN", "in_channels": [384] * 4, "out_channels": 256, "num_outs": 5}
    for extractor in (roi_head.bbox_roi_extractor, roi_head.mask_roi_extractor):
        assert extractor.featmap_strides == [4, 8, 16, 32]
    assert roi_head.bbox_head.num_classes == roi_head.mask_head.num_classes == 80
    assert model.data_preprocessor == {
        "type": "DetDataPreprocessor", "mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375],
        "bgr_to_rgb": True, "pad_mask": True, "pad_size_divisor": 32}


def test_optimizer_decays_all_but_position_embedding_and_norms():
    model, cfg = build(RECIPE), Config.fromfile(RECIPE)
    assert cfg.optim_wrapper.pop("type") == "AmpOptimWrapper"  # which cannot be built without a GPU
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    decays = {names[group["params"][0]]: group["weight_decay"] for group in groups}
    undecayed = {"backbone.pos_embed"} | {
        f"backbone.blocks.{i}.norm{j}.{kind}" for i in range(12) for j in (1, 2) for kind in ("weight", "bias")}
    assert set(decays) == set(names.values())
    assert {name for name, decay in decays.items() if decay == 0} == undecayed
    assert {decay for name, decay in decays.items() if name not in undecayed} == {0.05}
    assert {(group["lr"], group["betas"]) for group in groups} == {(5e-5, (0.9, 0.999))}


def test_schedule_warms_up_and_drops_after_8_and_11_epochs():
    cfg, weight, per_epoch, rates = Config.fromfile(RECIPE), torch.nn.Parameter(torch.zeros(1)), 1200, []
    optimizer = torch.optim.AdamW([weight], lr=5e-5)
    schedules = [PARAM_SCHEDULERS.build({**schedule, "optimizer": optimizer}) for schedule in cfg.param_scheduler]
    assert [schedule.by_epoch for schedule in schedules] == [False, True] and cfg.train_cfg.max_epochs == 12
    for i in range(12 * per_epoch):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedules[0].step()
        if (i + 1) % per_epoch == 0:
            schedules[1].step()
    expected = {0: 5e-8, 333: 5e-5 * (0.001 + 0.999 / 3), 999: 5e-5, 1000: 5e-5, 8 * per_epoch - 1: 5e-5,
                8 * per_epoch: 5e-6, 11 * per_epoch - 1: 5e-6, 11 * per_epoch: 5e-7, 12 * per_epoch - 1: 5e-7}
    assert {i: rates[i] for i in expected} == pytest.approx(expected, rel=1e-6)


@pytest.fixture
def photograph(tmp_path):
    Image.new("RGB", (640, 480), (200, 100, 50)).save(tmp_path / "photograph.png")
    box = {"bbox": [100, 100, 500, 400], "bbox_label": 0, "ignore_flag": 0,
           "mask": [[100, 100, 500, 100, 500, 400, 100, 400]]}
    return {"img_path": str(tmp_path / "photograph.png"), "img_id": 0, "height": 480, "width": 640, "instances": [box]}


def compose(steps: list[dict]):
    transforms = [TRANSFORMS.build(step) for step in steps]

    def run(results: dict) -> dict | None:
        for transform in transforms:
            results = results and transform(dict(results))
        return results
    return run


def test_pipelines_are_the_published_ones():
    cfg = Config.fromfile(RECIPE)
    load, annotations = {"type": "LoadImageFromFile"}, {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True}

    def resize(shorts):
        return {"type": "RandomChoiceResize", "keep_ratio": True, "scales": [(1333, short) for short in shorts]}
    last = resize(range(480, 801, 32))
    crop = {"type": "RandomCrop", "crop_type": "absolute_range", "crop_size": (384, 600), "allow_negative_crop": True}
    assert cfg.train_dataloader.dataset.pipeline == [
        load, annotations, {"type": "RandomFlip", "prob": 0.5},
        {"type": "RandomChoice", "transforms": [[last], [resize((400, 500, 600)), crop, last]]},
        {"type": "PackDetInputs"}]
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        *steps, pack = loader.dataset.pipeline
        assert steps == [load, {"type": "Resize", "scale": (1333, 800), "keep_ratio": True}, annotations]
        assert pack.type == "PackDetInputs"
    assert cfg.train_dataloader.batch_size == 1


def test_training_images_come_in_the_published_sizes(photograph):
    cfg = Config.fromfile(RECIPE)
    run, packed, ratios = compose(cfg.train_dataloader.dataset.pipeline), [], []
    np.random.seed(0)
    for _ in range(60):
        packed.append(run(photograph))
    for image in packed:
        height, width = image["inputs"].shape[1:]
        ratios.append(width / height)
        assert max(height, width) <= 1333 and (min(height, width) in SIZES or max(height, width) == 1333)
    whole = sum(abs(ratio - 4 / 3) < 0.01 for ratio in ratios)
    assert 15 < whole < 45  # the others were cropped
    assert max(ratios) > 1.4 or min(ratios) < 1.25
    assert 15 < sum(image["data_samples"].flip for image in packed) < 45


def test_test_images_are_800_high_and_normalised_in_rgb(photograph):
    cfg = Config.fromfile(RECIPE)
    image = compose(cfg.test_dataloader.dataset.pipeline)(photograph)
    assert image["inputs"].shape == (3, 800, 1067)
    batch = MODELS.build(cfg.model.data_preprocessor)({"inputs": [image["inputs"]],
                                                       "data_samples": [image["data_samples"]]})["inputs"]
    assert batch.shape == (1, 3, 800, 1088)  # padded to 32
    mean, std = torch.tensor([0.485, 0.456, 0.406]) * 255, torch.tensor([0.229, 0.224, 0.225]) * 255
    torch.testing.assert_close(batch[0, :, 400, 500], (torch.tensor([200., 100., 50.]) - mean) / std)


def test_configs_differ_where_they_say():
    def backbone(name):
        return Config.fromfile(CONFIGS / name).model.backbone
    small = backbone(RECIPE.name)
    assert (small.embed_dim, small.num_heads, small.patch_size, small.drop_path_rate) == (384, 6, 16, 0.05)
    assert dict(backbone("mask-rcnn_vit-small-16-published-8-heads_1x_coco.py")) == {**small, "num_heads": 8}
    assert dict(backbone("mask-rcnn_vit-small-8_1x_coco.py")) == {**small, "patch_size": 8}
    assert dict(backbone("mask-rcnn_vit-base-16_1x_coco.py")) == {**small, "embed_dim": 768, "num_heads": 12}


# ----------------------------------------------------------------------------------------------------------------------
# Features and files


@pytest.mark.parametrize("size", [(224, 224), (512, 512), (200, 300)])
def test_features_are_those_of_the_backbone(source, pretrained, size):
    adapter = ViTPyramid(**TINY, norm_cfg={"type": "BN"},
                         init_cfg={"type": "Pretrained", "checkpoint": str(pretrained)}).eval()
    adapter.init_weights()
    pad = Config.fromfile(RECIPE).model.data_preprocessor
    images = MODELS.build(pad)({"inputs": [torch.randint(0, 256, (3, *size), dtype=torch.uint8)],
                                "data_samples": None})["inputs"]
    rows, columns = images.shape[2] // 16, images.shape[3] // 16
    assert rows == -(-size[0] // 32) * 2 and columns == -(-size[1] // 32) * 2  # multiples of 32
    with torch.no_grad():
        shapes = [features.shape for features in adapter(images)]
        assert shapes == [(1, 192, rows * 4, columns * 4), (1, 192, rows * 2, columns * 2), (1, 192, rows, columns),
                          (1, 192, rows // 2, columns // 2)]
        adapter.fpn1 = adapter.fpn2 = adapter.fpn3 = adapter.fpn4 = torch.nn.Identity()
        taps = source.get_intermediate_layers(images, (3, 5, 7, 11))
        for features, tap in zip(adapter(images), taps, strict=True):
            torch.testing.assert_close(features.flatten(2).transpose(1, 2), tap, atol=1e-5, rtol=0)


@torch.no_grad()
def test_taps_are_resized_as_published():
    def adapter(patch_size):
        return ViTPyramid(patch_size=patch_size, embed_dim=24, num_heads=3, depth=1, norm_cfg={"type": "BN"}).eval()

    def double(x, layer):
        return F.conv_transpose2d(x, state[f"{layer}.weight"], state[f"{layer}.bias"], stride=2)
    x, ours = torch.randn(2, 24, 8, 4), adapter(16)
    state = ours.state_dict()
    norm = [state[f"fpn1.1.{name}"].uniform_(0.5, 1.5) for name in ("running_mean", "running_var", "weight", "bias")]
    by_hand = double(F.gelu(F.batch_norm(double(x, "fpn1.0"), *norm)), "fpn1.3")
    torch.testing.assert_close(ours.fpn1(x), by_hand)
    torch.testing.assert_close(ours.fpn2(x), double(x, "fpn2.0"))
    assert torch.equal(ours.fpn3(x), x) and torch.equal(ours.fpn4(x), F.max_pool2d(x, 2))
    ours = adapter(8)
    state = ours.state_dict()
    torch.testing.assert_close(ours.fpn1(x), double(x, "fpn1.0"))
    assert torch.equal(ours.fpn2(x), x)
    assert torch.equal(ours.fpn3(x), F.max_pool2d(x, 2)) and torch.equal(ours.fpn4(x), F.max_pool2d(x, 4))


def test_patches_of_8_pixels_reach_the_same_strides():
    adapter = ViTPyramid(patch_size=8, depth=2, out_indices=(0, 0, 1, 1), **TINY)
    with torch.no_grad():
        assert [features.shape[-1] for features in adapter(torch.rand(1, 3, 64, 64))] == [16, 8, 4, 2]
    assert {name for name in adapter.state_dict() if name.startswith("fpn")} == {"fpn1.0.weight", "fpn1.0.bias"}
    with pytest.raises(ValueError, match="patch_size 32"):
        ViTPyramid(patch_size=32, depth=1, **TINY)


def test_dino_backbones_keep_their_class_token(tmp_path):
    dino = vit_tiny(class_token=True, final_norm=True).eval()
    torch.save(dino.state_dict(), tmp_path / "dino.pth")
    adapter = ViTPyramid(**TINY, class_token=True, norm_cfg={"type": "BN"},
                         init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "dino.pth")}).eval()
    adapter.init_weights()
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(adapter(images)[2].flatten(2).transpose(1, 2),
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
        return build(config)
    released = detector(1)
    released.backbone.load_state_dict(source.state_dict(), strict=False)
    assert set(PUBLISHED) <= set(released.state_dict())
    torch.save({"meta": {"epoch": 12, "CLASSES": ("person",)}, "state_dict": released.state_dict(),
                "optimizer": {"state": {}, "param_groups": []}}, tmp_path / "detector.pth")
    state, info = openmmlab.read_model(str(tmp_path / "detector.pth"), Config.fromfile(config))
    assert info.kind == "mmdet detector"
    model = detector(2)
    check_fits(state, model.state_dict(), "")
    model.load_state_dict(state)
    images = torch.rand(1, 3, 96, 128)
    with torch.no_grad():
        for ours, theirs in zip(model.extract_feat(images), released.extract_feat(images), strict=True):
            assert torch.equal(ours, theirs)
        taps = source.get_intermediate_layers(images, [7])[0]
        torch.testing.assert_close(model.backbone(images)[2].flatten(2).transpose(1, 2), taps, atol=1e-5, rtol=0)
    del state["rpn_head.rpn_cls.weight"]
    with pytest.raises(CheckpointError, match=r"missing \(1\): rpn_head.rpn_cls.weight"):
        check_fits(state, model.state_dict(), "")


class Getattr:
    """What would reach for more than the methods that mmengine's files name."""

    def __reduce__(self):
        return getattr, (HistoryBuffer, "__init__")


def test_files_of_mmengine_cannot_reach_beyond_their_history(tmp_path):
    torch.save({"history": HistoryBuffer([1.0, 2.0], [1, 1])}, tmp_path / "good.pth")
    assert read_checkpoint(tmp_path / "good.pth")["history"].mean() == 1.5
    torch.save({"history": Getattr()}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match="bad.pth"):
        read_checkpoint(tmp_path / "bad.pth")


# ----------------------------------------------------------------------------------------------------------------------
# Whole jobs


@pytest.mark.slow
def test_training_resumes_and_is_evaluated(config, coco, pretrained, tmp_path):
    options = [config, "--data-root", coco, "--work-dir", tmp_path / "run"]
    train(*options, "--pretrained", pretrained)
    first = read_checkpoint(tmp_path / "run" / "epoch_1.pth")
    assert (first["meta"]["epoch"], first["meta"]["iter"]) == (1, 4)
    train(*options, "--resume", "--cfg-options", "train_cfg.max_epochs=2")
    second = read_checkpoint(tmp_path / "run" / "epoch_2.pth")
    assert (second["meta"]["epoch"], second["meta"]["iter"]) == (2, 8)
    assert second["optimizer"]["state"][0]["step"] == 8
    done = subprocess.run([sys.executable, ROOT / "detection" / "test.py", config, tmp_path / "run" / "epoch_2.pth",
                           "--data-root", coco, "--work-dir", tmp_path / "test", "--show-dir", tmp_path / "drawn"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "coco/bbox_mAP" in done.stdout + done.stderr and "coco/segm_mAP" in done.stdout + done.stderr
    assert len(list((tmp_path / "drawn").rglob("*.png"))) == 4


EACH_RANK = """
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class EachRank(Hook):
    def before_train(self, runner):
        torch.save(runner.model.module.state_dict(), f'{runner.work_dir}/before{runner.rank}.pth')

    def after_train(self, runner):
        torch.save(runner.model.module.state_dict(), f'{runner.work_dir}/after{runner.rank}.pth')
"""


@pytest.mark.slow
def test_two_processes_agree(config, coco, pretrained, tmp_path):
    (tmp_path / "each_rank.py").write_text(EACH_RANK)
    (tmp_path / "two.py").write_text(f"_base_ = [{str(config)!r}]\ncustom_imports = dict(imports=['each_rank'])\n"
                                     "custom_hooks = [dict(type='EachRank')]\nval_dataloader = val_cfg = None\n"
                                     "val_evaluator = None\n"
                                     "train_dataloader = dict(dataset=dict(indices=2))\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHON": sys.executable, "PORT": str(port), "CUDA_VISIBLE_DEVICES": "-1",
                                "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([ROOT / "detection" / "dist_train.sh", tmp_path / "two.py", "2", "--pretrained", pretrained,
                           "--data-root", coco, "--work-dir", tmp_path / "run"],
                          capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    before, *after = (torch.load(tmp_path / "run" / name) for name in ("before0.pth", "after0.pth", "after1.pth"))
    weights = [name for name in before if "running_" not in name and "num_batches" not in name]
    assert all(torch.equal(after[0][name], after[1][name]) for name in weights)
    assert not torch.equal(before["backbone.fpn2.0.weight"], after[0]["backbone.fpn2.0.weight"])
    assert read_checkpoint(tmp_path / "run" / "epoch_1.pth")["meta"]["iter"] == 1


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


def refusal(capsys, *options, job=train) -> str:
    """The one line that a job prints to stderr before it ends."""
    with pytest.raises(SystemExit) as stop:
        job(*options)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and ": error: " in error and error.endswith("\n") and error.count("\n") == 1, error
    return error


def test_bad_input_ends_in_one_line(config, coco, pretrained, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")  # which --launcher sets, and other tests should not find
    good = ["--data-root", coco, "--work-dir", tmp_path / "run"]
    assert "patch size 16, but the config says embed_dim 384 and patch_size 8" in refusal(
        capsys, CONFIGS / "mask-rcnn_vit-small-8_1x_coco.py", *good, "--pretrained", pretrained)
    assert "says embed_dim 384" in refusal(capsys, RECIPE, *good, "--pretrained", pretrained)
    assert "the backbone's four maps are 96 wide" in refusal(
        capsys, config, *good, "--pretrained", pretrained, "--cfg-options", "model.backbone.embed_dim=96")
    assert "there is no nowhere/" in refusal(capsys, config, "--data-root", "nowhere", "--pretrained", pretrained)
    assert "--pretrained is empty" in refusal(capsys, config, *good)
    assert "--cfg-options lr: give key=value" in refusal(capsys, config, *good, "--cfg-options", "lr")
    assert "cannot be read" in refusal(capsys, config, *good, "--pretrained", tmp_path / "none.pth")
    assert "not a detector or segmenter" in refusal(capsys, config, pretrained, *good, job=evaluate)
    torch.save({"state_dict": {f"backbone.{name}": tensor for name, tensor in vit_tiny().state_dict().items()}
                | {"rpn_head.rpn_cls.bias": torch.zeros(3)}}, tmp_path / "released.pth")
    assert "has the model alone" in refusal(capsys, config, *good, "--resume", tmp_path / "released.pth")
    assert "there is no config" in refusal(capsys, tmp_path / "none.py", *good, "--pretrained", pretrained)
    assert "torchrun" in refusal(capsys, config, *good, "--pretrained", pretrained, "--launcher", "pytorch")
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "last_checkpoint").write_text(str(tmp_path / "run" / "epoch_1.pth"))
    assert "has a run's checkpoints already" in refusal(capsys, config, *good, "--pretrained", pretrained)
    assert not list((tmp_path / "run").glob("*.py"))  # nothing was begun


def test_categories_must_be_all_80(config, pretrained, tmp_path, capsys):
    for split in ("train", "val"):
        write_coco(tmp_path / "coco", split, ["person", "bicycle"])
    assert "lists 2 of the 80 categories" in refusal(
        capsys, config, "--data-root", tmp_path / "coco", "--work-dir", tmp_path / "run", "--pretrained", pretrained)
