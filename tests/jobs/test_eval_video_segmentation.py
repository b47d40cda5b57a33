"""The DAVIS job: the published masks, out of memory, several processes, and data that cannot be used."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from davis_folder import UNTRAINED, make_davis, rewrite, run
from forked import ranks, run_program
from golden_rules import GOLDEN, assert_close, load, set_weights
from PIL import Image

import eval_video_segmentation as job
from selfpatch.method.vision_transformer import VisionTransformer, vit_tiny
from selfpatch.video.davis import DAVIS_PALETTE, DataError, imwrite_indexed, load_frame, read_mask
from selfpatch.video.label_propagation import to_mask
from selfpatch.video.propagation_bounds import propagate
from selfpatch.video.scores import score_folder, summarise

CLIP = GOLDEN / "davis_clip"


def test_golden_frame(tmp_path):
    golden = load("davis_frame.npz")
    frame, annotation = (next(CLIP.glob(f"{kind}/480p/*/00000.*")) for kind in ("JPEGImages", "Annotations"))
    image, *size = job.read_frame(frame)
    assert list(image.shape) == golden["frame_shape"].tolist() and size == golden["size"].tolist()
    assert_close(image[:, ::37, ::41], golden["frame"])
    assert_close(image.double().mean((1, 2)), golden["frame_mean"])
    assert_close(image.double().std((1, 2), correction=0), golden["frame_std"])
    labels = job.read_seg(annotation, 16)[0]
    assert list(labels.shape) == golden["labels_shape"].tolist()
    assert np.array_equal(labels.argmax(1)[0].numpy(), golden["labels"])
    cv2.imwrite(str(tmp_path / "0.jpg"), cv2.imread(str(frame)).transpose(1, 0, 2))
    imwrite_indexed(tmp_path / "0.png", np.ascontiguousarray(read_mask(annotation)[0].T))
    assert list(job.read_frame(tmp_path / "0.jpg")[0].shape) == golden["portrait_shape"].tolist()
    assert list(job.read_seg(tmp_path / "0.png", 16)[0].shape) == golden["portrait_labels_shape"].tolist()


def agreement(folder: Path, published: str) -> list[float]:
    """Share of equal pixels between results and the published ones, for each frame."""
    shares = []
    for path in sorted(folder.rglob("*.png")):
        expected = Image.open(CLIP / published / path.relative_to(folder))
        image = Image.open(path)
        assert image.mode == "P" and image.getpalette() == expected.getpalette()
        shares.append((np.array(image) == np.array(expected)).mean())
    return shares


def keep_frames(data: Path, count: int) -> None:
    for path in (*data.glob("JPEGImages/480p/*/*.jpg"), *data.glob("Annotations/480p/*/*.png")):
        if int(path.stem) >= count:
            path.unlink()


@pytest.mark.parametrize("precision, frames, least", [("fp32", 14, 0.9999), ("bf16", 3, 0.999)])
def test_golden_clip(precision, frames, least, tmp_path, capsys):
    data, weights, output = tmp_path / "data", tmp_path / "backbone.pth", tmp_path / "masks"
    shutil.copytree(CLIP, data)
    keep_frames(data, frames)
    model = set_weights(vit_tiny(), int((CLIP / "salt.txt").read_text()))
    torch.save({"teacher": {f"backbone.{name}": p for name, p in model.state_dict().items()}}, weights)
    assert run(data, output, "--pretrained_weights", weights, "--precision", precision) == 0
    shares = agreement(output, "expected")
    assert len(shares) == frames and min(shares) >= least and shares[0] == 1
    printed = capsys.readouterr().out.splitlines()
    if precision == "fp32":  # scores are from memory; these are from the PNGs
        figures = [f"{value:.3f}" for value in summarise(score_folder(data, output))[0].values()]
        assert printed[printed.index("J & F of 1 of 1 sequences") + 2].split() == figures


def test_golden_clip_of_dino(tmp_path):
    """A backbone with class token and final norm, by DINO's own script: its features are taken after the norm."""
    data, weights, output = tmp_path / "data", tmp_path / "dino.pth", tmp_path / "masks"
    shutil.copytree(CLIP, data)
    keep_frames(data, 5)
    model = set_weights(vit_tiny(class_token=True, final_norm=True), int((CLIP / "salt.txt").read_text()))
    torch.save(model.state_dict(), weights)
    assert run(data, output, "--pretrained_weights", weights, "--no_score") == 0
    shares = agreement(output, "expected_dino")
    assert len(shares) == 5 and min(shares) >= 0.9999


