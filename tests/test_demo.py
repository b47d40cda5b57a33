"""The README's first command, on a data set of a few scenes."""
import json
import re
import sys

import numpy as np
import pytest
from PIL import Image

import demo


def test_clip_moves_and_its_masks_fit():
    frames, masks = demo.clip(0, 4, 160, 120)
    assert [f.size for f in frames] == [m.size for m in masks] == [(160, 120)] * 4
    ids = [set(np.unique(np.asarray(m)).tolist()) for m in masks]
    assert ids[0] >= {0, 1, 2} and max(ids[0]) <= 3
    assert not np.array_equal(np.asarray(masks[0]), np.asarray(masks[3]))
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(masks, demo.clip(0, 4, 160, 120)[1],
                                                                         strict=True))


@pytest.mark.slow
def test_demo_trains_and_touches_nothing_else(tmp_path, monkeypatch, capfd):
    (tmp_path / "precious.txt").write_text("mine")
    monkeypatch.setattr(demo, "SCENES", 8)
    monkeypatch.setattr(demo, "FRAMES", 2)
    monkeypatch.setattr(demo, "CLIP_FRAMES", 3)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output_dir", str(tmp_path), "--epochs", "1"])
    assert demo.main() == 0
    assert (tmp_path / "precious.txt").read_text() == "mine"
    assert len(list((tmp_path / "images" / "scenes").glob("*.jpg"))) == 16
    row = json.loads((tmp_path / "vit_tiny" / "log.txt").read_text())
    out = capfd.readouterr().out
    assert f"epoch 0: image {row['train_clsloss']:.3f}, patch {row['train_patchloss']:.3f}" in out
    assert re.search(r"scores.png: before 0\.\d+, after 0\.\d+", out)
    assert Image.open(tmp_path / "overlay.gif").n_frames == 3 and (tmp_path / "scores.png").is_file()


def test_demo_ends_where_a_job_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output_dir", str(tmp_path), "--epochs", "0"])
    monkeypatch.setattr(demo, "SCENES", 1)
    monkeypatch.setattr(demo, "evaluate", lambda *_: None)
    assert demo.main() == 2
