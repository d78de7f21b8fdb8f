"""ReLU linear attention as Triton kernels, forward and backward, without atomics.

Each pass over the tokens is split into chunks; a chunk writes its partial sums and PyTorch adds
them up in a fixed order, so results repeat bit for bit. The formula is reference.py's. The
package's __init__ checks q, k and v against each other.

A head's state is one (D + 1, D) fp32 block: rows 0 to D - 1 are S transposed, row D is z.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from linearsr.errors import OptionError
from linearsr.kernels._launch import check_input, load, rows_contiguous, view

_CHUNK = 256  # tokens a program reduces, at least
_MAX_CHUNKS = 64  # bounds the partial states, which cost (D + 1) * D floats each


@triton.jit
def _inverse_power_of_two(x):
    """Return 2**-e for 2**(e-1) <= x < 2**e, from the exponent bits; bounds as in reference.py."""
    x = tl.where(x == 0, 1.0, x)
    x = tl.minimum(tl.maximum(x, 1.1754943508222875e-38), 2.1267647932558654e37)
    return ((253 << 23) - (x.to(tl.int32, bitcast=True) & 0x7F800000)).to(tl.float32, bitcast=True)


@triton.jit
def _token_block(start, stop, BLOCK: tl.constexpr, D: tl.constexpr):
    """Return row and column numbers of a (BLOCK, D) tile, and the mask of rows before stop."""
    # int64: rows times strides pass 2**31 on large pictures.
    rows = (start + tl.arange(0, BLOCK)[:, None]).to(tl.int64)
    return rows, tl.arange(0, D)[None, :], rows < stop


@triton.jit
def _head_pointer(x, stride_b, stride_h, heads):
    """Return a pointer to the batch and head that this program works on."""
    pair = tl.program_id(1).to(tl.int64)
    return x + (pair // heads) * stride_b + (pair % heads) * stride_h


@triton.jit
def _load_relu(pointers, mask):
    """Load with a relu that, unlike maximum, keeps NaN, so that broken input stays visible."""
    x = load(pointers, mask)
    return tl.where(x < 0, 0.0, x)


@triton.jit
def _load_queries(pointers, mask):
    """Load queries, each scaled into [0.5, 1) by a power of two; return them and the scales."""
    q = _load_relu(pointers, mask)
    scale = _inverse_power_of_two(tl.max(q, axis=1))[:, None]
    return q * scale, scale


@triton.jit
def _load_state(state, D: tl.constexpr):
    """Load S transposed (D, D) and z (1, D) of this program's batch and head."""
    state += tl.program_id(1).to(tl.int64) * (D + 1) * D
    column = tl.arange(0, D)[None, :]
    return tl.load(state + tl.arange(0, D)[:, None] * D + column), tl.load(state + D * D + column)


@triton.jit
def _store_partial(partial, matrix, vector, D: tl.constexpr):
    """Write S transposed (D, D) and z (D) as this program's partial state."""
    slot = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    partial += slot * (D + 1) * D
    column = tl.arange(0, D)
    tl.store(partial + column[:, None] * D + column[None, :], matrix)
    tl.store(partial + D * D + column, vector)


