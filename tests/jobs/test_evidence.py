"""The comparison of DINO and SelfPatch: what it measures, that it goes on where it was, and what it refuses."""
import argparse
import json
import os
import signal
import statistics
from pathlib import Path

import pytest
from PIL import Image

import demo
import eval_dense_retrieval
import eval_knn
import eval_video_segmentation
import visualize
from selfpatch.errors import ConfigError, RunStopped, TrainingError


@pytest.fixture
def evidence(monkeypatch):
    import evidence
    handler = signal.getsignal(signal.SIGTERM)
    yield evidence
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def settings(evidence):
    import evidence_settings
    return evidence_settings


def start(evidence, *words):
    return evidence.main(*evidence.get_parser().parse_known_args([*map(str, words)]))


def script(path, code):
    path.write_text(code)
    return str(path)


@pytest.mark.long
def test_both_methods_once_and_no_figure_twice(evidence, settings, tmp_path, monkeypatch, capfd):
    for module, name, value in ((demo, "MEMORY", 16), (demo, "TESTED", 8), (demo, "CLIPS", 1), (demo, "FRAMES", 3),
                                (settings, "HELD_OUT", 40)):
        monkeypatch.setattr(module, name, value)
    words = ["--output_dir", tmp_path, "--epochs", 1, "--scenes", 64, "--num_workers", 0]
    start(evidence, *words)
    out = capfd.readouterr().out
    found = json.loads((tmp_path / "figures.json").read_text())
    methods = found["figures"]["0"]
    assert list(methods) == ["random", "DINO", "SelfPatch 0.1"]
    measured = {"k-NN", "J&F", "mean IoU"}
    trained = measured | {"image loss", "images", "seconds", "CPU s"}
    assert [set(row) for row in methods.values()] == [measured, trained, trained | {"patch loss"}]
    assert methods["DINO"]["images"] == 64 and methods["random"] != methods["DINO"] != methods["SelfPatch 0.1"]
    gain = methods["SelfPatch 0.1"]["J&F"] - methods["DINO"]["J&F"]
    assert found["differences"]["SelfPatch 0.1"]["0"]["J&F"] == pytest.approx(gain) and f"{gain:+.3f}" in out
    row = json.loads((tmp_path / "seed0" / "DINO" / "run" / "log.txt").read_text())
    assert row["train_clsloss"] == methods["DINO"]["image loss"] and "knn_top1" in row
    assert Image.open(tmp_path / "overlay.gif").n_frames == 3 and (tmp_path / "curves.png").is_file()

    files = [path for path in (tmp_path / "seed0").rglob("*") if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in files}
    start(evidence, *words)
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert "$ python" not in capfd.readouterr().out
    with pytest.raises(ConfigError, match=r"figures of other settings: epochs 2 \(there 1\)"):
        start(evidence, *words, "--epochs", 2)


def test_other_settings_are_refused_and_evaluations_can_be_added(evidence, tmp_path):
    path = tmp_path / "new" / "settings.json"
    evidence.check_settings(path, {"lr": 0.1, "crops": (1, 2)})
    evidence.check_settings(path, {"lr": 0.1, "crops": (1, 2), "davis_path": "/davis"})
    evidence.check_settings(path, {"lr": 0.1, "crops": (1, 2)})
    for change in ({"lr": 0.2}, {"davis_path": "/other"}):
        with pytest.raises(ConfigError, match=next(iter(change))):
            evidence.check_settings(path, change)


@pytest.mark.parametrize("words", [("--epochs", 0), ("--minutes", -1), ("--davis_path", "/davis"),
                                   ("--data_path", "/no/photographs"),
                                   ("--local_crops_size", 16),  # DINO could do with that
                                   ("--seed", 5), ("--init_weights", "run")])
