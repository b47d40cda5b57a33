"""The README's first command in a short form, and the scenes that it draws."""
import json
import sys

import numpy as np
import pytest
import torch
from networks import assert_same
from PIL import Image

import demo
from main_selfpatch import build_run, get_args_parser
from selfpatch.checkpoints.loading import load_backbone
from selfpatch.distributed.processes import Process
from selfpatch.method.vision_transformer import vit_pico
from selfpatch.pretraining.resuming import fix_random_seeds
from selfpatch.visualization.scenes import MATERIALS, NAMES, Motion, draw_scene


def rng(seed=0):
    return np.random.default_rng(seed)


def test_a_scene_moves_and_its_labels_fit():
    scene = draw_scene(rng(), 160, 120, objects=(2, 3), radius=(20, 30), motion=Motion(4, speed=5, light=0.3))
    assert scene.frames.shape == (4, 120, 160, 3) and scene.materials.shape == scene.objects.shape == (4, 120, 160)
    assert np.ptp(scene.frames.astype(int), axis=-1).max() < 0.25 * 255  # colour would give objects away
    assert set(np.unique(scene.objects[0]).tolist()) in ({0, 1, 2}, {0, 1, 2, 3})
    assert not np.array_equal(scene.objects[0], scene.objects[3])
    for number in np.unique(scene.objects):  # an object has one material, which no other has
        materials = np.unique(scene.materials[scene.objects == number])
        assert len(materials) == 1 and set(np.unique(scene.objects[scene.materials == materials[0]])) == {number}
    again = draw_scene(rng(), 160, 120, objects=(2, 3), radius=(20, 30), motion=Motion(4, speed=5, light=0.3))
    assert all(np.array_equal(a, b) for a, b in zip(scene, again, strict=True))


@pytest.mark.parametrize("material", range(len(MATERIALS)), ids=NAMES)
def test_materials_have_contrast_and_no_brightness_of_their_own(material):
    patterns = [MATERIALS[material](rng(seed), 64, 12) for seed in range(8)]
    assert all(p.shape == (64, 64) and p.std() > 0.04 and p.min() > -0.2 and p.max() < 1.2 for p in patterns)
    scenes = [draw_scene(rng(seed), 32, 32, objects=(0, 0), ground=material) for seed in range(60)]
    assert {scene.materials.max() for scene in scenes} == {material}
    assert abs(np.mean([scene.frames.mean() for scene in scenes]) - 127) < 20


def test_seeds_and_purposes_have_scenes_of_their_own():
    drawn = [draw(seed, 0).frames[0, :64, :64].tobytes() for seed in (0, 1)
             for draw in (demo.training_scene, demo.unseen_scene, demo.clip)]
    assert len(set(drawn)) == 6


def test_the_untrained_network_is_the_one_that_training_begins_with():
    """As the job builds it."""
    args = get_args_parser().parse_args(["--arch", "vit_pico", "--patch_size", "8", "--out_dim", "16", "--seed", "3",
                                         "--out_dim_selfpatch", "16", "--head_hidden_dim", "16"])
    fix_random_seeds(args.seed)
    run = build_run(args, Process(), steps_per_epoch=10)
    assert_same(dict(demo.initial_backbone(3).state_dict()), dict(run.student.backbone.state_dict()))


def test_perfect_features_get_perfect_figures(monkeypatch):
    """Features that are the true labels: what is lost is at the edges of objects alone."""
    monkeypatch.setattr(demo, "MEMORY", 24)
    monkeypatch.setattr(demo, "TESTED", 8)
    monkeypatch.setattr(demo, "CLIPS", 1)
    unseen = demo.make_unseen(0)

    class Truth:
        def __init__(self, *_, **__):
            self.labels = iter([unseen.materials.numpy(), *np.array_split(unseen.clips[0].materials, 3)])

        def __call__(self, images):
            labels = torch.from_numpy(next(self.labels))[:, 4::8, 4::8].long()
            return torch.nn.functional.one_hot(labels, len(NAMES)).float()

    monkeypatch.setattr(demo, "FrameFeatures", Truth)
    figures = demo.measure(vit_pico(), unseen).figures
    assert figures["J&F"] > 0.75 and figures["mean IoU"] > 0.75 and figures["k-NN"] > 0.6


@pytest.mark.slow
def test_demo_trains_and_touches_nothing_else(tmp_path, monkeypatch, capfd):
    (tmp_path / "precious.txt").write_text("mine")
    for name, value in {"MEMORY": 16, "TESTED": 8, "CLIPS": 1, "FRAMES": 3}.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output_dir", str(tmp_path), "--epochs", "1", "--images", "64"])
    assert demo.main() == 0
    assert (tmp_path / "precious.txt").read_text() == "mine"
    assert len(list((tmp_path / "scenes").glob("*/*.jpg"))) == 64
    row = json.loads((tmp_path / "vit_pico" / "log.txt").read_text())
    out = capfd.readouterr().out
    assert f"epoch 0: image {row['train_clsloss']:.3f}, patch {row['train_patchloss']:.3f}" in out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert all(f"{name:8}   {figures['before'][name]:.3f}  {figures['after'][name]:.3f}" in out
               for name in ("J&F", "mean IoU", "k-NN"))
    assert Image.open(tmp_path / "clip.gif").n_frames == 3 and (tmp_path / "before_after.png").is_file()
    assert load_backbone(tmp_path / "vit_pico", arch="vit_pico", patch_size=8).embed_dim == 96


def test_demo_ends_where_a_job_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output_dir", str(tmp_path), "--epochs", "0", "--images", "1"])
    monkeypatch.setattr(demo, "make_unseen", lambda _: None)
    monkeypatch.setattr(demo, "measure", lambda *_: None)
    assert demo.main() == 2
