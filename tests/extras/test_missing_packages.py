"""What a job says where an optional package is missing: one line, which ends with the command that installs it."""
import importlib
import runpy
import sys
from pathlib import Path

import pytest
import torch
from repository import ROOT

from selfpatch.checkpoints import onnx_file
from selfpatch.data import files
from selfpatch.errors import ConfigError, is_installed

OPENMMLAB = [f"{folder}/{job}.py" for folder in ("detection", "segmentation") for job in ("train", "test")]


@pytest.fixture
def missing(monkeypatch):
    """Makes packages missing."""
    def block(*packages):
        for package in packages:
            monkeypatch.setitem(sys.modules, package, None)
        for module in ("selfpatch.openmmlab.jobs", "selfpatch.openmmlab.config", "mmcv.ops"):
            monkeypatch.delitem(sys.modules, module, raising=False)

    return block


@pytest.mark.parametrize("packages, script, words", [
    ("tensorboard", "main_selfpatch.py", ["--data_path", ".", "--tensorboard"]),
    ("wandb", "main_selfpatch.py", ["--data_path", ".", "--log_with", "wandb"]),
    ("trackio", "main_selfpatch.py", ["--data_path", ".", "--log_with", "trackio"]),
    ("datasets", "main_selfpatch.py", ["--data_path", "hf:images"]),
    ("submitit", "run_with_submitit.py", []),
    ("matplotlib", "visualize.py", ["curves", "run", "--output", "a.png"]),
    ("matplotlib", "visualize.py", ["scores", "--davis_path", ".", "--results", ".", "--output", "a.png"]),
    ("matplotlib", "benchmarks/evidence.py", []),
    ("onnx onnxscript", "convert_checkpoint.py", ["a.pth", "b.onnx", "--to", "onnx"]),
    *[("mmcv", script, ["--help"]) for script in OPENMMLAB]])
def test_jobs_end_with_one_line(missing, monkeypatch, capsys, tmp_path, packages, script, words):
    missing(*packages.split())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *words])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    output, error = capsys.readouterr()
    install = "run ./install_openmmlab.sh" if packages == "mmcv" else f"pip install {packages}"
    assert stop.value.code == 2 and error.endswith(f": {install}\n") and error.count("\n") == 1, error
    assert error.startswith(f"{Path(script).name}: error: ") and not output and not list(tmp_path.iterdir())


def test_the_library_names_openmmlabs_installer(missing):
    missing("mmcv")
    with pytest.raises(ConfigError, match=r"not all installed \(.*mmcv.*\): run \./install_openmmlab\.sh"):
        importlib.import_module("selfpatch.openmmlab.jobs")


def test_without_a_jpeg_decoder_pretraining_names_one(missing, monkeypatch):
    missing("torchcodec", "torchcodec.decoders")
    assert "torchcodec" not in files.installed_decoders()
    monkeypatch.setattr(files, "decode_jpeg", None)
    assert files.decoder_note().endswith("slower than torchcodec: pip install 'torchcodec>=0.16'")


def test_without_onnxruntime_a_file_is_not_compared(missing, tmp_path):
    missing("onnxruntime")
    assert onnx_file.compare(torch.nn.Identity(), tmp_path / "vit.onnx", (64, 64)) is None


def test_a_folder_is_no_package(tmp_path, monkeypatch):
    """Such as the folder wandb in which that package logs."""
    (tmp_path / "folder_of_logs").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_installed("folder_of_logs") and is_installed("torch") and not is_installed("no_such_package")
