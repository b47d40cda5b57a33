"""log.txt: what a new, a resumed and a killed run make of it, and disks that are full."""
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from small_job import end_of_job, load, options

from main_selfpatch import train_dino
from selfpatch.data.loader import DataWait
from selfpatch.pretraining import logs
from selfpatch.pretraining.logs import RunLog
from selfpatch.pretraining.run_folder import RunFolder

pytestmark = [pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning"),
              pytest.mark.usefixtures("small_network")]


def log_of(folder, epoch, older=None):
    """The RunLog of a run that has done so many epochs of two steps."""
    run = SimpleNamespace(step=2 * epoch, epoch=epoch, steps_per_epoch=2)
    return RunLog(folder, run, SimpleNamespace(wait=DataWait(torch.device("cpu"))), 8, older)


@pytest.mark.parametrize("text, expected", [
    ("", []), ('{"epoch": 0}\n', ['{"epoch": 0}']), ('{"epoch": 0}\n{"ep', ['{"epoch": 0}']),
    ('{"epoch": 0}', ['{"epoch": 0}']),
    ('hello\n{"epoch": 0}\n{"epoch": 0}\n{"epoch": 3}\n', ["hello", '{"epoch": 0}'])])
def test_a_resumed_run_drops_the_rows_after_its_checkpoint(tmp_path, text, expected):
    """And rows that are doubled or half written; lines of other kinds stay."""
    (tmp_path / "log.txt").write_text(text)
    log_of(tmp_path, 1, (0, 0)).log_epoch({"train_loss": 2.0, "epoch": 1})
    assert (tmp_path / "log.txt").read_text().splitlines() == [*expected, '{"train_loss": 2.0, "epoch": 1}']


def test_a_new_run_adds_to_an_older_log(tmp_path):
    """Also when it is killed between its first row and its first checkpoint, and begins again."""
    (tmp_path / "log.txt").write_text('{"epoch": 0}\n{"ep')
    for _ in range(3):
        log = log_of(tmp_path, 0)
        log.log_epoch({"train_loss": 2.0, "epoch": 0})
        assert (tmp_path / "log.txt").read_text().splitlines() == [
            '{"epoch": 0}', '{"ep', '{"train_loss": 2.0, "epoch": 0}']
    log.saved()
    log = log_of(tmp_path, 1, log.state_dict()["older_log"])
    log.amend_epoch({"knn_top1": 50.0})
    rows = ['{"epoch": 0}', '{"ep', '{"train_loss": 2.0, "epoch": 0, "knn_top1": 50.0}']
    assert (tmp_path / "log.txt").read_text().splitlines() == rows
    (tmp_path / "log.txt").write_text("\n".join(["a note", *rows]))  # which moves the mark
    assert log_of(tmp_path, 1, log.state_dict()["older_log"]).last_row["train_loss"] == 2.0
    assert (tmp_path / "log.txt").read_text().splitlines() == ["a note", *rows]


def test_rows_are_written_when_a_full_disk_has_room_again(tmp_path, monkeypatch, capsys):
    log, replace = log_of(tmp_path, 0), os.replace

    def full(*_):
        raise OSError(28, "No space left on device")

    log.log_epoch({"epoch": 0})
    monkeypatch.setattr(os, "replace", full)
    log.amend_epoch({"knn_top1": 50.0})
    assert "log.txt (No space left on device); training goes on" in capsys.readouterr().out
    log.log_epoch({"epoch": 1})
    log.amend_epoch({"knn_top1": 60.0})
    monkeypatch.setattr(os, "replace", replace)
    log.flush()
    assert [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()] == [
        {"epoch": 0, "knn_top1": 50.0}, {"epoch": 1, "knn_top1": 60.0}]


@pytest.mark.parametrize("moment", ["try_save", "saved"])
def test_killed_beside_the_first_checkpoint(image_folder, two_epochs, tmp_path, monkeypatch, moment):
    """The row is there before the checkpoint: a run that begins again, or goes on, does not double it."""
    def killed(*_):
        raise KeyboardInterrupt

    words = ["--epochs", 2, "--data_path", image_folder, "--output_dir", tmp_path]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder if moment == "try_save" else RunLog, moment, killed)
        train_dino(options(*words))
    assert (tmp_path / "unsaved.txt").exists() and len((tmp_path / "log.txt").read_text().splitlines()) == 1
    train_dino(options(*words))
    for name in ("log.txt", "checkpoint.pth"):
        assert (tmp_path / name).exists() and not (tmp_path / "unsaved.txt").exists()
    assert (tmp_path / "log.txt").read_bytes() == (two_epochs / "log.txt").read_bytes()


