"""segmentation/: features of the backbone, released models, invalid input, and whole jobs on a tiny ADE20K."""
import os
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from forked import free_port
from golden_rules import set_weights
from image_cases import write_damaged_png
from openmmlab_data import (
    check_stored_pixels,
    script_error,
    skip_without_packages,
    start,
    write_ade,
)
from PIL import Image
from repository import ROOT

skip_without_packages()

from mmengine.config import Config  # noqa: E402
from mmengine.runner import load_checkpoint  # noqa: E402
from mmseg.models.backbones import VisionTransformer as MMSegViT  # noqa: E402
from mmseg.registry import DATASETS, MODELS, TRANSFORMS  # noqa: E402
from mmseg.utils import register_all_modules  # noqa: E402

from segmentation.backbone import SelfPatchViT  # noqa: E402
from selfpatch.checkpoints.files import CheckpointError, read_checkpoint  # noqa: E402
from selfpatch.checkpoints.layouts import to_mmseg_names  # noqa: E402
from selfpatch.errors import run_main  # noqa: E402
from selfpatch.method.vision_transformer import vit_tiny  # noqa: E402
from selfpatch.openmmlab import jobs as openmmlab  # noqa: E402
from selfpatch.openmmlab.config import load_config  # noqa: E402

CONFIGS = ROOT / "segmentation" / "configs"
SEMANTIC_FPN = CONFIGS / "semantic-fpn_vit-small-16_40k_ade20k.py"
TINY = {"model.backbone.embed_dim": 192, "model.backbone.num_heads": 3, "model.neck.in_channels": [192] * 4}


@pytest.fixture
def cfg():
    """Semantic FPN with ViT-Ti."""
    return load_config(SEMANTIC_FPN, TINY)


@pytest.fixture(scope="module")
def ade(tmp_path_factory):
    root = tmp_path_factory.mktemp("ade")
    write_ade(root)
    return root


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "checkpoint.pth"
    state = {f"backbone.{name}": t for name, t in set_weights(vit_tiny(), 0).state_dict().items()}
    torch.save({"teacher": state | {"ca_head.cls_token": torch.zeros(1, 1, 192)}, "epoch": 3}, path)
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Features and released models


def interpolate(pos_embed, side, grid):
    pos = pos_embed.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    return F.interpolate(pos, size=grid, mode="bicubic", align_corners=False).permute(0, 2, 3, 1).flatten(1, 2)


@pytest.mark.parametrize(("patch_size", "img_size", "size", "padded"), [
    (16, 224, (224, 224), (224, 224)), (16, 512, (512, 512), (512, 512)), (16, 512, (200, 330), (208, 336)),
    (8, 128, (60, 100), (64, 104))])
