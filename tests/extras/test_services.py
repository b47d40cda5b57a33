"""Runs logged to the real wandb (offline) and trackio (its local store), read back from both."""
import json
import struct

import pytest
from small_job import options

from main_selfpatch import train_dino

pytestmark = pytest.mark.usefixtures("small_network")


def train_twice(image_folder, output, name):
    """One epoch, and a second one after resuming; the rows of steps.jsonl."""
    for epochs in (1, 2):
        train_dino(options("--epochs", epochs, "--data_path", image_folder, "--output_dir", output, "--log_every", 2,
                           "--log_with", name))
    return [json.loads(line) for line in (output / "steps.jsonl").read_text().splitlines()]


def test_trackio_has_every_row(image_folder, tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio", reason="trackio is not installed")
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "store")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "store")
    rows = train_twice(image_folder, tmp_path / "run", "trackio")
    (run,) = list(trackio.Api().runs("selfpatch"))
    from trackio.sqlite_storage import SQLiteStorage
    logged = SQLiteStorage.get_logs("selfpatch", run.name)
    steps = {row["step"]: row["step/loss"] for row in logged if "step/loss" in row}
    assert steps == {row["step"]: pytest.approx(row["loss"]) for row in rows}
    assert sum("train/loss" in row for row in logged) == 2


def read_history(data):
    """The logged rows of wandb's file: a log of LevelDB's format whose entries are protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record
    position, entry = 7, b""  # after the file's own header
    while position + 7 < len(data):
        if (rest := -position % 32768) < 7:  # no header of an entry's part crosses the end of a block
            position += rest
        _, length, kind = struct.unpack_from("<IHB", data, position)
        entry += data[position + 7:position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record, entry = Record.FromString(entry), b""
            if record.WhichOneof("record_type") == "history":
                yield {item.key or "/".join(item.nested_key): json.loads(item.value_json)
                       for item in record.history.item}


def test_wandb_has_every_row(image_folder, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    rows = train_twice(image_folder, tmp_path / "run", "wandb")
    logged = [row for path in sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
              for row in read_history(path.read_bytes())]
    steps = {row["trained_steps"]: row["step/loss"] for row in logged if "step/loss" in row}
    assert steps == {row["step"]: pytest.approx(row["loss"]) for row in rows}
    assert sum("train/loss" in row for row in logged) == 2
