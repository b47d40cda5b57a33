"""DAVIS folders as their users have them: gaps, EXIF, DAVIS 2016, missing ids; and several tasks under srun."""

import cv2
import numpy as np
import pytest
from davis_folder import UNTRAINED, make_davis, rewrite, run
from forked import free_port, run_program
from image_cases import png
from PIL import Image

import eval_video_segmentation as job
from selfpatch.data.files import UnreadableImage
from selfpatch.errors import ConfigError
from selfpatch.method.vision_transformer import vit_tiny
from selfpatch.video import davis as davis_data
from selfpatch.video.davis import load_frame, read_mask
from selfpatch.video.scores import score_folder, summarise


def test_a_notebook_segments_one_video(tmp_path):
    """Without the job: what it writes is what it returns."""
    data = make_davis(tmp_path / "data", "clip")
    sequence = job.davis_data.find_sequence(data, "clip")
    masks = job.segment(sequence, job.FrameFeatures(vit_tiny(32).eval()), tmp_path / "masks")
    assert masks.shape == (4, 60, 100)
    assert all(np.array_equal(read_mask(tmp_path / "masks" / "clip" / f"{t:05}.png")[0], masks[t]) for t in range(4))


def test_gaps_are_allowed_if_asked_for(tmp_path):
    data, output = make_davis(tmp_path / "data", "clip", frames=6), tmp_path / "masks"
    (data / "JPEGImages" / "480p" / "clip" / "00003.jpg").unlink()
    assert run(data, output, *UNTRAINED) == 1 and not (output / "clip").exists()
    assert run(data, output, *UNTRAINED, "--allow_gaps") == 0
    assert sorted(p.name for p in (output / "clip").iterdir()) == [f"{t:05d}.png" for t in (0, 1, 2, 4, 5)]


def test_without_the_last_frames_the_job_and_the_metrics_agree(tmp_path, capsys):
    """The last frame there is has an annotation that is not the last, so both score it."""
    data, output = make_davis(tmp_path / "data", "clip", frames=6), tmp_path / "masks"
    (data / "JPEGImages" / "480p" / "clip" / "00005.jpg").unlink()
    assert run(data, output, *UNTRAINED) == 1
    assert run(data, output, *UNTRAINED, "--allow_gaps") == 0
    figures = [f"{value:.3f}" for value in summarise(score_folder(data, output))[0].values()]
    printed = capsys.readouterr().out.splitlines()
    assert printed[printed.index("J & F of 1 of 1 sequences") + 2].split() == figures


def test_every_fifth_frame_is_no_gap(tmp_path):
    data = make_davis(tmp_path / "data", "clip")
    for path in sorted((*data.glob("JPEGImages/480p/clip/*"), *data.glob("Annotations/480p/clip/*")), reverse=True):
        path.rename(path.with_name(f"{5 * int(path.stem):05d}{path.suffix}"))
    assert run(data, tmp_path / "masks", *UNTRAINED) == 0


def tag_jpeg(path, tag):
    exif = Image.Exif()
    exif[0x0112] = tag
    segment = b"\xff\xe1" + (len(exif.tobytes()) + 2).to_bytes(2, "big") + exif.tobytes()
    path.write_bytes(path.read_bytes()[:2] + segment + path.read_bytes()[2:])


@pytest.mark.parametrize("tag, first", [(2, 0), (3, 0), (6, 1)])
def test_an_orientation_tag_changes_nothing(tmp_path, capsys, tag, first):
    """Of all frames, or of those after the first, and of the annotation."""
    data = make_davis(tmp_path / "data", "clip")
    assert run(data, tmp_path / "plain", *UNTRAINED, "--no_score") == 0
    for path in sorted(data.glob("JPEGImages/480p/clip/*.jpg"))[first:]:
        tag_jpeg(path, tag)
    exif = Image.Exif()
    exif[0x0112] = tag
    annotation = data / "Annotations/480p/clip/00000.png"
    Image.open(annotation).save(annotation, exif=exif)
    assert run(data, tmp_path / "tagged", *UNTRAINED, "--no_score") == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if f"EXIF orientation {tag} is ignored" in line]
    assert len(notes) == 2 and f"0000{first}.jpg: " in "".join(notes) and "00000.png: " in "".join(notes)
    for path in (tmp_path / "plain" / "clip").iterdir():
        assert np.array_equal(read_mask(path)[0], read_mask(tmp_path / "tagged" / "clip" / path.name)[0])


def test_hidden_files_among_frames_and_masks(tmp_path):
    data = make_davis(tmp_path / "data", "clip")
    for name in ("JPEGImages/480p/clip/._00000.jpg", "Annotations/480p/clip/._00000.png"):
        (data / name).write_bytes(b"no image")
    assert run(data, tmp_path / "masks", *UNTRAINED) == 0
    assert len(score_folder(data, tmp_path / "masks")) == 1


def test_frames_of_16_bits_follow_the_rule_of_images(tmp_path):
    """A PNG named .jpg: dark values are refused, not read as black."""
    ramp = np.stack([np.linspace(0, 4095, 6000).reshape(60, 100).astype(np.uint16)] * 3, axis=-1)
    (tmp_path / "dark.jpg").write_bytes(png(ramp, 16))
    (tmp_path / "full.jpg").write_bytes(png(ramp * 16, 16))
    with pytest.raises(UnreadableImage, match="no value above 4095"):
        load_frame(tmp_path / "dark.jpg")
    assert load_frame(tmp_path / "full.jpg").image.max() == 255


@pytest.mark.parametrize("width, height", [(40000, 1), (1, 40000), (700, 40)])
def test_a_long_frame_is_refused_before_it_is_enlarged(tmp_path, width, height):
    Image.new("RGB", (width, height)).save(tmp_path / "0.jpg")
    with pytest.raises(ConfigError, match=f"0.jpg: is {width}×{height}, but"):
        load_frame(tmp_path / "0.jpg")


def test_what_opencv_cannot_do_is_one_line(tmp_path, monkeypatch):
    def fail(*_):
        raise cv2.error("Insufficient memory")

    Image.new("RGB", (64, 48)).save(tmp_path / "0.jpg")
    monkeypatch.setattr(cv2, "resize", fail)
    with pytest.raises(UnreadableImage, match="0.jpg .OpenCV"):
        load_frame(tmp_path / "0.jpg")


def test_the_first_annotation_is_read_once(tmp_path, monkeypatch):
    data, read, opened = make_davis(tmp_path / "data", "clip"), davis_data.read_bytes, []
    monkeypatch.setattr(davis_data, "read_bytes", lambda path: opened.append(path) or read(path))
    assert run(data, tmp_path / "masks", *UNTRAINED) == 0
    assert opened.count(data / "Annotations" / "480p" / "clip" / "00000.png") == 1


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
    outputs = run_program(job.__file__, "--data_path", data, "--output_dir", tmp_path / "masks", "--device", "cpu",
                          "--no_score", *UNTRAINED, envs=[
                              {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_STEP_NUM_TASKS": "2",
                               "SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": port} for rank in (0, 1)])
    assert [status for status, *_ in outputs] == [0, 0], outputs
    assert sum("random weights" in stdout for _, stdout, _ in outputs) == 1  # one task prints
    assert sorted(p.name for p in (tmp_path / "masks").iterdir()) == ["one", "two"]
