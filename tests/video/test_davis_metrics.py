"""J & F: the official tool's figures, the definition in brute force, and what cannot be scored."""
import json
import re
import shutil
from functools import partial

import numpy as np
import pytest
from golden_rules import GOLDEN
from image_cases import refuse_listing
from PIL import Image

import davis_metrics
from selfpatch.errors import ConfigError
from selfpatch.video.davis import DataError, imwrite_indexed
from selfpatch.video.scores import boundary_f, jaccard, score_folder, score_sequence, statistics, summarise
from selfpatch.whole_files import WriteError

SCORES = GOLDEN / "davis_scores"


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.long), 2])
def test_golden_scores(processes):
    expected = json.loads((SCORES / "expected.json").read_text())
    measures, objects = summarise(score_folder(SCORES, SCORES / "results", "val", processes))
    assert measures == pytest.approx(expected["global"], abs=1e-6)
    assert list(objects) == list(expected["objects"])
    for name, figures in expected["objects"].items():
        assert objects[name] == pytest.approx(figures, abs=1e-6)


def run(davis_path, results_path, *options):
    return davis_metrics.main(davis_metrics.get_args_parser().parse_args(
        ["--davis_path", str(davis_path), "--results_path", str(results_path), "--task", "semi-supervised",
         "--processes", "1", *options]))


@pytest.fixture
def results(tmp_path):
    return shutil.copytree(SCORES / "results", tmp_path / "results")


def test_golden_csv_files_are_computed_each_time(results, capsys):
    stale = results / "global_results-val.csv"
    stale.write_text("J&F-Mean\n0.999\n")
    assert run(SCORES, results) == 0
    output = capsys.readouterr().out
    assert f"{stale} replaced" in output and "per-sequence_results-val.csv written" in output
    expected = json.loads((SCORES / "expected.json").read_text())
    assert stale.read_text() == ",".join(expected["global"]) + "\n" + ",".join(
        f"{value:.3f}" for value in expected["global"].values()) + "\n"
    lines = (results / "per-sequence_results-val.csv").read_text().splitlines()
    assert lines[0] == "Sequence,J-Mean,F-Mean"
    assert lines[1:] == [f"{name},{j:.3f},{f:.3f}" for name, (j, f) in expected["objects"].items()]


def brute_force_f(annotation, result, radius=None):
    height, width = annotation.shape
    radius = np.ceil(0.008 * np.sqrt(height**2 + width**2)) if radius is None else radius

    def boundary(mask):
        return [(y, x) for y in range(height) for x in range(width)
                if any(v < height and u < width and mask[v, u] != mask[y, x]
                       for v, u in ((y, x + 1), (y + 1, x), (y + 1, x + 1)))]

    def share(points, others):
        return np.mean([any((y - v)**2 + (x - u)**2 <= radius**2 for v, u in others) for y, x in points])

    a, r = boundary(annotation), boundary(result)
    if not a or not r:
        return float(len(a) == len(r))
    precision, recall = share(r, a), share(a, r)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def blob(rng, height, width):
    y, x = np.ogrid[:height, :width]
    (cy, cx), (ry, rx) = rng.uniform(0, (height, width)), rng.uniform(1, (height / 2, width / 2))
    return (((y - cy) / ry)**2 + ((x - cx) / rx)**2 < 1).astype(np.uint8)


@pytest.mark.parametrize("seed", range(6))
def test_cropped_scores_equal_the_definition(seed):
    rng = np.random.RandomState(seed)
    height, width = (90, 140) if seed % 2 else (150, 70)
    annotations, results = np.zeros((2, 3, height, width), np.uint8)
    annotations[0, 5, 5], annotations[0, 6, 6] = 1, 2
    for i in (1, 2):
        annotations[1][blob(rng, height, width) > 0] = i  # some reach over the edge, some hide another
        results[1][blob(rng, height, width) > 0] = i
    js, fs = score_sequence(annotations, results)
    for i in (1, 2):
        a, r = (annotations[1] == i).astype(np.uint8), (results[1] == i).astype(np.uint8)
        union = (a | r).sum()
        assert js[i - 1, 0] == pytest.approx((a & r).sum() / union if union else 1)
        assert fs[i - 1, 0] == pytest.approx(brute_force_f(a, r)) == pytest.approx(boundary_f(a, r))