def test_batches_are_halved_when_memory_runs_out(capsys):
    torch.manual_seed(0)
    model, sizes = VisionTransformer(32, 16, embed_dim=24, depth=1, num_heads=3).eval(), []
    whole, limit = model.features, 2

    def short_of_memory(images, layer):
        sizes.append(len(images))
        if len(images) > limit:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return whole(images, layer)

    frames = np.random.RandomState(0).randint(0, 256, (7, 32, 48, 3), np.uint8)
    with torch.inference_mode():
        expected = job.FrameFeatures(model, torch.device("cpu"), torch.float32, 7)(frames)
        model.features = short_of_memory
        extract = job.FrameFeatures(model, torch.device("cpu"), torch.float32, 6)
        torch.testing.assert_close(extract(frames), expected)
        assert sizes == [6, 3, 1, 1, 1, 1, 1, 1, 1] and extract.batch_size == 1
        assert "--bs 1" in capsys.readouterr().err
        limit = 0
        with pytest.raises(DataError, match="out of memory"):
            extract(frames)


# ---------------------------------------------------------------- the command

def test_dinos_names_are_in_dinos_place():
    for name in ("read_frame", "read_seg", "to_one_hot", "norm_mask", "restrict_neighborhood", "label_propagation",
                 "imwrite_indexed"):
        assert callable(getattr(job, name)), name


def rgb(path: Path) -> None:
    Image.open(path).convert("RGB").save(path)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def resize(frames: Path, masks: Path, size: tuple[int, int]) -> None:
    for path in frames.iterdir():
        Image.new("RGB", size).save(path)
    for path in masks.iterdir():
        imwrite_indexed(path, np.ones(size[::-1], np.uint8))


BAD = {  # what is done to a sequence's frames and masks, and words of the line that reports it
    "no-frames": (lambda f, m: shutil.rmtree(f), ("no-frames", "no frames")),
    "no-mask": (lambda f, m: (m / "00000.png").unlink(), ("00000.png", "missing")),
    "no-object": (lambda f, m: rewrite(m / "00000.png", lambda a: 0 * a), ("00000.png", "has no object")),
    "gap": (lambda f, m: (f / "00002.jpg").unlink(), ("lacks frame 00002", "--allow_gaps")),
    "fifo": (lambda f, m: ((f / "00002.jpg").unlink(), os.mkfifo(f / "00002.jpg")), ("00002.jpg", "not a regular")),
    "folder": (lambda f, m: ((f / "00001.jpg").unlink(), (f / "00001.jpg").mkdir()), ("00001.jpg", "not a regular")),
    "huge": (lambda f, m: Image.new("1", (14000, 14000)).save(f / "00001.jpg"), ("00001.jpg", "pixels")),
    "bad-later-mask": (lambda f, m: halve(m / "00002.png"), ("00002.png", "segmented, but not scored", "cannot read")),
    "small-later-mask": (lambda f, m: rewrite(m / "00002.png", lambda a: a[:50]), ("00002.png", "100×50", "100×60")),
    "no-end": (lambda f, m: (f / "00003.jpg").unlink(), ("lacks frame 00003", "--allow_gaps")),
    "gap-by-masks": (lambda f, m: [(f / f"0000{t}.jpg").unlink() for t in (1, 3)], ("lacks frame 00001, 00003",)),
    "turns-long": (lambda f, m: Image.new("RGB", (40000, 1)).save(f / "00002.jpg"), ("00002.jpg", "is 40000×1")),
    "long": (lambda f, m: resize(f, m, (400, 20)), ("00000.jpg", "is 400×20", "at most 16 times")),
    "jpeg-mask": (lambda f, m: Image.open(m / "00000.png").convert("L").save(m / "00000.png", "JPEG"),
                  ("00000.png", "is a JPEG")),
    "tiny": (lambda f, m: resize(f, m, (1, 1)), ("00000.jpg", "is 1×1")),
    "rgb-mask": (lambda f, m: rgb(m / "00000.png"), ("00000.png", "is RGB")),
    "other-size": (lambda f, m: rewrite(m / "00000.png", lambda a: a[:50]), ("00000.png", "100×50", "100×60")),
    "bad-mask": (lambda f, m: halve(m / "00000.png"), ("00000.png", "cannot read")),
    "half-jpeg": (lambda f, m: halve(f / "00002.jpg"), ("00002.jpg", "cannot read")),
    "no-jpeg": (lambda f, m: (f / "00002.jpg").write_text("hello"), ("00002.jpg", "cannot read")),
    "no-number": (lambda f, m: (f / "00002.jpg").rename(f / "two.jpg"), ("two.jpg", "not a number")),
    "grows": (lambda f, m: cv2.imwrite(str(f / "00003.jpg"), np.zeros((70, 100, 3), np.uint8)),
              ("00003.jpg", "100×70", "100×60")),
}


