"""The weights in the project: complete, as their card says, and better than none at telling textures apart."""
import re

import numpy as np
import pytest
import torch
from PIL import Image
from repository import ROOT
from safetensors.torch import load_file

import convert_checkpoint
import demo
import visualize
from selfpatch.checkpoints.loading import build_backbone, build_head, read_backbone
from selfpatch.video.frame_features import FrameFeatures

WEIGHTS = ROOT / "weights"
FILES = sorted(WEIGHTS.glob("*.safetensors"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_file_is_what_the_card_says(file):
    card = (WEIGHTS / "README.md").read_text()
    state, info = read_backbone(file)
    assert (info.arch, info.patch_size, info.class_token, info.final_norm) == ("vit_pico", 8, False, False)
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}
    sizes = [sum(t.numel() for t in tensors) / 1e6 for tensors in (state.values(), build_head(info).parameters())]
    assert f"{sizes[0]:.1f} + {sizes[1]:.1f} million" in card
    assert f"{file.stat().st_size / 1e6:.1f} MB" in card and file.name in card


@torch.inference_mode()
def test_grounds_of_drawn_scenes_are_told_apart_far_better_than_without_training():
    """Scenes are far from the photographs that they were trained on."""
    images = np.concatenate([demo.unseen_scene(0, number).frames for number in range(demo.MEMORY + demo.TESTED)])
    backbones = [demo.initial_backbone(0), *(build_backbone(*read_backbone(file)) for file in FILES)]
    untrained, *trained = (demo.tell_grounds(FrameFeatures(one.eval(), batch_size=50)(images)) for one in backbones)
    assert len(trained) == 2 and min(trained) > untrained + 0.1


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_pictures_and_timm(file, tmp_path):
    Image.fromarray(demo.unseen_scene(0, 0).frames[0]).save(tmp_path / "scene.png")
    for what in ("attention", "positives"):  # which need the SelfPatch head
        visualize.main(visualize.get_args_parser().parse_args([
            what, "--pretrained_weights", str(file), "--image_path", str(tmp_path / "scene.png"),
            "--output", str(tmp_path / f"{what}.png")]))
        assert (tmp_path / f"{what}.png").is_file()
    convert_checkpoint.convert_file(file, tmp_path / "timm.pth", "timm")
    assert (tmp_path / "timm.pth").is_file()


def test_figures_in_the_readme_are_the_cards():
    card, readme = ((folder / "README.md").read_text() for folder in (WEIGHTS, WEIGHTS.parent))
    for row in ("k-NN, k = 20", "J & F"):
        figures = re.search(rf"^\| {re.escape(row)}[^|]*(\|(?: [^|]+ \|){{3}})$", card, re.MULTILINE)
        assert figures and figures[1] in readme
