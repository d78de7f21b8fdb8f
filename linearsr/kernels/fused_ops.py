"""Triton kernels for the gated convolution and AdaLN, with one pass over memory each.

Forward only. The formulas are reference.py's, in fp32 until the result is stored. The package's
__init__ checks shapes.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearsr.kernels._launch import check_input, load, rows_contiguous, view


class GateLaunch(NamedTuple):
    """The pixels and channels that a program of the convolution writes, and its warps.

    No choice changes a bit of the result: no sum is divided among programs or threads.
    """

    height: int
    width: int
    channels: int
    warps: int


# 128 bytes per pixel in bfloat16. All taps are in flight at once: four warps have no registers for
# them in float32. `python -m benchmarks.gpu --only tuning` times others on a GPU; the fastest is to
# be kept here, so that all processes make the same choice and none has to search for it.
GATE_LAUNCHES = {torch.bfloat16: GateLaunch(4, 8, 64, 4), torch.float32: GateLaunch(4, 8, 64, 8)}
# The elements that a program of the norm holds, unless one row is more.
_ELEMENTS = 2048


@triton.jit
def _depthwise_gate_kernel(
    hidden, h_b, h_h, h_w, weight, bias, out, o_b, o_h, o_w, height, width, channels,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write a tile of pixels, some channels. weight: (9, 2C). Grid: (tiles * blocks, batch)."""
    blocks, across = tl.cdiv(channels, BLOCK), tl.cdiv(width, TILE_W)
    tile = tl.program_id(0) // blocks
    pixel = tl.arange(0, TILE_H * TILE_W)[:, None]
    y = tile // across * TILE_H + pixel // TILE_W
    x = tile % across * TILE_W + pixel % TILE_W
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    known = c < channels
    # int64: rows times strides pass 2**31 on large pictures.
    hidden += tl.program_id(1).to(tl.int64) * h_b
    out += tl.program_id(1).to(tl.int64) * o_b
    value = tl.zeros((TILE_H * TILE_W, BLOCK), tl.float32) + load(bias + c, known)
    gate = tl.zeros((TILE_H * TILE_W, BLOCK), tl.float32) + load(bias + channels + c, known)
    for tap in tl.static_range(9):
        row, column = y + (tap // 3 - 1), x + (tap % 3 - 1)
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width) & known
        pointers = hidden + row.to(tl.int64) * h_h + column.to(tl.int64) * h_w + c
        factors = weight + tap * 2 * channels + c
        value += load(pointers, inside) * load(factors, known)
        gate += load(pointers + channels, inside) * load(factors + channels, known)
    result = value * gate / (1.0 + tl.exp(-gate))
    pointers = out + y.to(tl.int64) * o_h + x.to(tl.int64) * o_w + c
    tl.store(pointers, result.to(out.dtype.element_ty), mask=(y < height) & (x < width) & known)


@triton.jit
def _modulate_kernel(
    x, x_b, x_h, x_w, shift, shift_b, scale, scale_b, out, tokens, width, channels,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write ROWS tokens with all channels of one sample. Grid: (blocks of tokens, batch)."""
    sample = tl.program_id(1).to(tl.int64)
    # int64: rows times strides pass 2**31 on large pictures.
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    column = tl.arange(0, COLUMNS)[None, :]
    known = column < channels
    mask = (row < tokens) & known
    pointers = x + sample * x_b + row // width * x_h + row % width * x_w + column
    values = load(pointers, mask)
    centred = tl.where(known, values - (tl.sum(values, axis=1) / channels)[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / channels
    normed = centred * tl.rsqrt(variance + 1e-6)[:, None]
    factors = 1.0 + load(scale + sample * scale_b + column, known)
    result = normed * factors + load(shift + sample * shift_b + column, known)
    pointers = out + (sample * tokens + row) * channels + column
    tl.store(pointers, result.to(out.dtype.element_ty), mask=mask)


def triton_depthwise_gate(
    hidden: Tensor, weight: Tensor, bias: Tensor, launch: GateLaunch | None = None
) -> Tensor:
    """Compute `depthwise_gate` of checked arguments. Raises OptionError if Triton cannot."""
    check_input(hidden, _depthwise_gate_kernel)
    launch = launch or GATE_LAUNCHES[hidden.dtype]
    hidden = rows_contiguous(hidden)
    batch, height, width, channels = (*hidden.shape[:3], len(weight) // 2)
    block = min(launch.channels, triton.next_power_of_2(channels))
    tiles = triton.cdiv(height, launch.height) * triton.cdiv(width, launch.width)
    with torch.cuda.device_of(hidden):
        out = torch.empty(batch, height, width, channels, dtype=hidden.dtype, device=hidden.device)
        # Taps first: neighbouring channels must be neighbours in memory.
        taps = weight.flatten(1).t().contiguous()
        _depthwise_gate_kernel[tiles * triton.cdiv(channels, block), batch](
            *view(hidden), taps, bias.contiguous(), *view(out), height, width, channels,
            TILE_H=launch.height, TILE_W=launch.width, BLOCK=block, num_warps=launch.warps,
        )  # fmt: skip
    return out


def triton_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Compute `modulate` of checked arguments. Raises OptionError if Triton cannot."""
    check_input(x, _modulate_kernel)
    x, shift, scale = (rows_contiguous(part) for part in (x, shift, scale))
    batch, height, width, channels = x.shape
    columns = triton.next_power_of_2(channels)
    rows = max(1, _ELEMENTS // columns)
    with torch.cuda.device_of(x):
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _modulate_kernel[triton.cdiv(height * width, rows), batch](
            *view(x), shift, shift.stride(0), scale, scale.stride(0), out,
            height * width, width, channels, ROWS=rows, COLUMNS=columns,
            # 16 elements a thread
            num_warps=min(16, rows * columns // 512),
        )  # fmt: skip
    return out