@pytest.mark.parametrize("radius", [0, 1, 8, 100])
@pytest.mark.parametrize("shape", [(1, 30), (30, 1), (17, 23)])
def test_contours_agree_within_any_radius(radius, shape):
    rng = np.random.RandomState(radius)
    for _ in range(5):
        a, r = (blob(rng, *shape) ^ (rng.rand(*shape) < 0.03) for _ in range(2))  # specks, some of them at the edges
        assert boundary_f(a, r, radius) == pytest.approx(brute_force_f(a, r, radius))


def test_empty_masks():
    empty, full = np.zeros((20, 30), np.uint8), np.ones((20, 30), np.uint8)
    square = empty.copy()
    square[5:9, 5:9] = 1
    assert jaccard(empty, empty) == boundary_f(empty, empty) == 1
    assert jaccard(empty, square) == boundary_f(empty, square) == boundary_f(square, empty) == 0
    assert boundary_f(full, empty) == 1 and jaccard(full, empty) == 0  # past the edge nothing differs: no boundary
    annotations = np.stack([square, square, empty, square])
    js, fs = score_sequence(annotations, np.zeros_like(annotations))
    assert js.tolist() == fs.tolist() == [[0, 1]]


def test_statistics():
    # 7 frames: quarters meet at 1, 2.5, 4, 5.5, 7, rounded up to 1, 3, 4, 6, 7; the first is 1 to 3, the last 6 to 7
    figures = statistics(np.array([1, 0.8, 0.6, 0.5, 0.4, 0.2, 0.1]))
    assert figures == pytest.approx((3.6 / 7, 3 / 7, 0.8 - 0.15))
    assert statistics(np.array([0.25])) == (0.25, 0.0, 0.0)


def test_void_is_background():
    annotation = np.zeros((3, 20, 20), np.uint8)
    annotation[:, 2:8, 2:8] = 1
    void = annotation.copy()
    void[:, 10:, :] = 255
    result = annotation.copy()
    result[:, 12:15, 12:15] = 1
    for ours, same in zip(score_sequence(void, result), score_sequence(annotation, result), strict=True):
        assert np.array_equal(ours, same)


def test_bad_results_are_named_and_no_csv_is_written(results, capsys):
    (results / "camel" / "00003.png").unlink()
    shutil.rmtree(results / "judo")
    imwrite_indexed(results / "bike-packing" / "00002.png", np.zeros((5, 5), np.uint8))
    (results / "dogs-jump" / "00004.png").write_bytes(b"no image")
    assert run(SCORES, results) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    for line, words in zip(lines, (("00004.png", "cannot read"), ("00002.png", "5×5"), ("camel", "lacks 1 of 17"),
                                   ("judo", "no results")), strict=True):
        assert all(word in line for word in words)
    assert not list(results.glob("*.csv"))


def test_csv_files_that_cannot_be_written(results):
    (results / "global_results-val.csv").mkdir()
    with pytest.raises(WriteError, match="global_results-val.csv cannot be written: Is a directory"):
        run(SCORES, results)
    assert not list(results.glob(".*"))


def test_what_cannot_be_scored():
    masks = np.zeros((4, 10, 10), np.uint8)
    with pytest.raises(DataError, match="no object"):
        score_sequence(masks, masks)
    masks[:, 2:5, 2:5] = 1
    with pytest.raises(DataError, match="3 or more"):
        score_sequence(masks[:2], masks[:2])
    with pytest.raises(DataError, match="have id 2"):
        score_sequence(masks, 2 * masks)
    score_sequence(masks, np.stack([7 * masks[0], masks[1], masks[2], 7 * masks[3]]))  # first and last: not looked at
    with pytest.raises(DataError, match="annotations"):
        score_sequence(masks, masks[:3])


def test_names_outside_the_data_are_refused(tmp_path, results, capsys):
    (tmp_path / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "ImageSets" / "2017" / "val.txt").write_text("camel\n../x\n")
    assert run(tmp_path, results) == 1
    assert "'../x'" in capsys.readouterr().err
    assert run(tmp_path, results, "--set", "train") == 1
    assert "train.txt: no such file" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--results_path"):
        run(tmp_path, tmp_path / "nowhere")


