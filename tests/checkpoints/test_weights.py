"""The weights in the project: complete, as their card says, and better than none at following objects."""
import re

import numpy as np
import pytest
import torch
from PIL import Image
from repository import ROOT
from safetensors.torch import load_file

import convert_checkpoint
import visualize
from selfpatch.checkpoints.loading import build_backbone, build_head, read_backbone
from selfpatch.method.vision_transformer import vit_tiny
from selfpatch.video.frame_features import FrameFeatures
from selfpatch.video.label_propagation import to_mask, to_one_hot
from selfpatch.video.propagation_bounds import propagate
from selfpatch.video.scores import score_sequence
from selfpatch.visualization.scenes import Motion, draw_scene

WEIGHTS = ROOT / "weights"
FILE = WEIGHTS / "vit_tiny_imagenette.safetensors"


@pytest.fixture(scope="module")
def scene():
    """A drawn clip of 320×240 with moving objects."""
    return draw_scene(np.random.default_rng(0), 320, 240, objects=(2, 3), radius=(34, 52),
                      motion=Motion(6, speed=5, light=0.35))


def test_the_file_is_what_the_card_says():
    card = (WEIGHTS / "README.md").read_text()
    state, info = read_backbone(FILE)
    assert (info.arch, info.patch_size, info.class_token, info.final_norm) == ("vit_tiny", 16, False, False)
    assert {tensor.dtype for tensor in load_file(FILE).values()} == {torch.float16}
    sizes = [sum(t.numel() for t in tensors) / 1e6 for tensors in (state.values(), build_head(info).parameters())]
    assert f"{sizes[0]:.1f} + {sizes[1]:.1f} million" in card
    assert f"{FILE.stat().st_size / 1e6:.1f} MB" in card


def follow(model, scene) -> float:
    """J & F of the first frame's masks, propagated through the clip."""
    extract, first = FrameFeatures(model.eval(), batch_size=6), scene.objects[0]
    labels = to_one_hot(torch.from_numpy(first[8::16, 8::16]))[0]
    soft = propagate(iter(extract(scene.frames)), labels)
    masks = np.stack([first, *(to_mask(one, 16, *first.shape).numpy() for one in soft)])
    return float(np.mean(score_sequence(scene.objects, masks)))


def test_objects_of_a_drawn_clip_are_followed_far_better_than_without_training(scene):
    trained = build_backbone(*read_backbone(FILE))
    torch.manual_seed(0)
    assert follow(trained, scene) > follow(vit_tiny(), scene) + 0.15


def test_pictures_and_timm(scene, tmp_path):
    Image.fromarray(scene.frames[0]).save(tmp_path / "scene.png")
    for what in ("attention", "positives"):  # which need the SelfPatch head
        visualize.main(visualize.get_args_parser().parse_args([
            what, "--pretrained_weights", str(FILE), "--image_path", str(tmp_path / "scene.png"),
            "--output", str(tmp_path / f"{what}.png")]))
        assert (tmp_path / f"{what}.png").is_file()
    convert_checkpoint.convert_file(FILE, tmp_path / "timm.pth", "timm")
    assert (tmp_path / "timm.pth").is_file()


def test_figures_in_the_readme_are_the_cards():
    card, readme = ((folder / "README.md").read_text() for folder in (WEIGHTS, WEIGHTS.parent))
    for row in ("k-NN, k = 20", "J & F"):
        figures = re.search(rf"^\| {re.escape(row)}[^|]*\| ([^|]+) \| ([^|]+) \|", card, re.MULTILINE)
        assert figures and f"| {figures[2]} | {figures[1]} |" in readme