def test_bad_sequences_are_reported_and_the_others_done(tmp_path, capsys):
    data, output = make_davis(tmp_path / "data", "good", *BAD), tmp_path / "masks"
    for name, (spoil, _) in BAD.items():
        spoil(data / "JPEGImages" / "480p" / name, data / "Annotations" / "480p" / name)
    with open(data / "ImageSets" / "2017" / "val.txt", "a") as file:
        file.write("../x\n")
    assert run(data, output, *UNTRAINED) == 1
    out, err = capsys.readouterr()
    reported = [line for line in err.splitlines() if line.startswith("failed: ")]
    assert len(reported) == len(BAD) + 1 and "'../x'" in err
    for name, (_, words) in BAD.items():
        line = next(line for line in reported if line.startswith(f"failed: {name}:"))
        assert all(word in line for word in words), line
    assert f"J & F of 1 of {len(BAD) + 2} sequences" in out
    segmented = {"good", "bad-later-mask", "small-later-mask"}  # nothing half-written, and nothing outside
    assert {path.name for path in output.iterdir()} == segmented
    assert len(list((output / "good").iterdir())) == 4


def test_no_backbone_is_loaded_for_nothing(tmp_path, capsys):
    data = make_davis(tmp_path / "data", "clip")
    shutil.rmtree(data / "JPEGImages" / "480p" / "clip")
    assert run(data, tmp_path / "masks", *UNTRAINED) == 1
    out, err = capsys.readouterr()
    assert err.startswith("failed: clip: ") and "random weights" not in out + err


def test_void_and_lost_objects_are_reported(tmp_path, capsys):
    data, output = make_davis(tmp_path / "data", "clip"), tmp_path / "masks"
    first = data / "Annotations" / "480p" / "clip" / "00000.png"

    def change(mask):
        mask[mask == 2] = 0
        mask[0, 0] = 3  # a single pixel
        mask[50:] = 255
        return mask

    rewrite(first, change)
    assert run(data, output, *UNTRAINED, "--no_score") == 0
    out, err = capsys.readouterr()
    assert "00000.png: void (255) counts as background" in err and "object 3 is too small for 15×24 patches" in err
    assert "J & F" not in out
    masks = [read_mask(output / "clip" / f"{t:05d}.png")[0] for t in range(4)]
    assert np.array_equal(masks[0], read_mask(first)[0])  # as given
    assert set(np.unique(masks[1:])) == {0, 1}


def test_grey_annotations_get_the_davis_palette_and_frames_need_no_annotation(tmp_path, capsys):
    data, output = make_davis(tmp_path / "data", "clip"), tmp_path / "masks"
    first, *others = sorted((data / "Annotations" / "480p" / "clip").iterdir())
    Image.fromarray(read_mask(first)[0]).save(first)  # mode L
    for path in others:
        path.unlink()
    assert run(data, output, *UNTRAINED) == 0
    assert "clip: not scored: some frames have no annotation" in capsys.readouterr().out
    assert read_mask(output / "clip" / "00003.png")[1] == DAVIS_PALETTE
    assert DAVIS_PALETTE[:15] == bytes([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128])