@torch.no_grad()
def test_features_equal_those_of_the_backbone(tmp_path, patch_size, img_size, size, padded):
    source = set_weights(vit_tiny(patch_size=patch_size), 0).eval()
    torch.save(source.state_dict(), tmp_path / "backbone.pth")
    ours = SelfPatchViT(img_size=img_size, patch_size=patch_size, embed_dim=192, num_heads=3,
                        init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "backbone.pth")}).eval()
    ours.init_weights()
    grid, side = tuple(n // patch_size for n in padded), img_size // patch_size
    pos = interpolate(source.pos_embed, 224 // patch_size, (side, side))  # to the crops
    assert torch.equal(ours.pos_embed, pos)
    source.interpolate_pos_encoding = lambda grid_size: interpolate(pos, side, grid)  # and from there to the image
    x = torch.randn(1, 3, *size)
    tokens = source.get_intermediate_layers(F.pad(x, (0, padded[1] - size[1], 0, padded[0] - size[0])), (2, 5, 8, 11))
    maps = ours(x)
    assert [m.shape for m in maps] == [(1, 192, *grid)] * 4
    for m, t in zip(maps, tokens, strict=True):
        torch.testing.assert_close(m.flatten(2).transpose(1, 2), t, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("class_token", [False, True])
@torch.no_grad()
def test_features_equal_those_of_mmsegs_vit(class_token):
    """mmseg's ViT is the network that released segmenters were trained with."""
    ours = SelfPatchViT(img_size=64, embed_dim=192, num_heads=3, class_token=class_token).eval()
    state = to_mmseg_names(set_weights(ours, 0).state_dict())
    theirs = MMSegViT(img_size=64, embed_dims=192, num_heads=3, out_indices=(2, 5, 8, 11), patch_bias=True,
                      norm_cfg={"type": "LN", "eps": 1e-6}, with_cls_token=class_token)
    theirs.eval()
    token = {} if class_token else {"cls_token": torch.zeros(1, 1, 192),  # mmseg creates one and drops it
                                    "pos_embed": F.pad(state["pos_embed"], (0, 0, 1, 0))}
    theirs.load_state_dict(state | token)
    for size in ((64, 64), (40, 72)):
        x = torch.randn(2, 3, *size)
        for our, their in zip(ours(x), theirs(x), strict=True):
            torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The file of a released Semantic FPN, whose backbone has mmseg's names, and the model that it was made from."""
    register_all_modules()
    source = MODELS.build(load_config(SEMANTIC_FPN, TINY).model).eval()
    set_weights(source.backbone, 1)
    state = {f"backbone.{name}": t for name, t in to_mmseg_names(source.backbone.state_dict()).items()}
    state |= {name: t for name, t in source.state_dict().items() if not name.startswith("backbone.")}
    assert "backbone.layers.11.ffn.layers.0.0.weight" in state and not any("blocks" in name for name in state)
    path = tmp_path_factory.mktemp("released") / "segmenter.pth"
    torch.save({"meta": {"CLASSES": ("wall", "building")}, "state_dict": state}, path)
    return path, source


@torch.no_grad()
def test_released_segmenter_loads(released, cfg):
    path, source = released
    x = torch.randn(1, 3, 64, 96)
    state, info = openmmlab.read_model(path, cfg)
    assert info.kind == "mmseg segmenter"
    read_by_us, read_by_mmengine = (MODELS.build(cfg.model).eval() for _ in range(2))
    read_by_us.load_state_dict(state)
    load_checkpoint(read_by_mmengine, str(path), strict=True)  # as mmseg's own tools do
    for model in (read_by_us, read_by_mmengine):
        for ours, theirs in zip(model.backbone(x), source.backbone(x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(x, mode="tensor"), source(x, mode="tensor"), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_unused_class_token_is_dropped(released, cfg, tmp_path):
    """mmseg's ViT saves one even with with_cls_token=False; only the config can tell that it is unused."""
    state, source = torch.load(released[0], weights_only=True)["state_dict"], released[1]
    token = {"backbone.cls_token": torch.ones(1, 1, 192),
             "backbone.pos_embed": torch.cat([torch.ones(1, 1, 192), state["backbone.pos_embed"]], dim=1)}
    torch.save({"state_dict": state | token}, tmp_path / "token.pth")
    x = torch.randn(1, 3, 64, 96)
    assert openmmlab.read_model(tmp_path / "token.pth", cfg)[1].class_token
    cfg.model.backbone.class_token = False
    state, info = openmmlab.read_model(tmp_path / "token.pth", cfg)
    model = MODELS.build(cfg.model).eval()
    model.load_state_dict(state)
    assert not info.class_token
    torch.testing.assert_close(model(x, mode="tensor"), source(x, mode="tensor"), rtol=1e-5, atol=1e-5)


def test_segmenter_with_final_norm_is_refused(released, cfg, tmp_path):
    state = torch.load(released[0], weights_only=True)["state_dict"]
    state |= {"backbone.ln1.weight": torch.ones(192), "backbone.ln1.bias": torch.zeros(192)}
    torch.save({"state_dict": state}, tmp_path / "normed.pth")
    with pytest.raises(CheckpointError, match="norm after the last block"):
        openmmlab.read_model(tmp_path / "normed.pth", cfg)


# ----------------------------------------------------------------------------------------------------------------------
# Invalid input


@pytest.mark.parametrize(("annotation", "workers", "message"), [
    (np.full((64, 80), 151, np.uint8), 0, r"0\.png has the id 151, but ADE20K's are 0 \(nothing\) and 1 to 150: use"),
    (np.full((64, 80), 254, np.uint8), 1, r"^test\.py: error: \S+0\.png has the id 254, but ADE20K's are 0"),
    (np.zeros((64, 80), np.uint16), 0, r"0\.png has mode I;16: annotations are 8-bit images of ids"),
    (np.zeros((64, 80, 3), np.uint8), 0, r"0\.png has mode RGB"),
    (np.zeros((64, 81), np.uint8), 0, r"0\.png has 64 rows of 81 pixels, but \S+0\.jpg has 64 of 80"),
    (None, 0, r"cannot read the image \S+0\.png \(No such file.*; it is the annotation of \S+0\.jpg"),
    (write_damaged_png, 1, r"cannot read the image \S+0\.png .*; it is the annotation of \S+0\.jpg"),
    (os.mkfifo, 0, r"0\.png is not a regular file; it is the annotation of \S+0\.jpg"),
    (lambda path: Image.new("L", (80, 64)).save(path, "JPEG"), 0,
     r"0\.png is a JPEG, whose compression changes ids")],
    ids=["151", "254 in a worker", "16 bits", "RGB", "size", "missing", "damaged", "FIFO", "JPEG"])
def test_invalid_annotation_is_one_line(tmp_path, capsys, monkeypatch, annotation, workers, message):
    monkeypatch.setattr(sys, "argv", ["test.py"])
    monkeypatch.setenv("LOCAL_RANK", "1")  # reported from every process, since others may not meet the file
    for folder in ("images/validation", "annotations/validation"):
        (tmp_path / folder).mkdir(parents=True)
    Image.new("RGB", (80, 64)).save(tmp_path / "images/validation/0.jpg")
    path = tmp_path / "annotations/validation/0.png"
    if isinstance(annotation, np.ndarray):
        Image.fromarray(annotation).save(path)
    elif annotation:
        annotation(path)
    cfg = load_config(SEMANTIC_FPN, data_root=tmp_path)
    loader = torch.utils.data.DataLoader(DATASETS.build(cfg.test_dataloader.dataset), num_workers=workers,
                                         collate_fn=lambda samples: samples)
    with pytest.raises(SystemExit) as stop:
        run_main(next, iter(loader))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and re.search(message, error) and error.count("\n") == 1


@pytest.mark.parametrize("tag", [2, 3, 6])
@pytest.mark.parametrize("pipeline", ["train_dataloader", "test_dataloader"])
def test_photographs_are_read_as_stored_like_their_annotations(tmp_path, tag, pipeline):
    load = TRANSFORMS.build(load_config(SEMANTIC_FPN)[pipeline].dataset.pipeline[0])
    check_stored_pixels(load, tmp_path, tag)


def test_invalid_options_end_with_one_line(ade, pretrained, tmp_path, capsys):
    def error(*options, data_root=ade, width=192):
        return script_error(
            capsys, "segmentation/train.py", SEMANTIC_FPN, "--data-root", data_root, "--work-dir", tmp_path / "run",
            *options, "--cfg-options", f"model.backbone.embed_dim={width}", "model.backbone.num_heads=3",
            f"model.neck.in_channels=[{width},{width},{width},{width}]")

    small_patches = tmp_path / "patch8.pth"
    torch.save(vit_tiny(patch_size=8, img_size=64).state_dict(), small_patches)
    (tmp_path / "empty").mkdir()
    assert (f"{small_patches} holds vit_tiny with embed_dim 192 and patch size 8, but the config says embed_dim 192 "
            "and patch_size 16") in error("--pretrained", small_patches)
    assert "patch size 16, but the config says embed_dim 384" in error("--pretrained", pretrained, width=384)
    assert f"there is no {tmp_path}/gone" in error("--pretrained", pretrained, data_root=tmp_path / "gone")
    assert f"{tmp_path}/empty/ is empty" in error("--pretrained", pretrained, data_root=tmp_path / "empty")
    assert "--pretrained is empty" in error()
    assert "model.decode_head.in_channels is [256, 256, 256, 256], but its input maps have 128 channels" in error(
        "--cfg-options", "model.neck.out_channels=128", "--pretrained", pretrained)
    assert not (tmp_path / "run").exists()


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
    """A config file for one iteration of Semantic FPN with ViT-Ti on crops of 64 pixels."""
    folder = tmp_path_factory.mktemp("configs")
    changes = TINY | {
        "data_root": str(ade), "train_dataloader.dataset.data_root": str(ade),
        "val_dataloader.dataset.data_root": str(ade), "test_dataloader.dataset.data_root": str(ade),
        "train_dataloader.batch_size": 2, "train_cfg.max_iters": 1, "train_cfg.val_interval": 2,
        "default_hooks.checkpoint.interval": 1, "default_hooks.logger.interval": 1,
        "model.backbone.img_size": 64, "model.data_preprocessor.size": (64, 64)}
    cfg = Config.fromfile(SEMANTIC_FPN)
    cfg.merge_from_dict(changes)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
    for step in cfg.train_dataloader.dataset.pipeline:
        step.update({"RandomResize": {"scale": (256, 64)}, "RandomCrop": {"crop_size": (64, 64)}}.get(step.type, {}))
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.pipeline[1].scale = (256, 64)
    cfg.dump(folder / "tiny.py")
    return folder / "tiny.py"


@pytest.mark.slow
def test_train_resume_and_draw(tiny_config, pretrained, tmp_path):
    words = (sys.executable, ROOT / "segmentation/train.py", tiny_config, "--work-dir", tmp_path)
    out = start(*words, "--pretrained", pretrained)
    assert f"loaded {pretrained}: SelfPatch run, key teacher, vit_tiny, patch size 16" in out
    out = start(*words, "--resume", "--cfg-options", "train_cfg.max_iters=2")
    assert re.search(r"Iter\(train\) \[2/2\].* lr: ", out) and "Iter(train) [1/2]" not in out
    checkpoint = read_checkpoint(tmp_path / "iter_2.pth")
    assert {state["step"].item() for state in checkpoint["optimizer"]["state"].values()} == {2.0}
    released = tmp_path / "released.pth"
    start(sys.executable, ROOT / "convert_checkpoint.py", tmp_path / "iter_2.pth", released, "--to", "mmseg",
          "--keep_heads")
    assert "backbone.layers.0.ln1.weight" in read_checkpoint(released)["state_dict"]
    tested = start(sys.executable, ROOT / "segmentation/test.py", tiny_config, released, "--work-dir",
                   tmp_path / "test", "--show-dir", tmp_path / "drawn")
    scores = [re.search(r"Iter\(\w+\) \[2/2\] +(aAcc: \d+.* mAcc: \S+)", text)[1] for text in (out, tested)]
    assert scores[0] == scores[1]
    drawn = sorted((tmp_path / "drawn").iterdir())
    # the rest of the name depends on mmseg's version
    assert [path.name.split(".jpg")[0] for path in drawn] == ["test_0", "test_1"]
    with Image.open(drawn[0]) as image:
        assert image.size == (160, 64)  # annotation and prediction


@pytest.mark.slow
def test_two_processes_agree(tiny_config, pretrained, tmp_path):
    (tmp_path / "rank_hook.py").write_text(RANK_HOOK)
    (tmp_path / "two.py").write_text(
        f"_base_ = [{str(tiny_config)!r}]\ncustom_imports = dict(imports=['rank_hook'])\n"
        "custom_hooks = [dict(type='SaveEveryRank')]\nparam_scheduler = []  # the full learning rate from the start\n"
        "model = dict(backbone=dict(drop_path_rate=0.0))  # else a block may be dropped for all images\n")
    start(ROOT / "segmentation/dist_train.sh", tmp_path / "two.py", 2, "--pretrained", pretrained,
          "--work-dir", tmp_path, PYTHON=sys.executable, PYTHONPATH=tmp_path, PORT=free_port())
    first, second = (torch.load(tmp_path / f"rank{rank}.pth") for rank in (0, 1))
    different = [key for key in first if not torch.equal(first[key], second[key])]
    assert different and all("running_" in key for key in different)  # different images, equal weights
    before = read_checkpoint(pretrained)["teacher"]
    for name in ("backbone.blocks.0.attn.qkv.weight", "backbone.blocks.11.mlp.fc2.weight"):
        change = (first[f"module.{name}"] - before[name]).abs().max().item()
        assert 5e-5 < change < 7e-5  # AdamW's first step is the learning rate
