"""DAVIS evaluation: the published figures, the plain formula, and data that is not as it should be."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_rules import GOLDEN, assert_close, load, rand, set_weights
from PIL import Image

import eval_video_segmentation as job
import label_propagation
from davis_data import DAVIS_PALETTE, DataError, imwrite_indexed, read_mask
from davis_metrics import score_folder, summarise
from vision_transformer import VisionTransformer, vit_tiny

CLIP = GOLDEN / "davis_clip"


# ---------------------------------------------------------------- published figures

@pytest.mark.parametrize("key, radius, topk", [
    ("seg_tar", 2, 5), ("seg_tar_no_mask", 0, 5), ("seg_tar_top1", 2, 1), ("seg_tar_ties", 2, 5)])
@pytest.mark.parametrize("held", [1, 2**20])  # a row of targets at a time, and all of them
def test_golden_label_propagation(key, radius, topk, held, monkeypatch):
    monkeypatch.setitem(label_propagation.HELD_AT_ONCE, "cpu", held)
    golden = load("label_propagation.npz")
    salt = golden["salt"]
    target, contexts = rand(50, 1, 35, 32, salt=salt), [rand(51 + i, 32, 35, salt=salt) for i in range(3)]
    if key == "seg_tar_ties":
        target = rand(80, 1, 35, 4, salt=salt).sign()
        contexts = [rand(81 + i, 4, 35, salt=salt).sign() for i in range(3)]
    labels = [torch.softmax(3 * rand(60 + i, 1, 3, 5, 7, salt=salt), dim=1) for i in range(3)]
    target = F.normalize(target[0], dim=1).view(5, 7, -1)
    contexts = F.normalize(torch.stack(contexts), dim=1).transpose(1, 2).unflatten(1, (5, 7))
    mixed = job.label_propagation(target, contexts, torch.cat(labels).permute(0, 2, 3, 1), radius, topk)
    assert_close(mixed.permute(2, 0, 1)[None], golden[key])


def test_golden_window_and_norm_mask():
    golden = load("label_propagation.npz")
    assert np.array_equal(job.restrict_neighborhood(5, 7, 2).numpy(), golden["mask_5x7_r2"])
    assert_close(job.norm_mask(torch.from_numpy(golden["norm_mask_in"])), golden["norm_mask"])


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


def agreement(folder: Path) -> list[float]:
    """Share of equal pixels, frame by frame, between results and the published ones."""
    shares = []
    for path in sorted(folder.rglob("*.png")):
        expected = Image.open(CLIP / "expected" / path.relative_to(folder))
        image = Image.open(path)
        assert image.mode == "P" and image.getpalette() == expected.getpalette()
        shares.append((np.array(image) == np.array(expected)).mean())
    return shares


@pytest.mark.parametrize("precision, frames, least", [("fp32", 14, 0.9999), ("bf16", 3, 0.999)])
def test_golden_clip(precision, frames, least, tmp_path, capsys):
    data, weights, output = tmp_path / "data", tmp_path / "backbone.pth", tmp_path / "masks"
    shutil.copytree(CLIP, data)
    for path in sorted(data.glob("JPEGImages/480p/*/*.jpg"))[frames:]:
        path.unlink()
    model = set_weights(vit_tiny(), int((CLIP / "salt.txt").read_text()))
    torch.save({"teacher": {f"backbone.{name}": p for name, p in model.state_dict().items()}}, weights)
    assert run(data, output, "--pretrained_weights", weights, "--precision", precision) == 0
    shares = agreement(output)
    assert len(shares) == frames and min(shares) >= least and shares[0] == 1
    printed = capsys.readouterr().out.splitlines()
    if precision == "fp32":  # scores are from memory; these are from the PNGs
        figures = [f"{value:.3f}" for value in summarise(score_folder(data, output))[0].values()]
        assert printed[printed.index("J & F of 1 of 1 sequences") + 2].split() == figures


# ---------------------------------------------------------------- against the plain formula

def plain_propagation(features, labels, n_last, radius, topk):
    """Features [T, h, w, D], labels [C, h, w] -> [T - 1, C, h, w], patch by patch."""
    frames, height, width, _ = features.shape
    done = [labels]
    for t in range(1, frames):
        contexts, result = [0, *range(max(1, t - n_last), t)], torch.zeros_like(labels)
        for y in range(height):
            for x in range(width):
                near = [(c, v, u) for c in contexts for v in range(height) for u in range(width)
                        if not radius or max(abs(v - y), abs(u - x)) <= radius]
                weights = torch.stack([torch.exp(features[t, y, x] @ features[place] / 0.1) for place in near])
                kept = weights >= weights.topk(min(topk, len(near))).values[-1]
                mixed = sum(w * done[c][:, v, u] for w, (c, v, u), k in zip(weights, near, kept, strict=True) if k)
                result[:, y, x] = mixed / weights[kept].sum()
        done.append(result)
    return torch.stack(done[1:])


@pytest.mark.parametrize("shape, n_last, radius, topk", [
    ((4, 6), 2, 1, 5), ((6, 4), 2, 1, 5), ((3, 5), 0, 2, 3), ((5, 3), 7, 0, 5), ((3, 3), 1, 1, 60)])
@pytest.mark.parametrize("held", [1, 2**20])
@pytest.mark.parametrize("lookups", [0, 2**20])  # without bounds, and with bounds however loose they are
def test_propagation_equals_the_plain_formula(shape, n_last, radius, topk, held, lookups, monkeypatch):
    monkeypatch.setitem(label_propagation.HELD_AT_ONCE, "cpu", held)
    monkeypatch.setattr(label_propagation, "MOST_LOOKUPS", lookups)
    torch.manual_seed(0)
    features = F.normalize(torch.randn(5, *shape, 8), dim=-1)
    features[3] = features[2]  # a frame twice: every similarity stands twice, and the k-th is shared
    labels = F.one_hot(torch.randint(0, 3, shape)).permute(2, 0, 1).float()
    ours = list(job.propagate(features, labels, n_last, radius, topk))
    torch.testing.assert_close(torch.stack(ours), plain_propagation(features, labels, n_last, radius, topk))


def smooth_video(frames=6, height=20, width=30, dim=64):
    """Features [T, h, w, D] like a backbone's, most of them in few directions, and first labels [2, h, w]."""
    torch.manual_seed(0)
    features = torch.randn(frames, 6, 5, 8) * 0.2 + torch.randn(1, 6, 5, 8)
    features = F.interpolate(features.permute(0, 3, 1, 2), (height, width), mode="bilinear").permute(0, 2, 3, 1)
    features = F.normalize(features @ torch.randn(8, dim) + 0.1 * torch.randn(frames, height, width, dim), dim=-1)
    return features, torch.stack([torch.ones(height, width).tril(), torch.ones(height, width).triu(1)])


