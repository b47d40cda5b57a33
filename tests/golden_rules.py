"""How the figures in tests/golden/ were made: weights and inputs from names and seeds (tests/golden/README.md)."""
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import nn

GOLDEN = Path(__file__).parent / "golden"


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name) as file:
        return dict(file)


def rand(seed: int, *shape: int, salt: int) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(seed + int(salt)).standard_normal(shape).astype(np.float32))


def set_weights(module: nn.Module, salt: int, tag: str = "") -> nn.Module:
    """Give every parameter the value that its name stands for."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith("weight_g"):
                p.fill_(1)
                continue
            seed = (zlib.crc32((tag + name).encode()) + int(salt)) % 2**32
            r = torch.from_numpy(np.random.RandomState(seed).standard_normal(tuple(p.shape)).astype(np.float32))
            p.copy_(1 + 0.1 * r if "norm" in name and name.endswith(".weight") else 0.05 * r)
    return module


def assert_close(ours: torch.Tensor, golden: np.ndarray, tolerance: float = 1e-5) -> None:
    """Relative L2 of the whole array, which an element near zero does not upset."""
    golden = torch.from_numpy(golden).double()
    ours = ours.detach().double()
    assert ours.shape == golden.shape
    error = ((ours - golden).norm() / golden.norm()).item()
    assert error <= tolerance, f"relative L2 error {error:.2e} above {tolerance:.0e}"
