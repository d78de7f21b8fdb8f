"""Checks and arguments that all Triton kernels share."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearsr.errors import OptionError


@triton.jit
def load(pointers, mask):
    """Return the values at `pointers` in fp32, with 0 where the mask is False."""
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


def check_input(x: Tensor, kernel: Any) -> None:
    """Raise OptionError if a `kernel` made by @triton.jit cannot take tensors like x."""
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise OptionError(f'backend "triton" takes float32 or bfloat16, not {x.dtype}')
    # Under TRITON_INTERPRET=1 the kernels are not JITFunctions, and run on CPU tensors.
    if not x.is_cuda and isinstance(kernel, triton.JITFunction):
        raise OptionError(f'backend "triton" takes CUDA tensors, not {x.device.type} ones')


def rows_contiguous(x: Tensor) -> Tensor:
    """Return x with unit stride over its last dim, as the kernels need; copied only if needed."""
    return x if x.stride(-1) == 1 else x.contiguous()


def view(x: Tensor) -> tuple[Tensor, int, int, int]:
    """Return a kernel's arguments for a tensor of four dims: itself and its first three strides."""
    return x, x.stride(0), x.stride(1), x.stride(2)
