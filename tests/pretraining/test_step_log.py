"""steps.jsonl: what its rows say, what a resumed run keeps of them, and full disks."""
import errno
import json
import math
import os
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from networks import constant_run, small_wrapper
from small_job import options

from main_selfpatch import train_dino
from selfpatch.data.loader import DataWait
from selfpatch.errors import ConfigError, TrainingError
from selfpatch.method.fused_loss import FusedDINOLoss
from selfpatch.method.training_run import build_networks
from selfpatch.pretraining import engine, logs
from selfpatch.pretraining.engine import clipping, gradient_norms
from selfpatch.pretraining.flops import flops_per_image
from selfpatch.pretraining.logs import JsonLines, RunLog, rows_until
from selfpatch.pretraining.meters import MetricLogger

pytestmark = [pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning"),
              pytest.mark.usefixtures("small_network")]


def read_rows(folder):
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


def small_run(steps_per_epoch=10):
    teacher = small_wrapper().requires_grad_(False)
    return constant_run(small_wrapper(), teacher, FusedDINOLoss(12, 10, 3), steps_per_epoch=steps_per_epoch)


def log_of(folder, step, rows=None, **kwargs):
    """A RunLog in a folder whose steps.jsonl holds rows, of a run that continues after a step."""
    if rows is not None:
        (folder / "steps.jsonl").write_text(rows)
    run = small_run()
    run.step = step
    return RunLog(folder, run, SimpleNamespace(wait=DataWait(torch.device("cpu"))), images_per_step=8, **kwargs)


def line(step, steps_per_epoch=10):
    return json.dumps({"step": step, "epoch": step / steps_per_epoch}) + "\n"


# ----------------------------------------------------------------------------------------------------------------------
# Rows


