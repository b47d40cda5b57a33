"""Shared material: a tiny ImageFolder of photograph-like noise."""
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

# tensors here are small: on a busy machine threads cost more than they give, in the jobs that tests start too
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


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
