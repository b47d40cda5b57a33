"""The one rule for precision, in training and evaluations: what a device computes itself, never what it emulates."""
import torch

from selfpatch.errors import ConfigError

# kernels of scaled_dot_product_attention, by the numbers of torch.nn.attention.SDPBackend
ATTENTION = dict(enumerate(("plain", "flash", "memory-efficient", "cuDNN's")))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has bfloat16 products: CUDA GPUs from compute capability 8.0 on; all CPUs count.

    torch.cuda.is_bf16_supported() by itself also counts older GPUs, which emulate them.
    """
    if device.type != "cuda":
        return True
    if torch.version.hip is None:
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cuda.is_bf16_supported(including_emulation=False)


def choose_dtype(precision: str, device: torch.device, half: bool = False) -> torch.dtype:
    """The dtype for autocast; float32 means no autocast.

    Args:
        precision: fp32, tf32 (which is float32 here), bf16, fp16 or auto.
        half: auto means half precision on CUDA: bfloat16 if the GPU has it, else float16. By default auto is float32
            on every device, for figures that are compared with published ones.

    Raises:
        ConfigError: bf16 on a GPU without it.
    """
    if precision == "auto" and half and device.type == "cuda":
        return torch.bfloat16 if has_bfloat16(device) else torch.float16
    if precision == "bf16" and not has_bfloat16(device):
        raise ConfigError(f"--precision bf16: {torch.cuda.get_device_name(device)} would only emulate bfloat16: use "
                          "fp16 or fp32")
    return DTYPES.get(precision, torch.float32)


def describe_precision(device: torch.device, dtype: torch.dtype, head_dim: int = 64) -> str:
    """The dtype's name and, on a GPU, that of the kernel which torch chooses for attention in it.

    FlashAttention needs compute capability 8.0.
    """
    name = str(dtype).removeprefix("torch.")
    if device.type != "cuda":
        return name
    x = torch.empty(1, 1, 64, head_dim, dtype=dtype, device=device)
    return f"{name} with {ATTENTION.get(torch._fused_sdp_choice(x, x, x), 'some')} attention"


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """torch.autocast on the device; disabled for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def allow_tf32(allowed: bool) -> None:
    """Whether float32 products and convolutions on a GPU may round their inputs to 10 bits of mantissa."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
