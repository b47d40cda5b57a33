"""The pretraining job with a small network and small crops, in this process."""
import pytest
import torch

import main_selfpatch
from main_selfpatch import get_args_parser
from selfpatch.errors import run_main

SMALL = ["--arch", "vit_tiny", "--global_crops_size", "48", "--local_crops_size", "48", "--local_crops_number", "1",
         "--out_dim", "64", "--out_dim_selfpatch", "32", "--batch_size_per_gpu", "4", "--num_workers", "0",
         "--warmup_epochs", "1", "--device", "cpu", "--saveckp_freq", "1"]


def options(*words):
    return get_args_parser().parse_args([*SMALL, *map(str, words)])


def load(path):
    return torch.load(path, weights_only=True)


def end_of_job(monkeypatch, capsys, image_folder, output, *words):
    """Status and stderr of a job that main ends."""
    monkeypatch.setattr("sys.argv", ["main_selfpatch.py", *SMALL, "--epochs", "1", "--data_path", str(image_folder),
                                     "--output_dir", str(output), *words])
    with pytest.raises(SystemExit) as stop:
        run_main(main_selfpatch.main)
    return stop.value.code, capsys.readouterr().err
