"""The segmentation configs follow the published protocol: optimizer, schedule, pipelines and heads."""
import re

import pytest
import torch
from openmmlab_data import skip_without_packages, write_ade
from repository import ROOT

skip_without_packages()

from mmengine.config import Config  # noqa: E402
from mmengine.optim import OptimWrapper, build_optim_wrapper  # noqa: E402
from mmengine.registry import PARAM_SCHEDULERS  # noqa: E402
from mmengine.structures import PixelData  # noqa: E402
from mmseg.registry import DATASETS, MODELS  # noqa: E402
from mmseg.structures import SegDataSample  # noqa: E402

import segmentation.backbone  # noqa: E402, F401
from selfpatch.openmmlab.config import replace_prefix  # noqa: E402

CONFIGS = ROOT / "segmentation" / "configs"
SEMANTIC_FPN = "semantic-fpn_vit-small-16_40k_ade20k.py"
UPERNET = "upernet_vit-small-16_160k_ade20k.py"
TINY = {"model.backbone.embed_dim": 192, "model.backbone.num_heads": 3, "model.neck.in_channels": [192] * 4}
TINY_HEADS = {"model.neck.out_channels": 192, "model.decode_head.in_channels": [192] * 4,
              "model.decode_head.channels": 32, "model.auxiliary_head.in_channels": 192,
              "model.auxiliary_head.channels": 32}


def config(name, tiny=True):
    cfg = Config.fromfile(CONFIGS / name)
    if tiny:
        cfg.merge_from_dict(TINY | (TINY_HEADS if name == UPERNET else {}))
    replace_prefix(cfg.model, "SyncBN", "BN")
    return cfg


@pytest.fixture(scope="module")
def ade(tmp_path_factory):
    root = tmp_path_factory.mktemp("ade")
    write_ade(root)
    return root


@pytest.mark.parametrize("name", [SEMANTIC_FPN, UPERNET])
def test_optimizer(name):
    cfg = config(name)
    cfg.model.backbone.class_token = True  # as for DINO checkpoints
    model = MODELS.build(cfg.model)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    assert type(wrapper) is OptimWrapper and type(wrapper.optimizer) is torch.optim.AdamW
    groups = {id(p): group for group in wrapper.param_groups for p in group["params"]}
    decays = {}
    for name, p in model.named_parameters():
        group = groups.pop(id(p))
        assert (group["lr"], group["betas"]) == (6e-5, (0.9, 0.999))
        decays.setdefault(group["weight_decay"], set()).add(name)
    norms = {f"backbone.blocks.{i}.{norm}.{parameter}"
             for i in range(12) for norm in ("norm1", "norm2") for parameter in ("weight", "bias")}
    assert decays.keys() == {0.01, 0.0}
    assert decays[0.0] == norms | {"backbone.pos_embed", "backbone.cls_token"}


@pytest.mark.parametrize(("name", "iterations"), [(SEMANTIC_FPN, 40_000), (UPERNET, 160_000)])
def test_learning_rate(name, iterations):
    cfg = config(name)
    assert cfg.train_cfg.type == "IterBasedTrainLoop" and cfg.train_cfg.max_iters == iterations
    wrapper = OptimWrapper(torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=6e-5))
    schedulers = [PARAM_SCHEDULERS.build({**scheduler, "optimizer": wrapper}) for scheduler in cfg.param_scheduler]
    wrapper.optimizer.step()
    rates = []
    for _ in range(iterations):
        rates.append(wrapper.param_groups[0]["lr"])
        for scheduler in schedulers:
            scheduler.step()
    assert rates[0] == pytest.approx(6e-11)
    for i, part in ((375, 0.25), (750, 0.5), (1499, 1.0)):
        assert rates[i] == pytest.approx(6e-5 * part, rel=2e-3)
    for part in (0.0, 0.25, 0.5, 0.75, 0.99):
        assert rates[1500 + int(part * (iterations - 1500))] == pytest.approx(6e-5 * (1 - part), rel=6e-3)
    assert rates[-1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("name", "images"), [(SEMANTIC_FPN, 4), (UPERNET, 2)])