def test_what_cannot_work_is_refused_at_once(evidence, tmp_path, words):
    with pytest.raises(ConfigError, match=words[0]):
        start(evidence, "--output_dir", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_a_job_is_asked_to_end_when_the_time_is_up(settings, tmp_path):
    saving = script(tmp_path / "saving.py", "import pathlib, signal, sys, time\n"
                    "def stop(*_):\n    pathlib.Path(sys.argv[1]).write_text('saved')\n    sys.exit(75)\n"
                    "signal.signal(signal.SIGTERM, stop)\npathlib.Path(sys.argv[1]).touch()\ntime.sleep(60)\n")
    quick, failing = (script(tmp_path / f"{n}.py", f"import sys\nsys.exit({n})\n") for n in (0, 3))
    settings.Jobs(0)(quick)
    with pytest.raises(TrainingError, match="status 3"):
        settings.Jobs(0)(failing)
    jobs = settings.Jobs(3 / 60)
    with pytest.raises(RunStopped, match="same command again"):
        jobs(saving, str(tmp_path / "state"))
    assert (tmp_path / "state").read_text() == "saved"
    with pytest.raises(RunStopped, match="are over"):
        jobs(quick)


def test_a_stopped_run_is_not_done_and_its_time_counts(evidence, tmp_path):
    def jobs(*_):
        raise RunStopped("time is up")

    words, record = ["main_selfpatch.py", "--batch_size_per_gpu", "8", "--accum_steps", "2"], tmp_path / "training.json"
    with pytest.raises(RunStopped):
        evidence.pretrain(jobs, words, record)
    first = json.loads(record.read_text())
    evidence.pretrain(lambda *_: None, words, record)
    second = json.loads(record.read_text())
    assert first["batch"] == 16 and not first["done"] and second["done"] and second["seconds"] > first["seconds"] > 0


def test_tables_have_every_seed_the_spread_and_the_differences(evidence):
    found = {0: {"DINO": {"k-NN": 0.5, "image loss": 4.0}, "SelfPatch": {"k-NN": 0.4, "image loss": 4.5}},
             1: {"DINO": {"k-NN": 0.6, "image loss": 4.0}, "SelfPatch": {"k-NN": 0.7, "image loss": 4.1,
                                                                         "patch loss": 5.0}}}
    text = evidence.all_tables(found, [("DINO", "SelfPatch")])
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    spread = statistics.stdev([0.4, 0.7])
    assert f"0.550 ± {spread:.3f}" in rows["SelfPatch, mean"] and "5.000" in rows["SelfPatch, mean"]
    assert "-0.100" in rows["seed 0"] and "+0.100" in rows["seed 1"] and "+0.300 ± 0.283" in rows["mean"]
    assert "patch loss" not in text.split("seed by seed")[1] and "±" not in rows["seed 0"]
    assert "SelfPatch - DINO" not in evidence.all_tables({0: {"DINO": {"k-NN": 0.5}}}, [("DINO", "SelfPatch")])


def test_photographs_are_evaluated_by_jobs_that_know_their_options(evidence, settings, tmp_path, monkeypatch):
    started = []
    args = argparse.Namespace(output_dir=tmp_path, data_path=Path("/nette"), davis_path=Path("/davis"), epochs=None,
                              patch_loss_weight=[0.03, 0.1],
                              segmentation_path="folders:/a,/b", num_classes=3,
                              others=["--device", "cpu", "--num_workers", "3", "--global_crops_size", "96"])
    monkeypatch.setattr(settings, "score_folder", lambda *_: None)
    monkeypatch.setattr(settings, "summarise", lambda *_: ({"J&F-Mean": 0.25}, {}))
    setting, folder = settings.Photographs(args, lambda *words: started.append(words)), tmp_path / "seed1" / "DINO"
    folder.mkdir(parents=True)
    evaluations = setting.evaluations(1, folder)
    for name, evaluate in evaluations.items():
        evaluate(folder / f"{name}.json")
    setting.overlay(tmp_path / "overlay.gif", 1)
    jobs = {name: words for name, *words in started}
    for job in (eval_knn, eval_dense_retrieval, eval_video_segmentation, visualize):
        options = job.get_args_parser().parse_args(jobs[os.path.basename(job.__file__)])
    assert "seed1/SelfPatch 0.1/masks" in options.results[3]
    knn = eval_knn.get_args_parser().parse_args(jobs["eval_knn.py"])
    assert (knn.image_size, knn.num_workers, knn.device) == (96, 3, "cpu")
    (folder / "knn.json").write_text(json.dumps({"networks": [{"knn": {"20": {"top1": 50.0, "top5": 90.0}}}]}))
    (folder / "dense.json").write_text(json.dumps({"networks": [{"figures": {"mean IoU, all classes": 0.5}}]}))
    assert setting.figures(folder) == {"J&F": 0.25, "k-NN": 0.5, "mean IoU": 0.5}
