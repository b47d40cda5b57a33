"""Which dtype each device computes in, with stubbed compute capabilities."""
import pytest
import torch
from torch.nn.attention import SDPBackend

from selfpatch.distributed.precision import ATTENTION, autocast, choose_dtype, describe_precision, has_bfloat16
from selfpatch.errors import ConfigError

CPU, CUDA, MPS = map(torch.device, ("cpu", "cuda", "mps"))


@pytest.fixture(params=[(7, 0), (7, 5), (8, 0), (9, 0)])
def capability(request, monkeypatch):
    """A GPU's compute capability; torch says that it supports bfloat16, if only by emulation."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: request.param)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    return request.param


def test_bfloat16_is_never_emulated(capability):
    real = capability >= (8, 0)
    assert has_bfloat16(CUDA) == real
    assert choose_dtype("auto", CUDA, half=True) == (torch.bfloat16 if real else torch.float16)
    if real:
        assert choose_dtype("bf16", CUDA) == torch.bfloat16
    else:
        with pytest.raises(ConfigError, match="--precision bf16: a GPU .* use fp16 or fp32"):
            choose_dtype("bf16", CUDA, half=True)


def test_evaluations_compute_in_float32_unless_asked(capability):
    assert {choose_dtype("auto", device) for device in (CPU, CUDA, MPS)} == {torch.float32}
    assert {choose_dtype(name, CUDA) for name in ("fp32", "tf32")} == {torch.float32}
    assert choose_dtype("fp16", CUDA) == torch.float16


def test_other_devices_train_in_float32_unless_asked():
    assert choose_dtype("auto", CPU, half=True) == choose_dtype("auto", MPS, half=True) == torch.float32
    assert choose_dtype("bf16", CPU) == torch.bfloat16


def test_on_rocm_torch_is_asked_without_emulation(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.2")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not has_bfloat16(CUDA)


def test_float32_means_no_autocast():
    x = torch.ones(2, 2)
    for dtype in (torch.float32, torch.bfloat16):
        with autocast(CPU, dtype):
            assert (x @ x).dtype == dtype


def test_attention_kernels_have_torchs_numbers():
    kernels = SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION
    assert [kernel.value for kernel in kernels] == list(range(len(ATTENTION)))
    assert describe_precision(CPU, torch.float32) == "float32"
