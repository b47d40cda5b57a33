"""Pictures of videos: what is tinted, what the files hold, and what is refused."""
import shutil

import cv2
import numpy as np
import pytest
from golden_rules import GOLDEN
from PIL import Image

import visualize
from selfpatch.video.davis import DAVIS_PALETTE, imwrite_indexed
from selfpatch.visualization import videos

CLIP = GOLDEN / "davis_clip"
MASKS = CLIP / "expected"


def run(*options):
    args = visualize.get_args_parser().parse_args(list(map(str, options)))
    args.func(args)


def draw(output, *options):
    run("overlay", "--davis_path", CLIP, "--results", MASKS, CLIP / "Annotations" / "480p", "--labels", "ours", "given",
        "--width", 128, "--output", output, *options)


def test_overlay_tints_objects_and_nothing_else():
    frame, mask = np.full((40, 60, 3), 100, np.uint8), np.zeros((40, 60), np.uint8)
    mask[10:30, 10:30], mask[35:] = 2, 255
    drawn = videos.overlay(frame, mask, DAVIS_PALETTE)
    assert drawn[20, 20].tolist() == [50, 114, 50]  # half the frame, half object 2's green
    assert drawn[10, 20].tolist() == [0, 128, 0]  # outline
    assert (drawn[mask == 255] == 100).all() and (drawn[5, :] == 100).all() and (frame == 100).all()
    assert drawn[20, 20].tolist() == videos.overlay(frame, mask, DAVIS_PALETTE[:9])[20, 20].tolist()


@pytest.mark.parametrize("name", ["video.gif", "video.mp4", "pictures"])
def test_video_files_hold_every_frame(name, tmp_path):
    output = tmp_path / name
    draw(output, "--fps", 10)
    if name.endswith("gif"):
        with Image.open(output) as image:
            count, size = image.n_frames, image.size
            assert image.info["duration"] == 100
    elif name.endswith("mp4"):
        video = cv2.VideoCapture(str(output))
        assert video.get(cv2.CAP_PROP_FPS) == 10
        size = tuple(int(video.get(side)) for side in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
        count = sum(video.read()[0] for _ in range(20))
    else:
        pictures = sorted(output.iterdir())
        count, size = len(pictures), Image.open(pictures[0]).size
        assert pictures[-1].name == "00013.png"
    assert count == 14 and size[0] > 3 * 128 and size[1] > 72  # three panels under labels
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_small_objects_keep_their_colour_in_a_gif():
    rng = np.random.RandomState(0)
    pictures = [rng.randint(0, 256, (60, 80, 3)).astype(np.uint8) for _ in range(3)]
    pictures[1][20:24, 30:34] = (128, 128, 0)  # object 3's
    first, second, third = videos.with_one_palette([Image.fromarray(picture) for picture in pictures])
    assert np.array(second.convert("RGB"))[21:23, 31:33].tolist() == [[[128, 128, 0]] * 2] * 2
    assert first.getpalette() == third.getpalette()


def test_overlay_refuses(tmp_path):
    (tmp_path / "there.gif").write_text("mine")
    with pytest.raises(ValueError, match="exists: give another name"):
        draw(tmp_path / "there.gif")
    assert (tmp_path / "there.gif").read_text() == "mine"
    with pytest.raises(ValueError, match="a .gif, a .mp4"):
        draw(tmp_path / "video.avi")
    with pytest.raises(ValueError, match="--labels: 2 given for 1"):
        run("overlay", "--davis_path", CLIP, "--results", MASKS, "--labels", "a", "b", "--output", tmp_path / "a.gif")
    with pytest.raises(ValueError, match="00000.png: no result"):
        run("overlay", "--davis_path", CLIP, "--results", CLIP, "--output", tmp_path / "a.gif")
    for frame in CLIP.glob("JPEGImages/480p/blobs/*.jpg"):
        (tmp_path / "small" / "blobs").mkdir(parents=True, exist_ok=True)
        imwrite_indexed(tmp_path / "small" / "blobs" / f"{frame.stem}.png", np.zeros((9, 9), np.uint8))
    with pytest.raises(ValueError, match="9×9"):
        run("overlay", "--davis_path", CLIP, "--results", tmp_path / "small", "--output", tmp_path / "a.gif")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small", "there.gif"]


def test_overlay_needs_no_annotation(tmp_path):
    shutil.copytree(CLIP / "JPEGImages", tmp_path / "JPEGImages")
    run("overlay", "--davis_path", tmp_path, "--results", MASKS, "--sequence", "blobs", "--width", 128, "--output",
        tmp_path / "video.gif")
    assert (tmp_path / "video.gif").stat().st_size


@pytest.mark.parametrize("options, figure", [((), "0.987"), (("--present_objects",), "0.500")])
def test_scores_of_ids_with_gaps(tmp_path, capsys, monkeypatch, options, figure):
    """Grey masks of id 38, half of it found: 37 ids without a pixel count as perfect."""
    for name in ("Annotations/480p/x", "results/x", "ImageSets/2017"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "ImageSets/2017/val.txt").write_text("x\n")
    mask = np.zeros((40, 60), np.uint8)
    mask[10:30, 10:30] = 38
    for t in range(4):
        Image.fromarray(mask).save(tmp_path / f"Annotations/480p/x/{t:05}.png")
        imwrite_indexed(tmp_path / f"results/x/{t:05}.png", mask * (t == 1))
    drawn, bar_chart = {}, videos.bar_chart
    monkeypatch.setattr(videos, "bar_chart", lambda groups, *rest: drawn.update(groups) or bar_chart(groups, *rest))
    run("scores", "--davis_path", tmp_path, "--results", tmp_path / "results", "--output", tmp_path / "scores.png",
        *options)
    out, err = capsys.readouterr()
    assert f"results {figure}" in out and "results: " in err and "x: 1, 2, 3" in err
    assert {name: f"{value:.3f}" for name, (value,) in drawn.items()} == {"all objects": figure, "x": figure}


def test_scores_chart(tmp_path, capsys):
    data, output = GOLDEN / "davis_scores", tmp_path / "scores.png"
    run("scores", "--davis_path", data, "--results", data / "results", "--labels", "published", "--output", output)
    assert "published 0.579" in capsys.readouterr().out
    with Image.open(output) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert abs(pixels - [31, 119, 180]).sum(-1).min() < 30  # matplotlib's first colour


def test_bars_have_their_lengths_and_labels():
    axis = videos.bar_chart({"half": [0.5, 1.0], "less": [0.25, 0.0]}, ["a", "b"], "title").axes[0]
    first, second = ([(bar.get_width(), bar.get_y()) for bar in bars] for bars in axis.containers)
    assert [width for width, _ in first] == [0.5, 0.25] and [width for width, _ in second] == [1.0, 0.0]
    assert first[0][1] < second[0][1] < first[1][1] and axis.yaxis_inverted()  # rows from top to bottom
    assert [text.get_text() for text in axis.texts] == ["0.500", "0.250", "1.000", "0.000"]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["half", "less"]
    assert axis.get_title("left") == "title"
    assert [text.get_text() for text in axis.figure.legends[0].get_texts()] == ["a", "b"]
