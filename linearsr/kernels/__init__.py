"""The operations of a block between its matrix products, in PyTorch and in Triton.

These functions check their arguments and choose the backend. They take tensors only and know
nothing of projections, positions or models. Callers that sum the attention's state over parts of
the tokens need `scaled_state`. Triton is imported by the first call that uses it.

If a call leaves `backend` at "auto", the environment variable LINEARSR_KERNELS chooses: "auto",
"torch" or "triton" (for forward-only kernels only if no gradients are needed).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from linearsr.errors import OptionError
from linearsr.kernels.reference import (
    reference_attention,
    reference_depthwise_gate,
    reference_modulate,
    scaled_state,
)

__all__ = [
    "depthwise_gate",
    "modulate",
    "relu_linear_attention",
    "scaled_state",
]

_BACKENDS = ("auto", "torch", "triton")
_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_SWITCH = "LINEARSR_KERNELS"


def relu_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, eps: float = 1e-15, backend: str = "auto"
) -> Tensor:
    """Non-causal attention with ReLU feature maps, linear in the number of tokens.

    Per batch and head, with a row vector for each token::

        S = sum_j relu(k_j)^T v_j,  z = sum_j relu(k_j)  (in fp32, or fp64 for fp64 inputs)
        o_i = relu(q_i) S / (relu(q_i) . (z + eps c))

    where c is the power of two just above max(z), a constant in the backward pass. Scaling
    eps by q_i and by c makes the result independent of the magnitude of each query and of the
    keys of a head. It is the plain formula, ``relu(q_i) S / (relu(q_i) . z + eps)``, to fp32
    precision wherever that formula's eps is lost in rounding, as it is for ordinary magnitudes.
    A query with nothing above zero gives exactly 0, and so does every query of a head whose keys
    have nothing above zero.

    Args:
        q, k, v: (B, N, H, D) tensors of one shape, dtype and device, every size at least 1; dtype
            float32, bfloat16 or float64. Strided views are fine. Sums of
            relu(k) * v over the N tokens must stay within the fp32 range (about 1e-38 to 1e38).
        eps: finite, at least 0.
        backend: "torch" runs anywhere. "triton" takes float32 or bfloat16 on a CUDA device, and D
            a power of two from 16 to 128. "auto" is "triton" for CUDA tensors, else "torch".

    Returns:
        (B, N, H, D) in the dtype of the inputs; its strides are unspecified.

    Raises:
        OptionError: unknown backend, eps out of range, or inputs the chosen backend cannot take.
        ValueError: q, k and v break the contract above.

    Source: LinearSR (arXiv 2510.08771), which uses the linear attention of Sana (arXiv 2410.10629,
    section on linear attention).
    """
    if q.dim() != 4 or not q.shape == k.shape == v.shape or 0 in q.shape:
        raise ValueError(
            "q, k and v must share one shape (B, N, H, D) with no zero size, not "
            f"{_shapes(q, k, v)}"
        )
    _check_shared("q, k and v", q, k, v)
    if not 0.0 <= eps < float("inf"):
        raise OptionError(f"eps must be finite and at least 0, not {eps!r}")
    if not _use_triton(backend, q.is_cuda):
        return reference_attention(q, k, v, eps)
    with _triton_needed():
        from linearsr.kernels.linear_attention import triton_attention
    return triton_attention(q, k, v, eps)


def depthwise_gate(
    hidden: Tensor, weight: Tensor, bias: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Apply a 3x3 depthwise convolution, zero padding 1; half of its channels gate the others.

    With ``value, gate = conv(hidden).chunk(2, -1)`` the result is ``value * silu(gate)``, in fp32
    until it is stored (Triton), or rounded at each step (PyTorch).

    Args:
        hidden: (B, H, W, 2C), every size at least 1; dtype float32, bfloat16 or float64. Strided
            views are fine; unit stride over channels saves a copy.
        weight, bias: (2C, 1, 3, 3) and (2C,), on the device and in the dtype of hidden; under
            autocast the dtypes may differ.
        backend: "torch" runs anywhere. "triton" takes float32 or bfloat16 on a CUDA device and is
            forward only. "auto" is "triton" for CUDA tensors where nothing asks for a gradient and
            autocast is off, else "torch".

    Returns:
        (B, H, W, C) in the dtype of hidden, or of autocast with "torch"; strides unspecified.

    Raises:
        OptionError: unknown backend, or inputs the chosen backend cannot take.
        ValueError: the tensors break the contract above.
    """
    channels = hidden.shape[-1:].numel()
    shaped = hidden.dim() == 4 and channels % 2 == 0 and 0 not in hidden.shape
    if not shaped or weight.shape != (channels, 1, 3, 3) or bias.shape != (channels,):
        raise ValueError(
            "hidden, weight and bias must be (B, H, W, 2C) with no zero size, (2C, 1, 3, 3) and "
            f"(2C,), not {_shapes(hidden, weight, bias)}"
        )
    _check_shared("hidden, weight and bias", hidden, weight, bias, mixed=_autocast(hidden))
    if not _use_forward_triton(backend, hidden, weight, bias):
        return reference_depthwise_gate(hidden, weight, bias)
    with _triton_needed():
        from linearsr.kernels.fused_ops import triton_depthwise_gate
    return triton_depthwise_gate(hidden, weight, bias)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, *, backend: str = "auto") -> Tensor:
    """Apply AdaLN: normalise over channels, eps 1e-6, no affine weights; then scale and shift.

    ``(x - mean) / sqrt(variance + 1e-6) * (1 + scale) + shift``, the population variance, with
    statistics in fp32.

    Args:
        x: (B, H, W, C), every size at least 1; dtype float32, bfloat16 or float64. Strided views
            are fine; unit stride over channels saves a copy.
        shift, scale: (B, 1, 1, C), on the device and in the dtype of x; under autocast the dtypes
            may differ.
        backend: as for `depthwise_gate`.

    Returns:
        (B, H, W, C) in the dtype of x, or of autocast with "torch"; strides unspecified.

    Raises:
        OptionError: unknown backend, or inputs the chosen backend cannot take.
        ValueError: the tensors break the contract above.
    """
    expected = (*x.shape[:1], 1, 1, *x.shape[-1:])
    if x.dim() != 4 or 0 in x.shape or not shift.shape == scale.shape == expected:
        raise ValueError(
            "x must be (B, H, W, C) with no zero size, and shift and scale (B, 1, 1, C), "
            f"not {_shapes(x, shift, scale)}"
        )
    _check_shared("x, shift and scale", x, shift, scale, mixed=_autocast(x))
    if not _use_forward_triton(backend, x, shift, scale):
        return reference_modulate(x, shift, scale)
    with _triton_needed():
        from linearsr.kernels.fused_ops import triton_modulate
    return triton_modulate(x, shift, scale)


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(x.shape)) for x in tensors)


