"""Curves of runs: which numbers are read, where they are drawn, and what is refused."""
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

import curve_pictures
import line_charts
import visualize
from line_charts import LINE_COLOURS, Panel, format_tick, limits, thin_out, ticks

EARLIER_RUN = Path(__file__).parent / "earlier_run"


def run(*options):
    args = visualize.get_args_parser().parse_args(["curves", *map(str, options)])
    args.func(args)


def write_run(folder, steps=(), epochs=()):
    """A folder with rows of steps, 10 to an epoch, and of epochs; each row is a dict."""
    folder.mkdir()
    (folder / "steps.jsonl").write_text("".join(json.dumps({"step": i, "epoch": i / 10} | row) + "\n"
                                                for i, row in enumerate(steps, 1)))
    (folder / "log.txt").write_text("".join(json.dumps(row | {"epoch": i}) + "\n" for i, row in enumerate(epochs)))
    return folder


def panels_of(*folders):
    return {panel.title: panel for panel in curve_pictures.make_panels([curve_pictures.read_run(f) for f in folders])}


def test_steps_where_there_are_any_else_epochs(tmp_path):
    steps = [{"loss": 3.0 - i / 10, "image_loss": 2.5, "image_ln_k": math.log(64), "lr": 1e-4, "gradient_norm": norm}
             for i, norm in enumerate([1.0, None, 3.0])]
    one = write_run(tmp_path / "one", steps, [{"train_loss": 9.0, "knn_top1": 40.0}, {"train_loss": 9.0}])
    two = write_run(tmp_path / "two", [], [{"train_loss": 5.0}, {"train_loss": 4.0, "knn_top1": 50.0}])
    panels = panels_of(one, two)
    np.testing.assert_allclose(panels["loss"].lines[0], [[0.1, 3.0], [0.2, 2.9], [0.3, 2.8]])
    np.testing.assert_allclose(panels["loss"].lines[1], [[1, 5], [2, 4]])  # at the ends of epochs 0 and 1
    np.testing.assert_allclose(panels["k-NN top-1, %"].lines, [[[1, 40]], [[2, 50]]])
    np.testing.assert_allclose(panels["largest gradient norm"].lines[0], [[0.1, 1], [0.3, 3]])
    assert panels["image loss"].levels == {math.log(64): "ln K"} and panels["image loss"].lines[1] is None
    assert panels["loss"].levels == {} and "patch loss" not in panels


def test_a_run_that_is_training_has_half_a_line(tmp_path):
    folder = write_run(tmp_path / "run", [{"loss": 3.0}, {"loss": 2.0}], [{"train_loss": 4.0}])
    for name in ("steps.jsonl", "log.txt"):
        with open(folder / name, "a") as file:
            file.write('{"step": 3, "ep')
    assert len(panels_of(folder)["loss"].lines[0]) == 2


def test_the_last_run_of_a_log_counts(tmp_path):
    folder = write_run(tmp_path / "run", [], [{"train_loss": 4.0}, {"train_loss": 3.0}])
    with open(folder / "log.txt", "a") as file:
        file.write('{"train_loss": 7.0, "epoch": 0}\n')
    assert panels_of(folder)["loss"].lines[0].tolist() == [[1, 7]]


