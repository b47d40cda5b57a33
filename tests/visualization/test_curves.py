"""Curves of runs: which numbers are read, where they are drawn, and what is refused."""
import json
import math
import shutil

import numpy as np
import pytest
from matplotlib.colors import same_color
from PIL import Image
from repository import ROOT

import visualize
from selfpatch.visualization import curves

EARLIER_RUN = ROOT / "tests" / "earlier_run"


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
    return {panel.title: panel for panel in curves.make_panels([curves.read_run(f) for f in folders])}


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
        pixels = np.asarray(image.convert("RGB"))
    assert abs(pixels - np.array([31, 119, 180])).sum(-1).min() < 30  # matplotlib's first colour


def test_lines_levels_and_legend(tmp_path):
    line = np.array([[0.0, 3.0], [1.0, 2.0]])
    figure = curves.draw_panels([curves.Panel("loss", [None, line], {4.2: "ln K"})] * 4, ["a", "b"])
    axis = figure.axes[0]
    np.testing.assert_array_equal(axis.lines[0].get_xydata(), line)
    assert same_color(axis.lines[0].get_color(), "C1") and set(axis.lines[1].get_ydata()) == {4.2}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"] and len(figure.axes) == 6
    assert [axis.get_xlabel() for axis in figure.axes] == ["", "epoch", "epoch", "epoch", "", ""]


def test_one_row_is_a_point(tmp_path):
    folder = write_run(tmp_path / "run", [{"loss": 3.0}])
    run(folder, "--output", tmp_path / "curves.png")
    figure = curves.draw_panels(list(panels_of(folder).values()), ["run"])
    assert figure.axes[0].lines[0].get_marker() == "o" and (tmp_path / "curves.png").is_file()


def test_curves_refuse(tmp_path):
    empty = write_run(tmp_path / "empty")
    cases = [((tmp_path / "nowhere",), "nowhere: no such folder"), ((empty,), "no rows in log.txt or steps.jsonl"),
             ((EARLIER_RUN, "--output", tmp_path / "x.jpg"), "ends in .png"),
             ((EARLIER_RUN, "--labels", "a", "b"), "--labels: 2 given for 1"),
             ([EARLIER_RUN] * 11, "11 runs: give at most 10")]
    for words, says in cases:
        output = [] if "--output" in words else ["--output", tmp_path / "x.png"]
        with pytest.raises(ValueError, match=says):
            run(*words, *output)
    shutil.rmtree(empty)
    (tmp_path / "x.png").touch()
    with pytest.raises(ValueError, match="exists: give another name, or --overwrite"):
        run(EARLIER_RUN, "--output", tmp_path / "x.png")
    run(EARLIER_RUN, "--output", tmp_path / "x.png", "--overwrite")


def test_runs_of_one_label_have_one_colour_and_one_place_in_the_legend(tmp_path):
    folders = [write_run(tmp_path / name, [], [{"train_loss": 4.0}, {"train_loss": 3.0}]) for name in "abc"]
    figure = curves.draw_panels(list(panels_of(*folders).values()), ["DINO", "SelfPatch", "DINO"])
    first, second, third = figure.axes[0].lines
    assert same_color(first.get_color(), third.get_color()) and not same_color(first.get_color(), second.get_color())
    assert first.get_linewidth() == third.get_linewidth() > second.get_linewidth()
    assert [text.get_text() for text in figure.legends[0].texts] == ["DINO", "SelfPatch"]