def _check_shared(names: str, *tensors: Tensor, mixed: bool = False) -> None:
    """Raise ValueError unless they share a device and, if not `mixed`, a dtype."""
    dtypes, devices = [x.dtype for x in tensors], [x.device for x in tensors]
    if any(d not in _DTYPES or not (mixed or d == dtypes[0]) for d in dtypes):
        half = "; float16 ends at 65504, which sums over tokens exceed"
        raise ValueError(
            f"{names} must share one dtype out of float32, bfloat16 and float64, not "
            f"{', '.join(map(str, dtypes))}{half if torch.float16 in dtypes else ''}"
        )
    if any(d != devices[0] for d in devices):
        raise ValueError(f"{names} must be on one device, not {', '.join(map(str, devices))}")


def _autocast(x: Tensor) -> bool:
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _use_triton(backend: str, suitable: bool) -> bool:
    """Return whether to use Triton; "auto" uses it if `suitable` and nothing else is set."""
    name = "backend"
    if backend == "auto":
        name, backend = _SWITCH, os.environ.get(_SWITCH) or "auto"
    if backend not in _BACKENDS:
        raise OptionError(f"unknown {name} {backend!r}; choose one of {', '.join(_BACKENDS)}")
    return backend == "triton" or (backend == "auto" and suitable)


def _use_forward_triton(backend: str, x: Tensor, *others: Tensor) -> bool:
    """Do as `_use_triton` for forward-only kernels. Raises OptionError if gradients are needed."""
    grad = torch.is_grad_enabled() and any(part.requires_grad for part in (x, *others))
    triton = _use_triton(backend, x.is_cuda)
    if backend == "auto" and (grad or _autocast(x)):
        return False
    if triton and grad:
        raise OptionError(
            'backend "triton" is forward only here: call it under torch.no_grad(), or use '
            'backend="torch" for gradients'
        )
    return triton


@contextmanager
def _triton_needed() -> Iterator[None]:
    """Turn an ImportError into an OptionError."""
    try:
        yield
    except ImportError as error:
        raise OptionError(
            f'backend "triton" cannot load Triton ({error}); install it or use backend="torch"'
        ) from error