def test_bounds_are_bounds():
    features = smooth_video()[0]
    sketches = label_propagation.sketch(features, label_propagation.leading_axes(features[0]))
    assert sketches.shape[-1] == 64 // 4 + 1
    a, b = features.flatten(0, 2)[::7], sketches.flatten(0, 2)[::7]
    slack = b @ b.T - a @ a.T
    assert slack.min() > 0 and slack.median() < 0.3


@pytest.fixture
def searches(monkeypatch):
    """Frames whose patches were all compared: a list that grows by their number of contexts."""
    contexts, search = [], label_propagation.label_propagation
    monkeypatch.setattr(label_propagation, "label_propagation",
                        lambda target, known, *args: contexts.append(len(known)) or search(target, known, *args))
    return contexts


def test_bounds_leave_few_patches_to_look_up(searches, monkeypatch):
    features, labels = smooth_video()
    found = torch.stack(list(job.propagate(features, labels, 3, 6)))
    assert searches == [1, 2, 3]  # the whole search only until all contexts are there
    monkeypatch.setattr(label_propagation, "MOST_LOOKUPS", 0)
    torch.testing.assert_close(found, torch.stack(list(job.propagate(features, labels, 3, 6))))


def test_bounds_are_given_up_where_they_say_little(searches, monkeypatch):
    tried, lookups = [], label_propagation.find_lookups
    monkeypatch.setattr(label_propagation, "find_lookups", lambda *args: tried.append(1) or lookups(*args))
    features, labels = smooth_video()
    list(job.propagate(F.normalize(torch.randn_like(features), dim=-1), labels, 2, 6))
    assert searches == [1, 2, 3, 3, 3] and len(tried) == 1


def test_bounds_are_for_float32(searches):
    features, labels = smooth_video()
    list(job.propagate(features.double(), labels.double(), 1, 6))
    assert len(searches) == 5


