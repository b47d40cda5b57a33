"""Resolve options whose meaning depends on the machine: auto, precision, compilation, loss."""
import os
import shutil

import torch

from selfpatch.distributed.precision import choose_dtype
from selfpatch.distributed.processes import is_main_process
from selfpatch.errors import ConfigError, is_installed, try_print
from selfpatch.method.fused_loss import FusedDINOLoss
from selfpatch.method.losses import DINOLoss

# torch.compile's names; CUDA graphs replay all launches of a graph as one launch
COMPILE_MODES = ("reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune")
COMPILE_WAYS = ("auto", "on", "off", *COMPILE_MODES)


def choose_augment(augment: str, device: torch.device) -> str:
    """Where to augment, by --augment. auto: on the device, which benchmarks/data.py shows to be faster on CPUs, too.

    MPS has not been measured, and stays with PIL.
    """
    if augment != "auto":
        return augment
    return "device" if device.type in ("cuda", "cpu") else "pil"


def choose_precision(precision: str, use_fp16: bool, device: torch.device) -> torch.dtype:
    """Autocast's dtype for --precision and --use_fp16; float32 means no autocast."""
    if precision == "fp16" and device.type == "mps":
        raise ConfigError("--precision fp16 needs a GradScaler, which MPS does not have: use fp32 or bf16")
    return choose_dtype(precision, device, half=use_fp16)


def choose_compile(choice: str, device: torch.device) -> bool:
    """Whether to compile, by --compile. auto: on CUDA, if the compiler has what it needs."""
    if choice in COMPILE_MODES and device.type != "cuda":
        raise ConfigError(f"--compile {choice} is for CUDA, and the device is {device.type}: use on, auto or off")
    if choice == "off" or (choice == "auto" and device.type != "cuda"):
        return False
    missing = ""
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        missing = "there is no C++ compiler here: install g++, or set CXX"
    elif device.type == "cuda" and not is_installed("triton"):
        missing = "it needs the package triton: pip install triton"
    elif device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 0):
        missing = "it needs a GPU of compute capability 7.0 or more"
    if missing and choice != "auto":
        raise ConfigError(f"--compile {choice}: {missing}")
    if missing and is_main_process():
        try_print(f"not compiled, which is slower: {missing}")
    return not missing


def compile_mode(choice: str) -> str | None:
    """torch.compile's mode for --compile; None for its default."""
    return choice if choice in COMPILE_MODES else None


def uses_cuda_graphs(choice: str) -> bool:
    return choice in ("reduce-overhead", "max-autotune")


def choose_packing(choice: str, device: torch.device) -> bool:
    """Whether all crops go through the networks in one pass, by --pack_crops. auto: on CUDA, to save launches.

    On a CPU, separate passes are faster: they skip the samples that stochastic depth drops.
    """
    return device.type == "cuda" if choice == "auto" else choice == "on"


def choose_loss(fused_loss: str, loss_class: type[DINOLoss] | None) -> type[DINOLoss]:
    """The class of the loss, by --fused_loss; the caller's own class, if given, is used as it is."""
    if loss_class is None:
        return DINOLoss if fused_loss == "off" else FusedDINOLoss
    if fused_loss == "on" and not issubclass(loss_class, FusedDINOLoss):
        raise ConfigError(f"--fused_loss on: {loss_class.__name__} has no fused form, leave the option out")
    return loss_class
