"""Segmentation on mmseg: the configs against the protocol, the features, released segmenters, whole jobs."""
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_rules import set_weights
from PIL import Image

REASON = "OpenMMLab's packages are not all installed: run ./install_openmmlab.sh"
for package in ("mmcv.ops", "mmdet", "mmseg"):  # openmmlab.py imports them all
    pytest.importorskip(package, reason=REASON, exc_type=ImportError)

from mmengine.config import Config  # noqa: E402
from mmengine.optim import OptimWrapper, build_optim_wrapper  # noqa: E402
from mmengine.registry import PARAM_SCHEDULERS  # noqa: E402
from mmengine.runner import load_checkpoint  # noqa: E402
from mmengine.structures import PixelData  # noqa: E402
from mmseg.models.backbones import VisionTransformer as MMSegViT  # noqa: E402
from mmseg.registry import DATASETS, MODELS  # noqa: E402
from mmseg.structures import SegDataSample  # noqa: E402
from mmseg.utils import register_all_modules  # noqa: E402

import openmmlab  # noqa: E402
from checkpoint_files import CheckpointError  # noqa: E402
from checkpoints import to_mmseg_names  # noqa: E402
from segmentation.backbone import SelfPatchViT, annotation_errors  # noqa: E402
from vision_transformer import vit_tiny  # noqa: E402

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "segmentation" / "configs"
SEMANTIC_FPN = "semantic-fpn_vit-small-16_40k_ade20k.py"
UPERNET = "upernet_vit-small-16_160k_ade20k.py"
TINY = {"model.backbone.embed_dim": 192, "model.backbone.num_heads": 3, "model.neck.in_channels": [192] * 4}
TINY_HEADS = {"model.neck.out_channels": 192, "model.decode_head.in_channels": [192] * 4,
              "model.decode_head.channels": 32, "model.auxiliary_head.in_channels": 192,
              "model.auxiliary_head.channels": 32}


@pytest.fixture(scope="module", autouse=True)
def scope():
    register_all_modules()


def config(name, tiny=True):
    cfg = Config.fromfile(CONFIGS / name)
    if tiny:
        cfg.merge_from_dict(TINY | (TINY_HEADS if name == UPERNET else {}))
    openmmlab.replace_strings(cfg.model, "SyncBN", "BN")
    return cfg


