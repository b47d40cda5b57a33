"""Shared fixtures: a tiny ImageFolder of photograph-like noise, the pretraining job made small, a run of it."""
import contextlib
import ctypes
import os
import signal
import sys

import numpy as np
import pytest
import torch
from networks import shrink_job
from PIL import Image, ImageFilter

with contextlib.suppress(ImportError):  # torch's compiler imports it, which fails once distutils was imported alone
    import setuptools  # noqa: F401

# tensors here are small: on a busy machine threads cost more than they give, in the jobs that tests start too
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# shells start what runs in the background without SIGINT, and nohup without SIGHUP; jobs heed that
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# faulthandler_timeout ends a process of the tests, but not its forked data workers, which hold pytest's pipe open;
# with this they end when the thread that forked them does
if sys.platform == "linux":
    libc, PR_SET_PDEATHSIG = ctypes.CDLL(None), 1
    os.register_at_fork(after_in_child=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL))


@pytest.fixture(autouse=True)
def same_seed():
    torch.manual_seed(0)
    yield
    if "torch._dynamo" in sys.modules:  # compiled code counts against a limit that all tests would share
        torch._dynamo.reset()


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """12 JPEGs of 64×48 in two class folders."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(12):
        folder = root / f"class{i % 2}"
        folder.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(2)).save(folder / f"{i:02}.jpg")
    return root


@pytest.fixture
def small_network(monkeypatch):
    """The pretraining job with a narrow, shallow vit_tiny and narrow heads; test_launchers.py runs the real ones."""
    shrink_job(monkeypatch)


@pytest.fixture(scope="session")
def two_epochs(image_folder, tmp_path_factory):
    """A whole run of the small network, its checkpoint after the first epoch kept as checkpoint0000.pth."""
    from small_job import options

    from main_selfpatch import train_dino
    output = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        shrink_job(patch)
        train_dino(options("--epochs", 2, "--data_path", image_folder, "--output_dir", output, "--tensorboard"))
    return output
