"""ReLU linear attention: checks the arguments and picks the PyTorch or the Triton implementation.

`key_value_state` and `scaled_state` are its two halves in PyTorch, for who takes tokens in parts.
Knows nothing of projections, norms, positions or models; it sees queries, keys and values only.
Importing this package does not import Triton: the first call that uses that backend does.
"""

import torch
from torch import Tensor

from linearsr.errors import OptionError
from linearsr.kernels.reference import key_value_state, reference_attention, scaled_state

__all__ = ["key_value_state", "relu_linear_attention", "scaled_state"]

_BACKENDS = ("auto", "torch", "triton")
_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


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
            float32, bfloat16 or float64. Strided views are welcome. Sums of
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
    _check_inputs(q, k, v)
    if not 0.0 <= eps < float("inf"):
        raise OptionError(f"eps must be finite and at least 0, not {eps!r}")
    if backend not in _BACKENDS:
        raise OptionError(f"unknown backend {backend!r}; choose one of {', '.join(_BACKENDS)}")
    if backend == "torch" or (backend == "auto" and not q.is_cuda):
        return reference_attention(q, k, v, eps)
    return _triton_attention(q, k, v, eps)


def _check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 4 or not q.shape == k.shape == v.shape or 0 in q.shape:
        raise ValueError(
            "q, k and v must share one shape (B, N, H, D) with no zero size, not "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.dtype not in _DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            "q, k and v must share one dtype out of float32, bfloat16 and float64, not "
            f"{q.dtype}, {k.dtype}, {v.dtype}"
        )
    if not q.device == k.device == v.device:
        raise ValueError(
            f"q, k and v must be on one device, not {q.device}, {k.device}, {v.device}"
        )


def _triton_attention(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    try:
        from linearsr.kernels.linear_attention import triton_attention
    except ImportError as error:
        raise OptionError(
            f'backend "triton" cannot load Triton ({error}); install it or use backend="torch"'
        ) from error
    return triton_attention(q, k, v, eps)