@pytest.fixture(scope="session")
def ade(tmp_path_factory):
    """Four pairs for training and two for validation, 80×64: left dark and id 1, right bright and 150, 0 below."""
    root, rng = tmp_path_factory.mktemp("ade"), np.random.default_rng(0)
    for split, count in (("training", 4), ("validation", 2)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 60, (64, 80, 3), dtype=np.uint8)
            pixels[:, 40:] += 150
            Image.fromarray(pixels).save(root / "images" / split / f"{i}.jpg", quality=95)
            ids = np.full((64, 80), 1, np.uint8)
            ids[:, 40:] = 150
            ids[48:] = 0
            Image.fromarray(ids).save(root / "annotations" / split / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "checkpoint.pth"
    state = {f"backbone.{name}": t for name, t in set_weights(vit_tiny(), 0).state_dict().items()}
    torch.save({"teacher": state | {"ca_head.cls_token": torch.zeros(1, 1, 192)}, "epoch": 3}, path)
    return path


# ----------------------------------------------------------------------------------------------------------------------
# The protocol


@pytest.mark.parametrize("name", [SEMANTIC_FPN, UPERNET])
def test_optimizer(name):
    cfg = config(name)
    cfg.model.backbone.class_token = True  # as for DINO's
    model = MODELS.build(cfg.model)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    assert type(wrapper) is OptimWrapper and type(wrapper.optimizer) is torch.optim.AdamW
    groups = {id(p): group for group in wrapper.param_groups for p in group["params"]}
    decays = {}
    for parameter, p in model.named_parameters():
        group = groups.pop(id(p))
        assert (group["lr"], group["betas"]) == (6e-5, (0.9, 0.999))
        decays.setdefault(group["weight_decay"], set()).add(parameter)
    norms = {f"backbone.blocks.{i}.norm{n}.{kind}" for i in range(12) for n in (1, 2) for kind in ("weight", "bias")}
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
    openmmlab.replace_strings(cfg, cfg.data_root, f"{ade}/")
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
    rows, columns = sample["inputs"].shape[-2:]  # a smaller crop is padded, by 0 and by what is ignored
    assert not batch["inputs"][..., rows:, :].any() and (labels[..., columns:] == 255).all()


def test_whole_images_are_tested(ade):
    cfg = config(SEMANTIC_FPN)
    openmmlab.replace_strings(cfg, cfg.data_root, f"{ade}/")
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    assert cfg.model.test_cfg.mode == "whole" and len(dataset) == 2
    sample = dataset[0]
    assert sample["inputs"].shape == (3, 512, 640)  # the short side, and the annotation in the photograph's own size
    labels = sample["data_samples"].gt_sem_seg.data[0]
    assert labels.shape == (64, 80)
    assert (labels[:48, :40] == 0).all() and (labels[:48, 40:] == 149).all() and (labels[48:] == 255).all()
    preprocess = MODELS.build(cfg.model.data_preprocessor)
    pixel = torch.tensor([30, 20, 10], dtype=torch.uint8).reshape(3, 1, 1).expand(3, 16, 16)  # mmcv's are BGR
    out = preprocess({"inputs": [pixel], "data_samples": None})["inputs"][0, :, 0, 0]
    expected = (torch.tensor([10, 20, 30]) / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225])
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_heads():
    semantic_fpn, upernet = config(SEMANTIC_FPN, tiny=False), config(UPERNET, tiny=False)
    assert Config.fromfile(CONFIGS / SEMANTIC_FPN).model.decode_head.norm_cfg.type == "SyncBN"
    for cfg in (semantic_fpn, upernet):
        backbone = MODELS.build(cfg.model.backbone)
        assert (backbone.embed_dim, backbone.num_heads, backbone.patch_size) == (384, 6, 16)
        assert backbone.pos_embed.shape == (1, 32 * 32, 384) and backbone.out_indices == (2, 5, 8, 11)
        assert backbone.blocks[11].drop_path1.drop_prob == pytest.approx(0.1)
    with torch.device("meta"):  # shapes alone
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
    openmmlab.replace_strings(cfg.model, "SyncBN", "BN")
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    width, patch = (768 if "base" in path.name else 384), int(re.search(r"-(\d+)_", path.name)[1])
    assert model.backbone.patch_embed.proj.weight.shape == (width, 3, patch, patch)
    assert model.backbone.pos_embed.shape == (1, (512 // patch) ** 2, width)


# ----------------------------------------------------------------------------------------------------------------------
# The backbone


def by_size(pos_embed, side, grid):
    pos = pos_embed.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    return F.interpolate(pos, size=grid, mode="bicubic", align_corners=False).permute(0, 2, 3, 1).flatten(1, 2)


@pytest.mark.parametrize(("patch_size", "img_size", "size", "padded"), [
    (16, 224, (224, 224), (224, 224)), (16, 512, (512, 512), (512, 512)), (16, 512, (200, 330), (208, 336)),
    (8, 128, (60, 100), (64, 104))])
@torch.no_grad()
def test_features_equal_the_backbones_own(tmp_path, patch_size, img_size, size, padded):
    own = set_weights(vit_tiny(patch_size=patch_size), 0).eval()
    torch.save(own.state_dict(), tmp_path / "backbone.pth")
    ours = SelfPatchViT(img_size=img_size, patch_size=patch_size, embed_dim=192, num_heads=3,
                        init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "backbone.pth")}).eval()
    ours.init_weights()
    grid, side = tuple(n // patch_size for n in padded), img_size // patch_size
    pos = by_size(own.pos_embed, 224 // patch_size, (side, side))  # once, for the crops, and then for the image
    assert torch.equal(ours.pos_embed, pos)
    own.interpolate_pos_encoding = lambda asked: by_size(pos, side, grid)
    x = torch.randn(1, 3, *size)
    tokens = own.get_intermediate_layers(F.pad(x, (0, padded[1] - size[1], 0, padded[0] - size[0])), (2, 5, 8, 11))
    maps = ours(x)
    assert [m.shape for m in maps] == [(1, 192, *grid)] * 4
    for m, t in zip(maps, tokens, strict=True):
        torch.testing.assert_close(m.flatten(2).transpose(1, 2), t, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("class_token", [False, True])
@torch.no_grad()
def test_features_equal_those_of_mmsegs_vit(class_token):
    """The network that released segmenters were trained with, from their names."""
    ours = SelfPatchViT(img_size=64, embed_dim=192, num_heads=3, class_token=class_token).eval()
    state = to_mmseg_names(set_weights(ours, 0).state_dict())
    theirs = MMSegViT(img_size=64, embed_dims=192, num_heads=3, out_indices=(2, 5, 8, 11), patch_bias=True,
                      norm_cfg={"type": "LN", "eps": 1e-6}, with_cls_token=class_token)
    theirs.eval()
    token = {} if class_token else {"cls_token": torch.zeros(1, 1, 192),  # it has one anyway, and drops it
                                    "pos_embed": F.pad(state["pos_embed"], (0, 0, 1, 0))}
    theirs.load_state_dict(state | token)
    for size in ((64, 64), (40, 72)):
        x = torch.randn(2, 3, *size)
        for our, their in zip(ours(x), theirs(x), strict=True):
            torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A released Semantic FPN: backbone under mmseg's names, neck and head; and the model it comes from."""
    cfg = config(SEMANTIC_FPN)
    source = MODELS.build(cfg.model).eval()
    set_weights(source.backbone, 1)
    state = {f"backbone.{name}": t for name, t in to_mmseg_names(source.backbone.state_dict()).items()}
    state |= {name: t for name, t in source.state_dict().items() if not name.startswith("backbone.")}
    assert "backbone.layers.11.ffn.layers.0.0.weight" in state and not any("blocks" in name for name in state)
    path = tmp_path_factory.mktemp("released") / "segmenter.pth"
    torch.save({"meta": {"CLASSES": ("wall", "building")}, "state_dict": state}, path)
    return path, source


@torch.no_grad()
def test_a_released_segmenter_loads(released):
    path, source = released
    x = torch.randn(1, 3, 64, 96)
    state, info = openmmlab.read_model(path, config(SEMANTIC_FPN))
    assert info.kind == "mmseg segmenter"
    by_reader, by_mmengine = (MODELS.build(config(SEMANTIC_FPN).model).eval() for _ in range(2))
    by_reader.load_state_dict(state)
    load_checkpoint(by_mmengine, str(path), strict=True)  # as mmseg's own tools do
    for model in (by_reader, by_mmengine):
        for ours, theirs in zip(model.backbone(x), source.backbone(x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(x, mode="tensor"), source(x, mode="tensor"), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_class_token_kept_out_of_the_attention_is_left_out(released, tmp_path):
    """mmseg's ViT saves one with with_cls_token=False too; the config says so, as a file cannot."""
    state, source = torch.load(released[0], weights_only=True)["state_dict"], released[1]
    token = {"backbone.cls_token": torch.ones(1, 1, 192),
             "backbone.pos_embed": torch.cat([torch.ones(1, 1, 192), state["backbone.pos_embed"]], dim=1)}
    torch.save({"state_dict": state | token}, tmp_path / "token.pth")
    cfg, x = config(SEMANTIC_FPN), torch.randn(1, 3, 64, 96)
    assert openmmlab.read_model(tmp_path / "token.pth", cfg)[1].class_token
    cfg.model.backbone.class_token = False
    state, info = openmmlab.read_model(tmp_path / "token.pth", cfg)
    model = MODELS.build(cfg.model).eval()
    model.load_state_dict(state)
    assert not info.class_token
    torch.testing.assert_close(model(x, mode="tensor"), source(x, mode="tensor"), rtol=1e-5, atol=1e-5)


def test_a_segmenter_with_a_final_norm_is_refused(released, tmp_path):
    state = torch.load(released[0], weights_only=True)["state_dict"]
    state |= {"backbone.ln1.weight": torch.ones(192), "backbone.ln1.bias": torch.zeros(192)}
    torch.save({"state_dict": state}, tmp_path / "normed.pth")
    with pytest.raises(CheckpointError, match="norm after the last block"):
        openmmlab.read_model(tmp_path / "normed.pth", config(SEMANTIC_FPN))


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(("annotation", "workers", "message"), [
    (np.full((64, 80), 151, np.uint8), 0, r"0\.png has the id 151, but ADE20K's are 0 \(nothing\) and 1 to 150: use"),
    (np.full((64, 80), 254, np.uint8), 1, r"^pytest: error: \S+0\.png has the id 254, but ADE20K's are 0"),
    (np.zeros((64, 80), np.uint16), 0, r"0\.png has mode I;16: annotations are 8-bit images of ids"),
    (np.zeros((64, 80, 3), np.uint8), 0, r"0\.png has mode RGB"),
    (np.zeros((64, 81), np.uint8), 0, r"0\.png has 64 rows of 81 pixels, but \S+0\.jpg has 64 of 80"),
    (None, 0, r"0\.png cannot be read .*, the annotation of \S+0\.jpg")],
    ids=["151", "254 in a worker", "16 bits", "RGB", "size", "missing"])
def test_annotations_are_refused_in_one_line(tmp_path, capsys, monkeypatch, annotation, workers, message):
    monkeypatch.setattr(sys, "argv", ["pytest"])
    for folder in ("images/validation", "annotations/validation"):
        (tmp_path / folder).mkdir(parents=True)
    Image.new("RGB", (80, 64)).save(tmp_path / "images/validation/0.jpg")
    if annotation is not None:
        Image.fromarray(annotation).save(tmp_path / "annotations/validation/0.png")
    cfg = config(SEMANTIC_FPN)
    openmmlab.replace_strings(cfg, cfg.data_root, f"{tmp_path}/")
    loader = torch.utils.data.DataLoader(DATASETS.build(cfg.test_dataloader.dataset), num_workers=workers,
                                         collate_fn=lambda samples: samples)
    with pytest.raises(SystemExit) as stop, annotation_errors():
        next(iter(loader))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and re.search(message, error) and error.count("\n") == 1


def options(name, ade, *words):
    return openmmlab.get_train_parser("").parse_args([str(word) for word in (
        CONFIGS / name, "--data-root", ade, *words, "--work-dir", ade / "runs", "--cfg-options",
        "model.backbone.embed_dim=192", "model.backbone.num_heads=3", "model.neck.in_channels=[192,192,192,192]")])


def test_bad_options_stop_in_one_line(ade, pretrained, tmp_path, capsys):
    other = tmp_path / "small.pth"
    torch.save(vit_tiny(patch_size=8, img_size=64).state_dict(), other)
    small = openmmlab.get_train_parser("").parse_args(
        [str(CONFIGS / SEMANTIC_FPN), "--data-root", str(ade), "--pretrained", str(pretrained)])
    (tmp_path / "empty").mkdir()
    for args, message in [
            (options(SEMANTIC_FPN, ade, "--pretrained", other), f"{other} holds vit_tiny, 192 wide, with patch size 8, "
             "but the config says embed_dim 192 and patch_size 16"),
            (small, f"{pretrained} holds vit_tiny, 192 wide, with patch size 16, but the config says embed_dim 384"),
            (options(SEMANTIC_FPN, tmp_path / "gone", "--pretrained", pretrained), f"there is no {tmp_path}/gone"),
            (options(SEMANTIC_FPN, tmp_path / "empty", "--pretrained", pretrained), f"{tmp_path}/empty/ is empty"),
            (options(SEMANTIC_FPN, ade), "--pretrained is empty")]:
        with pytest.raises(SystemExit) as stop:
            openmmlab.train(args, own_grid=False)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and message in error and error.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------------------
# Whole jobs

RANK_HOOK = """
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class SaveEveryRank(Hook):
    def after_train(self, runner):
        torch.save(runner.model.state_dict(), f"{runner.work_dir}/rank{get_rank()}.pth")
"""


@pytest.fixture(scope="module")
def tiny_config(tmp_path_factory, ade):
    """A config file for one iteration on crops of 64 pixels, a width that a test can wait for."""
    folder = tmp_path_factory.mktemp("configs")
    changes = TINY | {
        "data_root": str(ade), "train_dataloader.dataset.data_root": str(ade),
        "val_dataloader.dataset.data_root": str(ade), "test_dataloader.dataset.data_root": str(ade),
        "train_dataloader.batch_size": 2, "train_cfg.max_iters": 1, "train_cfg.val_interval": 2,
        "default_hooks.checkpoint.interval": 1, "default_hooks.logger.interval": 1,
        "model.backbone.img_size": 64, "model.data_preprocessor.size": (64, 64)}
    cfg = Config.fromfile(CONFIGS / SEMANTIC_FPN)
    cfg.merge_from_dict(changes)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
    for step in cfg.train_dataloader.dataset.pipeline:
        step.update({"RandomResize": {"scale": (256, 64)}, "RandomCrop": {"crop_size": (64, 64)}}.get(step.type, {}))
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.pipeline[1].scale = (256, 64)
    cfg.dump(folder / "tiny.py")
    return folder / "tiny.py"


def start(*words, **extra):
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    result = subprocess.run([*map(str, words)], text=True, timeout=300, capture_output=True,
                            env=environment | {"CUDA_VISIBLE_DEVICES": ""} | {k: str(v) for k, v in extra.items()})
    assert result.returncode == 0, result.stderr + result.stdout
    return result.stdout + result.stderr


@pytest.mark.slow
def test_train_resume_and_draw(tiny_config, pretrained, tmp_path):
    words = (sys.executable, ROOT / "segmentation/train.py", tiny_config, "--work-dir", tmp_path)
    out = start(*words, "--pretrained", pretrained)
    assert f"loaded {pretrained}: SelfPatch run, key teacher, vit_tiny, patch size 16" in out
    out = start(*words, "--resume", "--cfg-options", "train_cfg.max_iters=2")
    assert re.search(r"Iter\(train\) \[2/2\].* lr: ", out) and "Iter(train) [1/2]" not in out
    checkpoint = openmmlab.read_checkpoint(tmp_path / "iter_2.pth")
    assert {state["step"].item() for state in checkpoint["optimizer"]["state"].values()} == {2.0}
    released = tmp_path / "released.pth"
    start(sys.executable, ROOT / "convert_checkpoint.py", tmp_path / "iter_2.pth", released, "--to", "mmseg",
          "--keep_heads")
    assert "backbone.layers.0.ln1.weight" in openmmlab.read_checkpoint(released)["state_dict"]
    tested = start(sys.executable, ROOT / "segmentation/test.py", tiny_config, released, "--work-dir",
                   tmp_path / "test", "--show-dir", tmp_path / "drawn")
    scores = [re.search(r"Iter\(\w+\) \[2/2\] +(aAcc: \d+.* mAcc: \S+)", text)[1] for text in (out, tested)]
    assert scores[0] == scores[1]
    drawn = sorted((tmp_path / "drawn").iterdir())
    assert [path.name.split(".jpg")[0] for path in drawn] == ["test_0", "test_1"]  # then a count that mmsegs differ in
    with Image.open(drawn[0]) as image:
        assert image.size == (160, 64)  # the annotation, and the prediction


@pytest.mark.slow
def test_two_processes_agree(tiny_config, pretrained, tmp_path):
    (tmp_path / "rank_hook.py").write_text(RANK_HOOK)
    (tmp_path / "two.py").write_text(
        f"_base_ = [{str(tiny_config)!r}]\ncustom_imports = dict(imports=['rank_hook'])\n"
        "custom_hooks = [dict(type='SaveEveryRank')]\nparam_scheduler = []  # at once the full rate, which shows\n"
        "model = dict(backbone=dict(drop_path_rate=0.0))  # or a block may be left out for every image\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start(ROOT / "segmentation/dist_train.sh", tmp_path / "two.py", 2, "--pretrained", pretrained,
          "--work-dir", tmp_path, PYTHON=sys.executable, PYTHONPATH=tmp_path, PORT=port)
    first, second = (torch.load(tmp_path / f"rank{rank}.pth") for rank in (0, 1))
    images = [key for key in first if not torch.equal(first[key], second[key])]
    assert images and all("running_" in key for key in images)  # each rank saw other images, and has the same weights
    before = openmmlab.read_checkpoint(pretrained)["teacher"]
    for name in ("backbone.blocks.0.attn.qkv.weight", "backbone.blocks.11.mlp.fc2.weight"):
        change = (first[f"module.{name}"] - before[name]).abs().max().item()
        assert 5e-5 < change < 7e-5  # AdamW's first step is the learning rate
