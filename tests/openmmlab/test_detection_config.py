"""The detection configs are the published recipe: model, optimizer, schedule and pipelines."""
import numpy as np
import pytest
import torch
from openmmlab_data import skip_without_packages
from PIL import Image
from repository import ROOT

skip_without_packages()

from mmdet.registry import MODELS, TRANSFORMS  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.optim import build_optim_wrapper  # noqa: E402
from mmengine.registry import PARAM_SCHEDULERS  # noqa: E402

import detection.backbone  # noqa: E402, F401
from selfpatch.openmmlab.config import load_config  # noqa: E402

CONFIGS = ROOT / "detection" / "configs"
RECIPE = CONFIGS / "mask-rcnn_vit-small-16_1x_coco.py"


def test_recipe_is_the_published_one():
    """Read without load_config, which replaces SyncBN if there is no GPU."""
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
    model, cfg = MODELS.build(load_config(RECIPE).model), Config.fromfile(RECIPE)
    assert cfg.optim_wrapper.pop("type") == "AmpOptimWrapper"  # which requires a GPU
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    decays = {names[group["params"][0]]: group["weight_decay"] for group in groups}
    undecayed = {"backbone.pos_embed"} | {
        f"backbone.blocks.{i}.{norm}.{parameter}"
        for i in range(12) for norm in ("norm1", "norm2") for parameter in ("weight", "bias")}
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
    load = {"type": "LoadImageFromFile", "color_type": "color_ignore_orientation"}  # the published one applies it
    annotations = {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True}

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


def test_sizes_of_training_images(photograph):
    cfg = Config.fromfile(RECIPE)
    transform, packed, ratios = compose(cfg.train_dataloader.dataset.pipeline), [], []
    np.random.seed(0)
    for _ in range(60):
        packed.append(transform(photograph))
    for image in packed:
        height, width = image["inputs"].shape[1:]
        ratios.append(width / height)
        assert max(height, width) <= 1333 and (min(height, width) in range(480, 801, 32) or max(height, width) == 1333)
    uncropped = sum(abs(ratio - 4 / 3) < 0.01 for ratio in ratios)
    assert 15 < uncropped < 45
    assert max(ratios) > 1.4 or min(ratios) < 1.25
    assert 15 < sum(image["data_samples"].flip for image in packed) < 45


def test_test_images_are_resized_to_800_and_normalised_in_rgb(photograph):
    cfg = Config.fromfile(RECIPE)
    image = compose(cfg.test_dataloader.dataset.pipeline)(photograph)
    assert image["inputs"].shape == (3, 800, 1067)
    batch = MODELS.build(cfg.model.data_preprocessor)({"inputs": [image["inputs"]],
                                                       "data_samples": [image["data_samples"]]})["inputs"]
    assert batch.shape == (1, 3, 800, 1088)  # padded to 32
    mean, std = torch.tensor([0.485, 0.456, 0.406]) * 255, torch.tensor([0.229, 0.224, 0.225]) * 255
    torch.testing.assert_close(batch[0, :, 400, 500], (torch.tensor([200., 100., 50.]) - mean) / std)


def test_differences_between_configs():
    def backbone(name):
        return Config.fromfile(CONFIGS / name).model.backbone
    small = backbone(RECIPE.name)
    assert (small.embed_dim, small.num_heads, small.patch_size, small.drop_path_rate) == (384, 6, 16, 0.05)
    assert dict(backbone("mask-rcnn_vit-small-16-published-8-heads_1x_coco.py")) == {**small, "num_heads": 8}
    assert dict(backbone("mask-rcnn_vit-small-8_1x_coco.py")) == {**small, "patch_size": 8}
    assert dict(backbone("mask-rcnn_vit-base-16_1x_coco.py")) == {**small, "embed_dim": 768, "num_heads": 12}