def test_absent_ids_are_named_and_left_out_if_asked_for(tmp_path, capsys):
    """A grey PNG of id 38: 37 ids count as perfect in the official figure."""
    names = ("ImageSets/2017", "Annotations/480p/x", "results/x")
    for name in names:
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / names[0] / "val.txt").write_text("x\n")
    for t in range(5):
        mask = np.zeros((40, 60), np.uint8)
        mask[10:30, 10 + t:30 + t] = 38
        Image.fromarray(mask).save(tmp_path / names[1] / f"{t:05}.png")
        imwrite_indexed(tmp_path / names[2] / f"{t:05}.png", np.roll(mask, 4, axis=1))
    figures, said = [], []
    for words in ((), ("--present_objects",)):
        assert run(tmp_path, tmp_path / "results", *words) == 0
        out, err = capsys.readouterr()
        assert err.count("\n") == 1 and "x: 1, 2, 3" in err
        figures.append(float(out.splitlines()[1].split()[0]))
        said.append(float(re.findall(r"J&F-Mean.*? (\d\.\d+)", err)[0]))
        assert (tmp_path / "results" / "global_results-val.csv").read_text().splitlines()[1].startswith(
            out.splitlines()[1].split()[0])
    assert said == figures[::-1]  # each figure's line names the other one
    assert figures[0] == pytest.approx((37 + figures[1]) / 38, abs=1e-3) and figures[1] < 0.9


def write_clip(root, masks, name="Annotations/480p/x"):
    """Masks, or grey values, as the frames of sequence x."""
    (root / name).mkdir(parents=True)
    (root / "ImageSets" / "2017").mkdir(parents=True, exist_ok=True)
    (root / "ImageSets" / "2017" / "val.txt").write_text("x\n")
    for t, mask in enumerate(masks):
        (Image.fromarray(mask).save if name[0] == "A" else partial(imwrite_indexed, array=mask))(
            root / name / f"{t:05}.png")


def test_what_255_means_is_decided_by_the_first_annotation(tmp_path, capsys):
    """Grey masks of object 1 with void below; in two frames the object is hidden, and 0 and 255 alone are left."""
    masks = np.zeros((6, 40, 60), np.uint8)
    masks[:, 5:20, 10:30], masks[:, 30:] = 1, 255
    masks[2:4, :30] = 0
    write_clip(tmp_path, masks)
    write_clip(tmp_path, np.where(masks == 255, 0, masks), "results/x")
    assert run(tmp_path, tmp_path / "results") == 0
    out, err = capsys.readouterr()
    assert float(out.splitlines()[1].split()[0]) == 1 and err == ""


def test_masks_of_davis_2016(tmp_path, capsys):
    masks = np.zeros((6, 40, 60), np.uint8)
    masks[:, 5:20, 10:30] = 255
    masks[1] = 0  # hidden in the first frame of the results that is scored
    write_clip(tmp_path, masks)
    write_clip(tmp_path, masks // 255, "results/x")
    assert run(tmp_path, tmp_path / "results") == 0
    out, err = capsys.readouterr()
    assert float(out.splitlines()[1].split()[0]) == 1
    assert "00000.png: a grey mask of 0 and 255 is read as one object" in err
    shutil.copytree(tmp_path / "Annotations/480p/x", tmp_path / "grey/x")
    assert run(tmp_path, tmp_path / "grey") == 0
    assert float(capsys.readouterr().out.splitlines()[1].split()[0]) == 1
    masks[3, 0, 0] = 7
    Image.fromarray(masks[3]).save(tmp_path / "Annotations/480p/x/00003.png")
    assert run(tmp_path, tmp_path / "results") == 1
    assert "00003.png: has 255 beside other ids" in capsys.readouterr().err


def test_a_folder_without_permission_is_named(results, capsys, monkeypatch):
    refuse_listing(monkeypatch, SCORES / "Annotations" / "480p" / "camel")
    assert run(SCORES, results) == 1
    err = capsys.readouterr().err
    assert "camel: cannot be listed (Permission denied)" in err and err.count("\n") == 1