def test_rows_say_what_the_lines_of_progress_do(image_folder, tmp_path, capsys):
    """A row for every line, whose numbers agree with the line, with log.txt and with the schedules."""
    train_dino(options("--epochs", 2, "--data_path", image_folder, "--output_dir", tmp_path, "--log_every", 1,
                       "--peak_tflops", 0.5))
    printed = [text for text in capsys.readouterr().out.splitlines() if text.startswith("epoch ")]
    rows = read_rows(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and len(printed) == 6
    assert [row["epoch"] for row in rows] == pytest.approx([n / 3 for n in range(1, 7)])
    for row, text in zip(rows, printed, strict=True):
        assert f"loss {row['loss']:.4f}  image {row['image_loss']:.4f} (ln K {row['image_ln_k']:.4f})" in text
        assert f"patch {row['patch_loss']:.4f} (ln K {row['patch_ln_k']:.4f})  lr {row['lr']:.2e}" in text
        assert f"{row['images_per_second']:.1f} images/s" in text and f"memory {row['memory_gib']:.1f} GiB" in text
        assert row["loss"] == pytest.approx(row["image_loss"] + 0.1 * row["patch_loss"])
        assert row["gradient_norm"] > 0 and 0 <= row["clipped_share"] <= 1 and 0 < row["data_wait"] < 1
        assert 0 < row["image_entropy"] <= math.log(64) and 0 < row["patch_entropy"] <= math.log(32)
        flops = flops_per_image(build_networks("vit_tiny", 16, 64, 32)[0], [48, 48, 48])
        assert row["mfu"] == pytest.approx(row["images_per_second"] * flops / 0.5e12)
    assert [rows[0][name] for name in ("weight_decay", "teacher_momentum")] == pytest.approx([0.04, 0.996])
    assert rows[5]["weight_decay"] > 0.3 and rows[5]["teacher_momentum"] > 0.999
    epochs = [json.loads(text) for text in (tmp_path / "log.txt").read_text().splitlines()]
    assert epochs[1]["train_loss"] == pytest.approx(sum(row["loss"] for row in rows[3:]) / 3)
    assert epochs[1]["train_lr"] == rows[5]["lr"] and epochs[1]["train_wd"] == rows[5]["weight_decay"]


def test_rows_of_dino_have_no_patch_terms(image_folder, tmp_path):
    train_dino(options("--epochs", 1, "--data_path", image_folder, "--output_dir", tmp_path, "--patch_loss_weight", 0))
    row, = read_rows(tmp_path)
    assert row["step"] == 3 and "image_loss" in row and not any(name.startswith("patch") for name in row)
    assert "mfu" not in row  # no peak is known


def test_gradient_norms_are_those_before_clipping():
    """Of a step whose gradients are computed once more, without clipping."""
    torch.manual_seed(0)
    crops = [torch.randn(2, 3, 32, 32) for _ in range(3)]
    runs = [small_run(), small_run()]
    runs[1].student.load_state_dict(runs[0].student.state_dict())
    runs[1].teacher.load_state_dict(runs[0].teacher.state_dict())
    runs[0].clip_grad, runs[1].clip_grad = 0.05, 0
    for run in runs:
        engine.train_step(run, [crops])
    norms = gradient_norms(runs[1].student)
    torch.testing.assert_close(runs[0].gradient_norms, norms)
    found = clipping(runs[0].gradient_norms, 0.05)
    assert found["gradient_norm"] == norms.max() > 0.05
    assert 0 < found["clipped"] == (norms > 0.05).float().mean() < 1
    assert clipping(norms, 0)["clipped"] == 0


def test_an_infinite_norm_is_no_number_in_json(tmp_path):
    """float16's scaler tries scales that are too large."""
    log, logger = log_of(tmp_path, 0), MetricLogger(window=2)
    for norm in (1.0, math.inf):
        logger.update(total=1.0, image=1.0, patch=1.0, image_entropy=1.0, patch_entropy=1.0, gradient_norm=norm,
                      clipped=0.5)
    logger.read()
    log.run.step = 2
    log.log_step(logger)
    row, = read_rows(tmp_path)
    assert row["gradient_norm"] is None and "Infinity" not in (tmp_path / "steps.jsonl").read_text()


def test_time_that_waited_for_data():
    wait = DataWait(torch.device("cpu"))

    def batches():
        for i in range(3):
            time.sleep(0.05)
            yield i

    assert list(wait.timed(batches())) == [0, 1, 2] and not wait.measured  # nobody has asked for it
    wait.begin()
    for _ in wait.timed(batches()):
        time.sleep(0.05)
    assert 0.3 < wait.share() < 0.7
    time.sleep(0.01)
    assert wait.share() == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_busy_gpu_does_not_wait():
    """The host waits for a batch while the device still works; then the device has nothing to do."""
    wait = DataWait(torch.device("cuda"))
    wait.begin()
    for _ in wait.timed(time.sleep(0.1) or i for i in range(3)):
        torch.cuda._sleep(10**9)
    torch.cuda.synchronize()
    assert wait.share() < 0.3
    for _ in wait.timed(time.sleep(0.1) or i for i in range(3)):
        torch.cuda._sleep(10**6)
    torch.cuda.synchronize()
    assert wait.share() > 0.8


# ----------------------------------------------------------------------------------------------------------------------
# Resuming, and disks


@pytest.mark.parametrize("text, kept", [
    ("", []), (line(4), [4]), (line(4) + line(8) + line(12) + line(16), [4, 8, 12]),
    (line(4) + line(4) + line(8) + line(6), [4, 8]), (line(4) + line(8)[:-5], [4]), (line(4) + line(8)[:-1], [4, 8]),
    ("\0\0\0\n" + line(4) + "hello\n[1]\n{}\n", [4])])
def test_a_resumed_run_keeps_the_rows_of_its_checkpoint(tmp_path, text, kept):
    """Rows that are doubled, half written or to be written again go."""
    log = log_of(tmp_path, 12, text)
    log.steps.append({"step": 16, "epoch": 1.6})
    assert [row["step"] for row in read_rows(tmp_path)] == [*kept, 16]
    assert not list(tmp_path.glob(".*"))


def test_rows_are_compared_by_epoch_where_the_batch_has_changed():
    """20 steps an epoch before, 10 now: epoch 1.2 was step 24."""
    data = "".join(line(step, 20) for step in (8, 16, 24, 32)).encode()
    assert [json.loads(one)["step"] for one in rows_until(data, 12.5 / 10)] == [8, 16, 24]


def test_a_run_from_scratch_begins_the_file_anew(tmp_path):
    log_of(tmp_path, 0, line(4)).steps.append({"step": 4, "epoch": 0.4})  # killed before its first checkpoint
    log = log_of(tmp_path, 0)
    assert not read_rows(tmp_path) and not (tmp_path / "earlier_steps.jsonl").exists()
    log.steps.append({"step": 4, "epoch": 0.4})
    log.log_epoch({"epoch": 0})
    log.saved()
    for _ in range(2):  # whose checkpoint is removed: another run begins, and is killed before its first checkpoint
        log_of(tmp_path, 0).steps.append({"step": 4, "epoch": 0.4})
        assert (tmp_path / "earlier_steps.jsonl").read_text() == line(4) and len(read_rows(tmp_path)) == 1


def test_a_killed_run_misses_and_doubles_no_row(image_folder, two_epochs, tmp_path):
    shutil.copy(two_epochs / "checkpoint0000.pth", tmp_path / "checkpoint.pth")
    shutil.copy(two_epochs / "log.txt", tmp_path / "log.txt")
    (tmp_path / "steps.jsonl").write_text("".join(line(step, 3) for step in (1, 2, 3, 4, 5)) + '{"step": 6, "ep')
    train_dino(options("--epochs", 2, "--data_path", image_folder, "--output_dir", tmp_path, "--log_every", 1))
    rows = read_rows(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and ["loss" in row for row in rows] == [False] * 3 + [
        True] * 3


def full_disk(monkeypatch, number, left):
    """logs.open gives files that take `left` bytes more."""
    class Full:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            self.file.write(data[:left])
            self.file.flush()
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(logs, "open", lambda *args: Full(open(*args)), raising=False)


def test_a_full_disk_is_a_warning_and_no_row_is_lost(tmp_path, monkeypatch, capsys):
    log = JsonLines(tmp_path / "steps.jsonl")
    log.append({"step": 4, "epoch": 0.4})
    with monkeypatch.context() as patch:
        full_disk(patch, errno.ENOSPC, left=7)
        log.append({"step": 8, "epoch": 0.8})
    assert "steps.jsonl (No space left on device); training goes on" in capsys.readouterr().out
    assert (tmp_path / "steps.jsonl").read_text() == line(4) + line(8)[:7]
    log.append({"step": 12, "epoch": 1.2})
    assert (tmp_path / "steps.jsonl").read_text() == line(4) + line(8) + line(12)
    full_disk(monkeypatch, errno.EROFS, left=0)
    with pytest.raises(TrainingError, match="Read-only file system.*: the same command continues"):
        log.append({"step": 16, "epoch": 1.6})


def test_a_folder_in_the_way_is_named_at_the_start(image_folder, tmp_path):
    (tmp_path / "steps.jsonl").mkdir()
    with pytest.raises(ConfigError, match="steps.jsonl is a folder, not the log of a run"):
        train_dino(options("--data_path", image_folder, "--output_dir", tmp_path))


# ----------------------------------------------------------------------------------------------------------------------
# The time of the whole run


def test_expected_time_leaves_out_the_first_steps(tmp_path, capsys):
    """100 steps; the second reading is the first without the slow ones, and the line comes once."""
    log = log_of(tmp_path, 0)
    for step, seconds in ((1, 50), (2, 40), (10, 30), (20, 2.0), (30, 1.0)):
        log.run.step = step
        log.announce(seconds)
    assert capsys.readouterr().out == ("expected time: 0:03:20 for the whole run of 10 epochs, of which 0:02:40 remain "
                                       "(without evaluations and saving)\n")