def test_the_log_of_a_run_whose_checkpoint_has_the_rows_is_kept(image_folder, two_epochs, tmp_path):
    """As commit d8b5475 wrote them."""
    rows = [json.loads(line) for line in (two_epochs / "log.txt").read_text().splitlines()]
    torch.save(load(two_epochs / "checkpoint0000.pth") | {"log": rows[:1]}, tmp_path / "checkpoint.pth")
    shutil.copy(two_epochs / "log.txt", tmp_path)
    train_dino(options("--epochs", 2, "--data_path", image_folder, "--output_dir", tmp_path))
    assert (tmp_path / "log.txt").read_bytes() == (two_epochs / "log.txt").read_bytes()
    assert "log" not in load(tmp_path / "checkpoint.pth")


def test_an_older_log_outlives_resuming(image_folder, two_epochs, tmp_path):
    """A run that begins where an older log lies keeps it, also when it is continued within its first epochs."""
    (tmp_path / "log.txt").write_text('{"epoch": 0}\nnote\n{"epoch": 1}\n')
    words = ["--data_path", image_folder, "--output_dir", tmp_path]
    train_dino(options("--epochs", 2, *words))
    shutil.copy(tmp_path / "checkpoint0000.pth", tmp_path / "checkpoint.pth")
    train_dino(options("--epochs", 2, *words))
    older, rows = (path.read_text().splitlines() for path in (tmp_path / "log.txt", two_epochs / "log.txt"))
    assert older == ['{"epoch": 0}', "note", '{"epoch": 1}', *rows]
    (tmp_path / "log.txt").write_text("".join(f"{line}\n" for line in rows))  # cleaned up by hand
    train_dino(options("--epochs", 2, *words))
    assert (tmp_path / "log.txt").read_text().splitlines() == rows


def test_brackets_in_brackets_are_no_row():
    assert logs.parse_row("[" * 100_000) is None and logs.parse_row('{"epoch": 3}') == {"epoch": 3}


def test_a_log_that_is_no_text_any_more_does_not_end_the_run(tmp_path):
    log = log_of(tmp_path, 0)
    log.epochs.path.write_bytes(b"\xff\xfe\n")
    log.log_epoch({"epoch": 0})
    assert log.epochs.path.read_bytes() == b'\xff\xfe\n{"epoch": 0}\n'


def test_log_that_cannot_be_written_is_one_line(image_folder, tmp_path, monkeypatch, capsys):
    log_epoch = RunLog.log_epoch

    def folder_in_the_way(log, row):
        log.epochs.path.unlink()
        log.epochs.path.mkdir()
        log_epoch(log, row)

    monkeypatch.setattr(RunLog, "log_epoch", folder_in_the_way)
    status, err = end_of_job(monkeypatch, capsys, image_folder, tmp_path)
    assert (status, err.count("\n")) == (1, 1) and f"cannot write to {tmp_path / 'log.txt'}" in err


def test_an_amended_row_outlives_a_failed_flush(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    log = log_of(tmp_path, 0)
    log.log_epoch({"epoch": 0, "train_loss": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr(logs.os, "fsync", full)
        log.flush()
    log.amend_epoch({"knn_top1": 50.0})
    log.log_epoch({"epoch": 1})
    assert [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()] == [
        {"epoch": 0, "train_loss": 1.0, "knn_top1": 50.0}, {"epoch": 1}]


def test_an_older_runs_steps_outlive_a_kill_as_they_are_set_aside(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    (tmp_path / "log.txt").write_text('{"epoch": 0}\n')
    (tmp_path / "steps.jsonl").write_text('{"step": 1, "epoch": 0.5}\n')
    (tmp_path / "unsaved.txt").write_text("not a mark")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunLog, "set_steps_aside", killed)
        log_of(tmp_path, 0)
    log_of(tmp_path, 0)
    assert (tmp_path / "earlier_steps.jsonl").read_text() == '{"step": 1, "epoch": 0.5}\n'
    assert not (tmp_path / "steps.jsonl").exists()