@pytest.mark.parametrize("frame", [0, 1])
@pytest.mark.parametrize("lookups", [0, 2**20])
def test_features_that_are_no_numbers_spoil_labels_without_an_error(frame, lookups, monkeypatch):
    monkeypatch.setattr(label_propagation, "MOST_LOOKUPS", lookups)
    features, labels = smooth_video()
    features[frame, 0, 0] = torch.nan
    first, second = list(job.propagate(features[:3], labels, 0, 6))
    assert first[:, 0, 0].isnan().all() and second.isfinite().all() == (frame == 1)


def test_masks_take_nearest_centres_and_survive_constant_channels():
    labels = torch.zeros(3, 30, 52)
    labels[2] = 1  # an object that fills the frame: its channel is constant, the others have nothing positive
    assert (job.to_mask(labels, 16, 480, 854) == 2).all()
    labels = torch.softmax(5 * torch.randn(4, 30, 52, generator=torch.Generator().manual_seed(0)), dim=0)
    small = job.to_mask(labels, 16, 480, 832).numpy()
    resized = np.array(Image.fromarray(small).resize((854, 480), Image.Resampling.NEAREST))
    assert np.array_equal(job.to_mask(labels, 16, 480, 854).numpy(), resized)


def test_norm_mask_of_channels_without_range():
    mask = torch.stack([torch.full((2, 2), 0.3), torch.zeros(2, 2), -torch.ones(2, 2), torch.tensor([[1., 2], [3, 5]])])
    expected = torch.cat([mask[:3], torch.tensor([[[0, 0.25], [0.5, 1]]])])
    torch.testing.assert_close(job.norm_mask(mask), expected)


def test_batches_are_halved_when_memory_runs_out(capsys):
    torch.manual_seed(0)
    model, sizes = VisionTransformer(32, 16, embed_dim=24, depth=1, num_heads=3).eval(), []
    whole, most = model.get_intermediate_layers, 2

    def short_of_memory(images, n):
        sizes.append(len(images))
        if len(images) > most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return whole(images, n)

    frames = np.random.RandomState(0).randint(0, 256, (7, 32, 48, 3), np.uint8)
    with torch.inference_mode():
        expected = job.PatchFeatures(model, torch.device("cpu"), torch.float32, 7)(frames)
        model.get_intermediate_layers = short_of_memory
        extract = job.PatchFeatures(model, torch.device("cpu"), torch.float32, 6)
        torch.testing.assert_close(extract(frames), expected)
        assert sizes == [6, 3, 1, 1, 1, 1, 1, 1, 1] and extract.batch_size == 1
        assert "--bs 1" in capsys.readouterr().err
        most = 0
        with pytest.raises(DataError, match="out of memory"):
            extract(frames)


# ---------------------------------------------------------------- the command

def make_davis(folder: Path, *names: str, frames: int = 4) -> Path:
    """A small DAVIS folder: a bright square and a dark one move over noise."""
    rng = np.random.RandomState(0)
    for name in names:
        images, masks = (folder / kind / "480p" / name for kind in ("JPEGImages", "Annotations"))
        for path in (images, masks):
            path.mkdir(parents=True)
        for t in range(frames):
            frame, mask = rng.randint(60, 180, (60, 100, 3), np.uint8), np.zeros((60, 100), np.uint8)
            for i, (x, value) in enumerate([(10, 250), (60, 5)]):
                frame[20:40, x + 2 * t:x + 2 * t + 20], mask[20:40, x + 2 * t:x + 2 * t + 20] = value, i + 1
            cv2.imwrite(str(images / f"{t:05d}.jpg"), frame)
            imwrite_indexed(masks / f"{t:05d}.png", mask)
    (folder / "ImageSets" / "2017").mkdir(parents=True)
    (folder / "ImageSets" / "2017" / "val.txt").write_text("\n".join(names) + "\n")
    return folder


def run(data: Path, output: Path, *options) -> int:
    return job.main(job.get_args_parser().parse_args(
        ["--data_path", str(data), "--output_dir", str(output), "--device", "cpu", *map(str, options)]))


UNTRAINED = ("--random_weights", "--arch", "vit_tiny", "--patch_size", 32)


def rgb(path: Path) -> None:
    Image.open(path).convert("RGB").save(path)


def rewrite(path: Path, change) -> None:
    imwrite_indexed(path, change(read_mask(path)[0].copy()))


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