def test_a_picture_of_two_runs(tmp_path, capsys):
    """A published run's log.txt, and one with steps."""
    steps = [{"loss": 3.0, "image_loss": 2.0, "image_ln_k": 4.2, "lr": 1e-4} for _ in range(40)]
    folder = write_run(tmp_path / "run", steps, [{"knn_top1": 10.0}])
    run(EARLIER_RUN, folder, "--labels", "earlier", "new", "--output", tmp_path / "curves.png")
    out = capsys.readouterr().out
    assert "earlier (0 rows of steps, 2 of epochs), new (40 rows of steps, 1 of epochs)" in out
    with Image.open(tmp_path / "curves.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape == (44 + 3 * line_charts.HEIGHT, 3 * line_charts.WIDTH, 3)  # 7 panels
    for colour in LINE_COLOURS[:2]:
        assert (abs(pixels - ImageColor.getrgb(colour)).sum(-1) < 30).sum() > 100


def test_points_lie_where_the_axes_say():
    """The highest of a line's points is above the lowest by their share of the range; a level is dashed."""
    panel = Panel("x", [np.array([[0.0, 0.0], [1.0, 1.0]])], {2.0: "ln K"})
    pixels = np.asarray(line_charts.draw_panel(panel, (0, 2), "epoch")).astype(int)
    red = (abs(pixels - ImageColor.getrgb(LINE_COLOURS[0])).sum(-1) < 60).nonzero()
    plot_height = line_charts.HEIGHT - line_charts.TOP - line_charts.BOTTOM
    plot_width = line_charts.WIDTH - line_charts.LEFT - line_charts.RIGHT
    assert np.ptp(red[0]) == pytest.approx(plot_height / 2.32, abs=8)
    assert red[1].min() == pytest.approx(line_charts.LEFT, abs=5)
    assert red[1].max() == pytest.approx(line_charts.LEFT + plot_width / 2, abs=5)
    # 40 % grey, half a pixel of it left by the reduction
    row = line_charts.TOP + round(plot_height * 0.16 / 2.32)
    grey = (pixels[row - 1:row + 2, line_charts.LEFT + 5:, 0].min(0) < 180)
    assert 0.3 < grey[:plot_width - 60].mean() < 0.7


def test_round_ticks_and_their_labels():
    assert ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10] and ticks(0.3, 0.31, 5)[0] == 0.3
    assert ticks(2.9, 11.4, 5) == [4, 6, 8, 10] and len(ticks(-1e-5, 1e-5, 5)) == 5
    assert [format_tick(value, 5e-4) for value in (0, 1.5e-4, 5e-4)] == ["0", "1.5e-4", "5e-4"]
    assert [format_tick(value, 2000) for value in (0, 1900, 2000)] == ["0", "1,900", "2,000"]
    assert limits(np.array([3.0]), 0.1) == pytest.approx((2.85, 3.15)) and limits(np.zeros(2), 0.1) == (-1, 1)


def test_many_points_become_means_of_columns():
    x = np.linspace(0, 10, 10_001)
    thin = thin_out(np.stack([x, 2 * x], 1), 100)
    assert len(thin) == 100 and np.ptp(thin[:, 0]) > 9.8
    np.testing.assert_allclose(thin[:, 1], 2 * thin[:, 0])
    few = np.array([[0.0, 1.0], [1.0, 5.0]])
    assert thin_out(few, 100) is few


def test_one_row_is_a_point(tmp_path):
    folder = write_run(tmp_path / "run", [{"loss": 3.0}])
    run(folder, "--output", tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (line_charts.WIDTH, 44 + line_charts.HEIGHT)


def test_curves_refuse(tmp_path):
    empty = write_run(tmp_path / "empty")
    cases = [((tmp_path / "nowhere",), "nowhere: no such folder"), ((empty,), "no rows in log.txt or steps.jsonl"),
             ((EARLIER_RUN, "--output", tmp_path / "x.jpg"), "ends in .png"),
             ((EARLIER_RUN, "--labels", "a", "b"), "--labels: 2 given for 1"),
             ([EARLIER_RUN] * 9, "9 runs: give at most 8")]
    for words, says in cases:
        output = [] if "--output" in words else ["--output", tmp_path / "x.png"]
        with pytest.raises(ValueError, match=says):
            run(*words, *output)
    shutil.rmtree(empty)
    (tmp_path / "x.png").touch()
    with pytest.raises(ValueError, match="exists: give another name, or --overwrite"):
        run(EARLIER_RUN, "--output", tmp_path / "x.png")
    run(EARLIER_RUN, "--output", tmp_path / "x.png", "--overwrite")
