"""Options that nobody means: one line, status 2, before any work."""
import random

import pytest
from small_job import SMALL

import convert_checkpoint
import davis_metrics
import eval_video_segmentation
import main_selfpatch
import visualize
from selfpatch.errors import run_main

pytestmark = pytest.mark.usefixtures("small_network")
LONG, NUL = "x" * 4000, "a\0b"


def end_of(job, words, monkeypatch, capsys):
    """Status and stderr of a job, as its file's last lines start it."""
    monkeypatch.setattr("sys.argv", ["job.py", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        if job is main_selfpatch:
            run_main(job.main)
        else:
            run_main(job.main, job.get_args_parser().parse_args())
    return stop.value.code, capsys.readouterr().err


NUMBERS = [10**20, -1, 2**31, 2**63, "1e400", "nan", "-inf", "", "0x10", "١٢"]
OPTIONS = ["seed", "epochs", "local_crops_number", "batch_size_per_gpu", "out_dim", "global_crops_size", "patch_size",
           "num_workers", "log_every", "saveckp_freq", "save_every_steps", "k_num", "accum_steps", "lr", "clip_grad",
           "teacher_temp", "dist_timeout", "loader_timeout", "save_every_minutes", "max_bad_images", "peak_tflops"]


def test_numbers_for_pretraining(image_folder, tmp_path, monkeypatch, capsys):
    """200 pairs of an option and a number. Those that are fine end in the stand-in for training."""
    def stand_in(*_):
        raise SystemExit(0)

    monkeypatch.setattr(main_selfpatch, "build_loader", stand_in)
    refused = 0
    for option in OPTIONS:
        for number in NUMBERS:
            words = [*SMALL, "--data_path", image_folder, "--output_dir", tmp_path, f"--{option}={number}"]
            status, err = end_of(main_selfpatch, words, monkeypatch, capsys)
            assert status in (0, 2) and err.count("\n") == (status == 2), (option, number, err)
            assert not status or f"--{option}" in err or option.split("_")[0] in err, (option, number, err)
            refused += status == 2
    assert refused > 150


@pytest.mark.parametrize("path", [LONG, f"{LONG}/{LONG}", NUL, "\x1b[31mred", "new\nline", "/dev/null/x", "",
                                  "😀" * 200])
def test_paths_for_every_job(image_folder, tmp_path, monkeypatch, capsys, path):
    out = tmp_path / "out"
    jobs = [(main_selfpatch, [*SMALL, "--data_path", path, "--output_dir", out]),
            (eval_video_segmentation, ["--data_path", path, "--output_dir", out, "--random_weights"]),
            (convert_checkpoint, [path, out, "--to", "timm"]),
            (visualize, ["attention", "--image_path", path, "--random_weights", "--output", out])]
    if path:  # an empty --output_dir is this folder
        jobs.append((main_selfpatch, [*SMALL, "--epochs", 0, "--data_path", image_folder, "--output_dir",
                                           f"/dev/null/{path}"]))
    for job, words in jobs:
        status, err = end_of(job, words, monkeypatch, capsys)
        assert status == 2 and err.count("\n") == 1 and "\x1b" not in err and len(err) < 10_000, (words, err)


@pytest.mark.parametrize("option", ["n_last_frames", "size_mask_neighborhood", "topk", "bs", "patch_size", "seed"])
@pytest.mark.parametrize("number", [10**20, -5, "x"])
def test_numbers_for_davis(tmp_path, monkeypatch, capsys, option, number):
    words = ["--data_path", tmp_path, "--output_dir", tmp_path / "out", "--random_weights", f"--{option}={number}"]
    status, err = end_of(eval_video_segmentation, words, monkeypatch, capsys)
    assert status == 2 and err.count("\n") == 1 and (f"--{option}" in err or option == "seed"), err


def test_random_words(image_folder, tmp_path, monkeypatch, capsys):
    """300 command lines of random options and values for five jobs: never a traceback. Sound ones stop at the data."""
    def stand_in(*_):
        raise SystemExit(0)

    monkeypatch.setattr(main_selfpatch, "build_loader", stand_in)
    rng, reached = random.Random(0), 0
    for _ in range(300):
        job = rng.choice([main_selfpatch, convert_checkpoint, davis_metrics, visualize, eval_video_segmentation])
        actions = [action for action in job.get_args_parser()._actions if action.option_strings]
        words = []
        for action in rng.sample(actions, min(3, len(actions))):
            if "-h" not in action.option_strings:
                value = rng.choice([str(10**20), "x", LONG, "", "-1", "0.5", str(tmp_path)])
                words += [action.option_strings[0], value]
        if job is main_selfpatch:  # where the data is there, more options are looked at
            words = words[:2] if rng.random() < 0.5 else words
            words = [*SMALL, "--data_path", str(image_folder), "--output_dir", str(tmp_path / "run"), *words]
        status, err = end_of(job, words, monkeypatch, capsys)
        assert status in (0, 1, 2) and err.count("\n") == (status > 0), (words, err)
        reached += not status
    assert 0 < reached < 100
