"""DAVIS folders as their users have them: gaps, EXIF, DAVIS 2016, missing ids; and several tasks under srun."""
import os
import subprocess
import sys

import numpy as np
import pytest
from davis_folder import UNTRAINED, free_port, make_davis, rewrite, run
from PIL import Image

import eval_video_segmentation as job
from davis_data import read_mask
from davis_metrics import score_folder, summarise
from vision_transformer import vit_tiny


def test_a_notebook_segments_one_video(tmp_path):
    """Without the job: what it writes is what it returns."""
    data = make_davis(tmp_path / "data", "clip")
    sequence = job.davis_data.find_sequence(data, "clip")
    masks = job.segment(sequence, job.PatchFeatures(vit_tiny(32).eval()), tmp_path / "masks")
    assert masks.shape == (4, 60, 100)
    assert all(np.array_equal(read_mask(tmp_path / "masks" / "clip" / f"{t:05}.png")[0], masks[t]) for t in range(4))


def test_gaps_are_allowed_if_asked_for(tmp_path):
    data, output = make_davis(tmp_path / "data", "clip", frames=6), tmp_path / "masks"
    (data / "JPEGImages" / "480p" / "clip" / "00003.jpg").unlink()
    assert run(data, output, *UNTRAINED) == 1 and not (output / "clip").exists()
    assert run(data, output, *UNTRAINED, "--allow_gaps") == 0
    assert sorted(p.name for p in (output / "clip").iterdir()) == [f"{t:05d}.png" for t in (0, 1, 2, 4, 5)]


def test_every_fifth_frame_is_no_gap(tmp_path):
    data = make_davis(tmp_path / "data", "clip")
    for path in sorted((*data.glob("JPEGImages/480p/clip/*"), *data.glob("Annotations/480p/clip/*")), reverse=True):
        path.rename(path.with_name(f"{5 * int(path.stem):05d}{path.suffix}"))
    assert run(data, tmp_path / "masks", *UNTRAINED) == 0


@pytest.mark.parametrize("tag", [2, 3, 6])
def test_an_orientation_tag_changes_nothing(tmp_path, capsys, tag):
    data = make_davis(tmp_path / "data", "clip")
    assert run(data, tmp_path / "plain", *UNTRAINED, "--no_score") == 0
    exif = Image.Exif()
    exif[0x0112] = tag
    segment = b"\xff\xe1" + (len(exif.tobytes()) + 2).to_bytes(2, "big") + exif.tobytes()
    for path in data.glob("JPEGImages/480p/clip/*.jpg"):
        path.write_bytes(path.read_bytes()[:2] + segment + path.read_bytes()[2:])
    assert run(data, tmp_path / "tagged", *UNTRAINED, "--no_score") == 0
    assert f"00000.jpg: EXIF orientation {tag} is ignored" in capsys.readouterr().err
    for path in (tmp_path / "plain" / "clip").iterdir():
        assert np.array_equal(read_mask(path)[0], read_mask(tmp_path / "tagged" / "clip" / path.name)[0])


def test_masks_of_davis_2016_are_one_object(tmp_path, capsys):
    data, output = make_davis(tmp_path / "data", "clip"), tmp_path / "masks"
    for path in data.glob("Annotations/480p/clip/*.png"):
        Image.fromarray(np.where(read_mask(path)[0] == 1, 255, 0).astype(np.uint8)).save(path)
    assert run(data, output, *UNTRAINED) == 0
    out, err = capsys.readouterr()
    assert "00000.png: a grey mask of 0 and 255 is read as one object" in err and "void" not in err
    assert "clip_1 " in out and "clip_2" not in out
    assert set(np.unique(read_mask(output / "clip" / "00002.png")[0])) == {0, 1}


@pytest.mark.parametrize("present_objects", [False, True])
def test_ids_with_gaps(tmp_path, capsys, present_objects):
    """Only id 5: ids 1 to 4 count as perfect in the official figure, which a line says."""
    data, output = make_davis(tmp_path / "data", "clip"), tmp_path / "masks"
    for path in data.glob("Annotations/480p/clip/*.png"):
        rewrite(path, lambda mask: np.where(mask == 1, 5, 0).astype(np.uint8))
    assert run(data, output, *UNTRAINED, *["--present_objects"] * present_objects) == 0
    out, err = capsys.readouterr()
    scores = score_folder(data, output)
    official, present = (summarise(scores, absent)[0]["J&F-Mean"] for absent in (None, {"clip": [1, 2, 3, 4]}))
    assert official == pytest.approx((4 + present) / 5)
    first = out.splitlines()[out.splitlines().index("J & F of 1 of 1 sequences") + 2].split()[0]
    assert first == f"{present if present_objects else official:.3f}"
    for text in (out, err):
        assert "clip: 1, 2, 3, 4" in text and f"{official if present_objects else present:.3f}" in text


def test_two_tasks_under_plain_srun_share_the_sequences(tmp_path):
    data, port = make_davis(tmp_path / "data", "one", "two"), free_port()
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") and k not in ("RANK", "WORLD_SIZE")}
    tasks = [subprocess.Popen([sys.executable, job.__file__, "--data_path", data, "--output_dir", tmp_path / "masks",
                               "--device", "cpu", "--no_score", *map(str, UNTRAINED)], text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              env=kept | {"OMP_NUM_THREADS": "1", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank),
                                          "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost",
                                          "MASTER_PORT": port}) for rank in (0, 1)]
    outputs = [task.communicate(timeout=120) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert sum("random weights" in stdout for stdout, _ in outputs) == 1  # one task prints
    assert sorted(p.name for p in (tmp_path / "masks").iterdir()) == ["one", "two"]