@triton.jit
def _state_kernel(
    k, k_b, k_n, k_h, v, v_b, v_n, v_h, partial, tokens, heads, chunk,
    BLOCK: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum the state of one chunk of tokens. Grid: (chunks, batch * heads)."""
    k = _head_pointer(k, k_b, k_h, heads)
    v = _head_pointer(v, v_b, v_h, heads)
    first = tl.program_id(0) * chunk
    stop = tl.minimum(first + chunk, tokens)
    matrix = tl.zeros((D, D), tl.float32)
    vector = tl.zeros((D,), tl.float32)
    for start in range(first, stop, BLOCK):
        rows, columns, mask = _token_block(start, stop, BLOCK, D)
        keys = _load_relu(k + rows * k_n + columns, mask)
        values = load(v + rows * v_n + columns, mask)
        matrix += tl.dot(tl.trans(values), keys, input_precision=PRECISION)
        vector += tl.sum(keys, axis=0)
    _store_partial(partial, matrix, vector, D)


@triton.jit
def _normalise(matrix, vector, eps):
    """Return S and z + eps in units of the keys' magnitude, and the scale, a power of two."""
    scale = _inverse_power_of_two(tl.max(vector))
    return matrix * scale, vector * scale + eps, scale


@triton.jit
def _output_kernel(
    q, q_b, q_n, q_h, out, out_b, out_n, out_h, state, tokens, heads, eps,
    BLOCK: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the outputs of one block of queries. Grid: (blocks, batch * heads)."""
    q = _head_pointer(q, q_b, q_h, heads)
    out = _head_pointer(out, out_b, out_h, heads)
    matrix, vector = _load_state(state, D)
    matrix, vector, _ = _normalise(matrix, vector, eps)
    rows, columns, mask = _token_block(tl.program_id(0) * BLOCK, tokens, BLOCK, D)
    queries, _ = _load_queries(q + rows * q_n + columns, mask)
    denominator = tl.sum(queries * vector, axis=1)[:, None]
    denominator = tl.where(denominator == 0, 1.0, denominator)
    result = tl.dot(queries, tl.trans(matrix), input_precision=PRECISION) / denominator
    tl.store(out + rows * out_n + columns, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _query_grad_kernel(
    q, q_b, q_n, q_h, g, g_b, g_n, g_h, dq, dq_b, dq_n, dq_h, state, partial,
    tokens, heads, chunk, eps, BLOCK: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write query gradients and the partial state gradient of a chunk. Grid: as _state_kernel.

    The state gradient is that of the normalised state.
    """
    q = _head_pointer(q, q_b, q_h, heads)
    g = _head_pointer(g, g_b, g_h, heads)
    dq = _head_pointer(dq, dq_b, dq_h, heads)
    matrix, vector = _load_state(state, D)
    matrix, vector, _ = _normalise(matrix, vector, eps)
    first = tl.program_id(0) * chunk
    stop = tl.minimum(first + chunk, tokens)
    d_matrix = tl.zeros((D, D), tl.float32)
    d_vector = tl.zeros((D,), tl.float32)
    for start in range(first, stop, BLOCK):
        rows, columns, mask = _token_block(start, stop, BLOCK, D)
        queries, scale = _load_queries(q + rows * q_n + columns, mask)
        grad = load(g + rows * g_n + columns, mask)
        denominator = tl.sum(queries * vector, axis=1)[:, None]
        denominator = tl.where(denominator == 0, 1.0, denominator)
        grad_dot_matrix = tl.dot(grad, matrix, input_precision=PRECISION)
        # The output's product with its gradient, without forming the output.
        slope = tl.sum(queries * grad_dot_matrix, axis=1)[:, None] / denominator
        d_queries = (grad_dot_matrix - slope * vector) / denominator * scale
        d_queries = tl.where(queries > 0, d_queries, 0.0).to(dq.dtype.element_ty)
        tl.store(dq + rows * dq_n + columns, d_queries, mask=mask)
        weights = queries / denominator
        d_matrix += tl.dot(tl.trans(grad), weights, input_precision=PRECISION)
        d_vector -= tl.sum(weights * slope, axis=0)
    _store_partial(partial, d_matrix, d_vector, D)


@triton.jit
def _key_value_grad_kernel(
    k, k_b, k_n, k_h, v, v_b, v_n, v_h, dk, dk_b, dk_n, dk_h, dv, dv_b, dv_n, dv_h,
    state, d_state, tokens, heads, eps,
    BLOCK: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write key and value gradients of one block of tokens. Grid: (blocks, batch * heads)."""
    k = _head_pointer(k, k_b, k_h, heads)
    v = _head_pointer(v, v_b, v_h, heads)
    dk = _head_pointer(dk, dk_b, dk_h, heads)
    dv = _head_pointer(dv, dv_b, dv_h, heads)
    matrix, vector = _load_state(state, D)
    _, _, scale = _normalise(matrix, vector, eps)
    d_matrix, d_vector = _load_state(d_state, D)
    rows, columns, mask = _token_block(tl.program_id(0) * BLOCK, tokens, BLOCK, D)
    # Scaling the keys, not the state gradient: that could overflow where no key is above zero.
    keys = _load_relu(k + rows * k_n + columns, mask) * scale
    values = load(v + rows * v_n + columns, mask)
    d_keys = (tl.dot(values, d_matrix, input_precision=PRECISION) + d_vector) * scale
    d_keys = tl.where(keys > 0, d_keys, 0.0).to(dk.dtype.element_ty)
    tl.store(dk + rows * dk_n + columns, d_keys, mask=mask)
    d_values = tl.dot(keys, tl.trans(d_matrix), input_precision=PRECISION)
    tl.store(dv + rows * dv_n + columns, d_values.to(dv.dtype.element_ty), mask=mask)


def triton_attention(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """Compute relu_linear_attention of checked q, k, v. Raises OptionError if Triton cannot."""
    dim = q.shape[-1]
    if dim not in (16, 32, 64, 128):
        raise OptionError(
            f'backend "triton" takes heads of 16, 32, 64 or 128 channels, not {dim}; use '
            'backend="torch"'
        )
    check_input(q, _state_kernel)
    return _TritonAttention.apply(q, k, v, eps)


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
        q, k, v = (rows_contiguous(x) for x in (q, k, v))
        with torch.cuda.device_of(q):
            state = _key_value_state(k, v)
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
            _output_kernel[_block_grid(q)](
                *view(q), *view(out), state, q.shape[1], q.shape[2], eps, **_settings(q)
            )
        ctx.save_for_backward(q, k, v, state)
        ctx.eps = eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, state = ctx.saved_tensors
        grad = rows_contiguous(grad)
        dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
        tokens, heads = q.shape[1:3]
        chunk, chunks = _chunks(q)
        partial = _new_partial(q, chunks)
        with torch.cuda.device_of(q):
            _query_grad_kernel[chunks, partial.shape[0]](
                *view(q), *view(grad), *view(dq), state, partial,
                tokens, heads, chunk, ctx.eps, **_settings(q),
            )  # fmt: skip
            _key_value_grad_kernel[_block_grid(q)](
                *view(k), *view(v), *view(dk), *view(dv), state, partial.sum(dim=1),
                tokens, heads, ctx.eps, **_settings(q),
            )  # fmt: skip
        return dq, dk, dv, None


def _key_value_state(k: Tensor, v: Tensor) -> Tensor:
    """Return the fp32 state (B * H, D + 1, D) of all tokens."""
    chunk, chunks = _chunks(k)
    partial = _new_partial(k, chunks)
    _state_kernel[chunks, partial.shape[0]](
        *view(k), *view(v), partial, k.shape[1], k.shape[2], chunk, **_settings(k)
    )
    return partial.sum(dim=1)


def _block(dim: int) -> int:
    """Return the tokens that a program holds at once; wider heads leave room for fewer."""
    return 64 if dim <= 32 else 32


def _chunks(x: Tensor) -> tuple[int, int]:
    """Return the tokens in a chunk (whole blocks) and the number of chunks."""
    tokens, block = x.shape[1], _block(x.shape[-1])
    blocks = triton.cdiv(max(_CHUNK, triton.cdiv(tokens, _MAX_CHUNKS)), block)
    return blocks * block, triton.cdiv(tokens, blocks * block)


def _new_partial(x: Tensor, chunks: int) -> Tensor:
    batch, _, heads, dim = x.shape
    return torch.empty(batch * heads, chunks, dim + 1, dim, dtype=torch.float32, device=x.device)


def _block_grid(x: Tensor) -> tuple[int, int]:
    return triton.cdiv(x.shape[1], _block(x.shape[-1])), x.shape[0] * x.shape[2]


def _settings(x: Tensor) -> dict[str, Any]:
    """Return the compile-time arguments of every kernel for inputs like x."""
    return {
        "BLOCK": _block(x.shape[-1]),
        "D": x.shape[-1],
        # bfloat16 inputs gain tensor cores from tf32x3, at close to fp32 precision; fp32 inputs
        # must match the reference.
        "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32x3",
        # Products in fp32 take their operands in registers, for which four warps have no room; nor
        # have they for the state of a wide head (benchmarks.gpu.ahead_of_time counts them).
        "num_warps": 8 if x.shape[-1] > 32 or x.dtype == torch.float32 else 4,
        # More stages fill shared memory.
        "num_stages": 1,
    }