def test_results_are_replaced_only_where_they_are_masks(tmp_path, capsys):
    data, output = make_davis(tmp_path / "data", "clip"), tmp_path / "masks"
    assert run(data, output, *UNTRAINED) == 0
    (output / "clip" / "00099.png").write_text("from an earlier run")
    (output / "clip" / ".DS_Store").touch()
    assert run(data, output, *UNTRAINED) == 0
    assert "replacing the masks of clip" in capsys.readouterr().out
    assert sorted(p.name for p in (output / "clip").iterdir()) == [f"{t:05d}.png" for t in range(4)]
    (output / "clip" / "notes.txt").write_text("mine")
    assert run(data, output, *UNTRAINED) == 1
    assert "notes.txt" in capsys.readouterr().err and (output / "clip" / "notes.txt").read_text() == "mine"
    assert run(data, data / "Annotations" / "480p", *UNTRAINED) == 2
    assert "lies inside the data" in capsys.readouterr().err


@pytest.mark.parametrize("options, words", [
    ((), "--random_weights"), ((*UNTRAINED, "--topk", 0), "--topk"), ((*UNTRAINED, "--bs", 0), "--bs"),
    ((*UNTRAINED, "--device", "gpu"), "--device gpu"), (("--pretrained_weights", "nowhere.pth"), "nowhere.pth"),
    ((*UNTRAINED, "--data_path", "nowhere"), "nowhere")])
def test_usage_errors_are_one_line_and_status_2(options, words, tmp_path, capsys):
    data = make_davis(tmp_path / "data", "clip")
    try:
        status = run(data, tmp_path / "masks", *options)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and words in lines[0]
    assert not (tmp_path / "masks").exists()


def test_backbones_with_a_class_token(tmp_path):
    torch.manual_seed(0)
    model = vit_tiny(32, class_token=True, final_norm=True)
    torch.save(model.state_dict(), tmp_path / "dino.pth")
    data = make_davis(tmp_path / "data", "clip")
    assert run(data, tmp_path / "masks", "--pretrained_weights", tmp_path / "dino.pth") == 0
    last = read_mask(tmp_path / "masks" / "clip" / "00003.png")[0]
    extract = job.FrameFeatures(model.eval(), torch.device("cpu"), torch.float32, 4)
    paths = sorted((data / "JPEGImages" / "480p" / "clip").iterdir())
    with torch.inference_mode():
        features = extract(np.stack([load_frame(path)[0] for path in paths]))
        assert features.shape == (4, 15, 24, 192)
        labels = job.read_seg(data / "Annotations" / "480p" / "clip" / "00000.png", 32)[0][0]
        *_, soft = propagate(features, labels)
    assert (to_mask(soft, 32, 60, 100).numpy() == last).mean() > 0.999


def start_two(*words):
    """Both processes' standard output; started by the environment that a launcher gives."""
    outputs = run_program(job.__file__, *words, envs=ranks())
    assert [status for status, *_ in outputs] == [0, 0], outputs
    return outputs[0][1]


def torchrun(*words):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", job.__file__]
    return subprocess.run([*launcher, *map(str, words)], check=True, capture_output=True, text=True, timeout=180).stdout


@pytest.mark.parametrize("launch", [start_two, pytest.param(torchrun, marks=pytest.mark.long)])
def test_two_processes_share_the_sequences(tmp_path, launch):
    data = make_davis(tmp_path / "data", "one", "two", "three")
    output = launch("--data_path", data, "--output_dir", tmp_path / "two", "--device", "cpu", *UNTRAINED)
    assert run(data, tmp_path / "one", *UNTRAINED) == 0
    assert sum(len(list(folder.iterdir())) for folder in (tmp_path / "two").iterdir()) == 12
    measures = summarise(score_folder(data, tmp_path / "two"))[0]
    assert " ".join(f"{value:.3f}" for value in measures.values()) in " ".join(output.split())
    assert measures == pytest.approx(summarise(score_folder(data, tmp_path / "one"))[0], abs=0.01)
