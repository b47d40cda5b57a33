"""GPUs that would only emulate bfloat16, V100, T4 and GTX, under a CUDA runtime that computes nothing.

    REHEARSE -m pytest -n0 tests/pretraining/test_rehearsal_older.py
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

null = pytest.importorskip("null_cuda", reason="not under a CUDA runtime that counts")

import rehearse_gpu  # noqa: E402
from networks import shrink_job  # noqa: E402
from small_job import SMALL  # noqa: E402

import main_selfpatch  # noqa: E402
from selfpatch.errors import run_main  # noqa: E402

CHOSEN = "float16 with memory-efficient attention"


@pytest.fixture(params=[0, 5], ids=["7.0", "7.5"])
def on_older_gpu(request, tmp_path):
    """Starts a function of this file on such a GPU; its output and the names of the kernels that were launched."""
    def start(what, *words):
        env = os.environ | {"NULL_MAJOR": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
        result = subprocess.run(
            [sys.executable, "-W", "ignore", null.__file__, __file__, str(request.param), str(tmp_path / "kernels"),
             what, *map(str, words)], capture_output=True, text=True, env=env, timeout=300)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout, (tmp_path / "kernels").read_text()

    return start


def check_kernels(kernels: str) -> None:
    assert "fmha_cutlassF_f16" in kernels and "fmha_cutlassB_f16" in kernels
    assert "flash" not in kernels and "bf16" not in kernels and "BFloat16" not in kernels


def test_pretraining(on_older_gpu, image_folder, tmp_path):
    output, kernels = on_older_gpu("train", *SMALL, "--device", "cuda", "--compile", "off", "--epochs", 1,
                                   "--data_path", image_folder, "--output_dir", tmp_path)
    assert f"on cuda in {CHOSEN}; starting from scratch" in output.splitlines()[0]
    check_kernels(kernels)


def test_what_fits_which_card(on_older_gpu):
    output, kernels = on_older_gpu("fits", "--fits")
    assert output.startswith(f"in {CHOSEN} on compute capability 7.")
    check_kernels(kernels)


def train(*words) -> None:
    """main_selfpatch.py, with a small network."""
    patch = pytest.MonkeyPatch()
    shrink_job(patch)
    patch.setattr("selfpatch.pretraining.loop.check_weights", lambda _: None)  # whose answer is 0 here, which means no
    patch.setattr("selfpatch.pretraining.engine.SMALLEST_SCALE", -1.0)  # of the scaler, whose value is 0 here
    patch.setattr("sys.argv", ["main_selfpatch.py", *words])
    main_selfpatch.main()


def fits(*words) -> None:
    """rehearse_gpu.py, with one small step in the place of each measurement."""
    def step(args, **changes):
        rehearse_gpu.take_step(rehearse_gpu.make_way(args, arch="vit_pico", batch_size=2, local_crops_number=1))
        return 1.0, 0.1

    patch = pytest.MonkeyPatch()
    patch.setattr(rehearse_gpu, "memory_line", step)
    patch.setattr("sys.argv", ["rehearse_gpu.py", *words])
    rehearse_gpu.main()


if __name__ == "__main__":
    minor, file, what, *words = sys.argv[1:]
    torch.cuda.get_device_capability = lambda *_: (7, int(minor))  # the runtime's own is 7.0
    main = {"train": train, "fits": fits}[what]

    def counted() -> None:
        main(*words)
        null.kernels(Path(file))

    run_main(counted)