def test_training_pipeline(ade, name, images):
    cfg = config(name)
    replace_prefix(cfg, cfg.data_root, f"{ade}/")
    assert cfg.train_dataloader.batch_size == images and cfg.train_dataloader.sampler.type == "InfiniteSampler"
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    load, annotations, resize, crop, flip, jitter, pack = dataset.pipeline.transforms
    assert [type(t).__name__ for t in (load, annotations, jitter, pack)] == [
        "LoadImageFromFile", "LoadADEAnnotations", "PhotoMetricDistortion", "PackSegInputs"]
    assert (resize.scale, resize.ratio_range, resize.resize.keep_ratio) == ((2048, 512), (0.5, 2.0), True)
    assert (crop.crop_size, crop.cat_max_ratio, flip.prob, flip.direction) == ((512, 512), 0.75, 0.5, "horizontal")
    preprocess = MODELS.build(cfg.model.data_preprocessor)
    sample = dataset[1]
    batch = preprocess({"inputs": [sample["inputs"]], "data_samples": [sample["data_samples"]]}, training=True)
    labels = batch["data_samples"][0].gt_sem_seg.data
    assert batch["inputs"].shape == (1, 3, 512, 512) and labels.shape == (1, 512, 512)
    assert set(labels.unique().tolist()) <= {0, 149, 255}
    rows, columns = sample["inputs"].shape[-2:]  # smaller crops are padded, images by 0 and labels by 255
    assert not batch["inputs"][..., rows:, :].any() and (labels[..., columns:] == 255).all()


def test_whole_images_are_tested(ade):
    cfg = config(SEMANTIC_FPN)
    replace_prefix(cfg, cfg.data_root, f"{ade}/")
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    assert cfg.model.test_cfg.mode == "whole" and len(dataset) == 2
    sample = dataset[0]
    assert sample["inputs"].shape == (3, 512, 640)  # short side 512; labels keep the photograph's size
    labels = sample["data_samples"].gt_sem_seg.data[0]
    assert labels.shape == (64, 80)
    assert (labels[:48, :40] == 0).all() and (labels[:48, 40:] == 149).all() and (labels[48:] == 255).all()
    preprocess = MODELS.build(cfg.model.data_preprocessor)
    pixel = torch.tensor([30, 20, 10], dtype=torch.uint8).reshape(3, 1, 1).expand(3, 16, 16)  # mmcv reads BGR
    out = preprocess({"inputs": [pixel], "data_samples": None})["inputs"][0, :, 0, 0]
    expected = (torch.tensor([10, 20, 30]) / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225])
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_backbones_and_heads():
    semantic_fpn, upernet = config(SEMANTIC_FPN, tiny=False), config(UPERNET, tiny=False)
    assert Config.fromfile(CONFIGS / SEMANTIC_FPN).model.decode_head.norm_cfg.type == "SyncBN"
    for cfg in (semantic_fpn, upernet):
        backbone = MODELS.build(cfg.model.backbone)
        assert (backbone.embed_dim, backbone.num_heads, backbone.patch_size) == (384, 6, 16)
        assert backbone.pos_embed.shape == (1, 32 * 32, 384) and backbone.out_indices == (2, 5, 8, 11)
        assert backbone.blocks[11].drop_path1.drop_prob == pytest.approx(0.1)
    with torch.device("meta"):  # shapes are enough
        neck, head = MODELS.build(semantic_fpn.model.neck), MODELS.build(semantic_fpn.model.decode_head)
        maps = neck([torch.zeros(1, 384, 8, 8)] * 4)
        assert [m.shape for m in maps] == [(1, 256, 8, 8)] * 4
        assert (head.feature_strides, head.channels, head.num_classes) == ([4, 8, 16, 32], 128, 150)
        assert head.dropout_ratio == 0.1
        assert head(maps).shape == (1, 150, 8, 8)
        maps = MODELS.build(upernet.model.neck)([torch.zeros(1, 384, 8, 8)] * 4)
        assert [m.shape[-1] for m in maps] == [32, 16, 8, 4]
        assert upernet.model.decode_head.type == "UPerHead" and upernet.model.auxiliary_head.type == "FCNHead"
        assert MODELS.build(upernet.model.decode_head).eval()(maps).shape == (1, 150, 32, 32)


def test_upernet_trains_all_its_parameters():
    cfg = config(UPERNET)
    cfg.merge_from_dict({"model.backbone.img_size": 64, "model.backbone.drop_path_rate": 0.0})
    model = MODELS.build(cfg.model).train()
    labels = torch.randint(0, 150, (2, 1, 64, 64))
    samples = [SegDataSample(gt_sem_seg=PixelData(data=label), metainfo={"img_shape": (64, 64)}) for label in labels]
    losses = model.loss(torch.randn(2, 3, 64, 64), samples)
    assert {"decode.loss_ce", "aux.loss_ce"} <= losses.keys()
    model.parse_losses(losses)[0].backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"backbone", "neck", "decode_head", "auxiliary_head"}
    assert [name for name, grad in trained.items() if grad is None or not grad.any()] == []


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.name[:24])
def test_every_config_builds(path):
    cfg = Config.fromfile(path)
    replace_prefix(cfg.model, "SyncBN", "BN")
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    width, patch = (768 if "base" in path.name else 384), int(re.search(r"-(\d+)_", path.name)[1])
    assert model.backbone.patch_embed.proj.weight.shape == (width, 3, patch, patch)
    assert model.backbone.pos_embed.shape == (1, (512 // patch) ** 2, width)