BAD = {  # what is done to a sequence's frames and masks, and the words of the line that tells of it
    "no-frames": (lambda f, m: shutil.rmtree(f), ("no-frames", "no frames")),
    "no-mask": (lambda f, m: (m / "00000.png").unlink(), ("00000.png", "missing")),
    "rgb-mask": (lambda f, m: rgb(m / "00000.png"), ("00000.png", "is RGB")),
    "other-size": (lambda f, m: rewrite(m / "00000.png", lambda a: a[:50]), ("00000.png", "100×50", "100×60")),
    "bad-mask": (lambda f, m: halve(m / "00000.png"), ("00000.png", "damaged")),
    "half-jpeg": (lambda f, m: halve(f / "00002.jpg"), ("00002.jpg", "damaged")),
    "no-jpeg": (lambda f, m: (f / "00002.jpg").write_text("hello"), ("00002.jpg", "damaged")),
    "no-number": (lambda f, m: (f / "00002.jpg").rename(f / "two.jpg"), ("two.jpg", "no number")),
    "grows": (lambda f, m: cv2.imwrite(str(f / "00003.jpg"), np.zeros((70, 100, 3), np.uint8)),
              ("00003.jpg", "100×70", "100×60")),
}


def test_bad_sequences_are_told_and_the_others_done(tmp_path, capsys):
    data, output = make_davis(tmp_path / "data", "good", *BAD), tmp_path / "masks"
    for name, (spoil, _) in BAD.items():
        spoil(data / "JPEGImages" / "480p" / name, data / "Annotations" / "480p" / name)
    with open(data / "ImageSets" / "2017" / "val.txt", "a") as file:
        file.write("../x\n")
    assert run(data, output, *UNTRAINED) == 1
    out, err = capsys.readouterr()
    told = [line for line in err.splitlines() if line.startswith("failed: ")]
    assert len(told) == len(BAD) + 1 and "'../x'" in err
    for name, (_, words) in BAD.items():
        line = next(line for line in told if line.startswith(f"failed: {name}:"))
        assert all(word in line for word in words), line
    assert f"J & F of 1 of {len(BAD) + 2} sequences" in out
    assert [path.name for path in output.iterdir()] == ["good"]  # nothing half-written, and nothing outside
    assert len(list((output / "good").iterdir())) == 4


def test_void_and_lost_objects_are_told(tmp_path, capsys):
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
    assert run(data, output, *UNTRAINED) == 0
    assert "replacing the masks of clip" in capsys.readouterr().out
    assert sorted(p.name for p in (output / "clip").iterdir()) == [f"{t:05d}.png" for t in range(4)]
    (output / "clip" / "notes.txt").write_text("mine")
    assert run(data, output, *UNTRAINED) == 1
    assert "notes.txt" in capsys.readouterr().err and (output / "clip" / "notes.txt").read_text() == "mine"
    assert run(data, data / "Annotations" / "480p", *UNTRAINED) == 2
    assert "among the data" in capsys.readouterr().err


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


def test_backbones_with_a_class_token_go_the_same_way(tmp_path):
    torch.manual_seed(0)
    model = vit_tiny(32, class_token=True, final_norm=True)
    torch.save(model.state_dict(), tmp_path / "dino.pth")
    data = make_davis(tmp_path / "data", "clip")
    assert run(data, tmp_path / "masks", "--pretrained_weights", tmp_path / "dino.pth") == 0
    last = read_mask(tmp_path / "masks" / "clip" / "00003.png")[0]
    extract = job.PatchFeatures(model.eval(), torch.device("cpu"), torch.float32, 4)
    paths = sorted((data / "JPEGImages" / "480p" / "clip").iterdir())
    with torch.inference_mode():
        features = extract(np.stack([job.load_frame(path)[0] for path in paths]))
        assert features.shape == (4, 15, 24, 192)
        labels = job.read_seg(data / "Annotations" / "480p" / "clip" / "00000.png", 32)[0][0]
        *_, soft = job.propagate(features, labels)
    assert (job.to_mask(soft, 32, 60, 100).numpy() == last).mean() > 0.999


def test_two_processes_share_the_sequences(tmp_path):
    data = make_davis(tmp_path / "data", "one", "two", "three")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", job.__file__,
               "--data_path", data, "--output_dir", tmp_path / "two", "--device", "cpu", *map(str, UNTRAINED)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert run(data, tmp_path / "one", *UNTRAINED) == 0
    assert sum(len(list(folder.iterdir())) for folder in (tmp_path / "two").iterdir()) == 12
    measures = summarise(score_folder(data, tmp_path / "two"))[0]
    assert " ".join(f"{value:.3f}" for value in measures.values()) in " ".join(done.stdout.split())
    assert measures == pytest.approx(summarise(score_folder(data, tmp_path / "one"))[0], abs=0.01)
