"""The device and the number format that a model runs on."""

from __future__ import annotations

import torch

from linearsr.errors import OptionError


def pick_device(device: str) -> torch.device:
    """Return the torch device of this name; "auto" means CUDA, then Apple's MPS, then the CPU.

    Raises OptionError if torch cannot use the device.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).cpu()
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"device {device!r} cannot be used: {reason}") from error


def best_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 if the processor multiplies it in hardware, else float32.

    CUDA does, and so do CPUs with AMX or AVX512-BF16; other CPUs convert bfloat16 to float32
    first, which makes it slower than float32.
    """
    if device.type == "cuda":
        return torch.bfloat16
    multiplies = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if device.type == "cpu" and multiplies else torch.float32
