"""A depthwise convolution with gradients, for training on a GPU: Triton, channels last.

cuDNN's gradient of a depthwise convolution in bfloat16 is many times slower than its forward. Here
each direction is one pass over memory. This file does not check shapes and knows no models.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearsr.kernels.launch import load

_TILE_H, _TILE_W, _BLOCK = 4, 8, 64
# Programs that share the sums of a weight's gradient, for each block of channels.
_SPLITS = 96


@triton.jit
def _forward_kernel(
    x, weight, bias, out, height, width, channels,
    KERNEL: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of pixels and a block of channels. weight: (KERNEL**2, C). Grid: (tiles * blocks, batch)."""
    blocks, across = tl.cdiv(channels, BLOCK), tl.cdiv(width, TILE_W)
    tile = tl.program_id(0) // blocks
    pixel = tl.arange(0, TILE_H * TILE_W)[:, None]
    row = tile // across * TILE_H + pixel // TILE_W
    column = tile % across * TILE_W + pixel % TILE_W
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    known = c < channels
    base = tl.program_id(1).to(tl.int64) * height * width * channels
    total = tl.zeros((TILE_H * TILE_W, BLOCK), tl.float32) + load(bias + c, known)
    for tap in tl.static_range(KERNEL * KERNEL):
        r, q = row + (tap // KERNEL - KERNEL // 2), column + (tap % KERNEL - KERNEL // 2)
        inside = (r >= 0) & (r < height) & (q >= 0) & (q < width) & known
        values = load(x + base + (r * width + q) * channels + c, inside)
        total += values * load(weight + tap * channels + c, known)
    pointers = out + base + (row * width + column) * channels + c
    tl.store(pointers, total.to(out.dtype.element_ty), mask=(row < height) & (column < width) & known)


@triton.jit
def _weight_kernel(
    x, gradient, partial, batch, height, width, channels, splits,
    KERNEL: tl.constexpr, TAPS: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over every splits-th tile. partial: (splits, TAPS, C), the bias at KERNEL**2.

    Grid: (blocks of channels, splits).
    """
    down, across = tl.cdiv(height, TILE_H), tl.cdiv(width, TILE_W)
    pixel = tl.arange(0, TILE_H * TILE_W)[:, None]
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    known = c < channels
    taps = tl.arange(0, TAPS)[:, None]
    sums = tl.zeros((TAPS, BLOCK), tl.float32)
    for tile in range(tl.program_id(1), batch * down * across, splits):
        base = (tile // (down * across)).to(tl.int64) * height * width * channels
        row = tile // across % down * TILE_H + pixel // TILE_W
        column = tile % across * TILE_W + pixel % TILE_W
        here = (row < height) & (column < width) & known
        g = load(gradient + base + (row * width + column) * channels + c, here)
        for tap in tl.static_range(KERNEL * KERNEL):
            r, q = row + (tap // KERNEL - KERNEL // 2), column + (tap % KERNEL - KERNEL // 2)
            inside = here & (r >= 0) & (r < height) & (q >= 0) & (q < width)
            values = load(x + base + (r * width + q) * channels + c, inside)
            sums += tl.where(taps == tap, tl.sum(g * values, axis=0)[None, :], 0.0)
        sums += tl.where(taps == KERNEL * KERNEL, tl.sum(g, axis=0)[None, :], 0.0)
    pointers = partial + (tl.program_id(1) * TAPS + taps) * channels + c
    tl.store(pointers, sums, mask=known & (taps < TAPS))


def _convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    batch, height, width, channels = x.shape
    kernel = weight.shape[-1]
    block = min(_BLOCK, triton.next_power_of_2(channels))
    out = torch.empty_like(x)
    # Taps first: neighbouring channels must be neighbours in memory.
    taps = weight.flatten(1).t().contiguous()
    tiles = triton.cdiv(height, _TILE_H) * triton.cdiv(width, _TILE_W)
    _forward_kernel[tiles * triton.cdiv(channels, block), batch](
        x, taps, bias, out, height, width, channels,
        KERNEL=kernel, TILE_H=_TILE_H, TILE_W=_TILE_W, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out


@torch.library.custom_op("linearsr::depthwise", mutates_args=())
def depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (B, H, W, C) convolved with weight (C, 1, K, K), zero padding K // 2, K odd; bias (C,).

    Sums in fp32, result in the dtype of x. On CUDA, or on a CPU under Triton's interpreter.
    """
    return _convolve(x.contiguous(), weight.float(), bias.float())


@depthwise.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("linearsr::depthwise_backward", mutates_args=())
def depthwise_backward(x: Tensor, weight: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for x, weight and bias of `depthwise`; those of weight and bias in fp32."""
    x, gradient = x.contiguous(), gradient.contiguous()
    batch, height, width, channels = x.shape
    kernel, none = weight.shape[-1], torch.zeros(channels, device=x.device)
    for_x = _convolve(gradient, weight.float().flip(2, 3), none)
    block, taps = min(_BLOCK, triton.next_power_of_2(channels)), triton.next_power_of_2(kernel**2 + 1)
    partial = torch.empty(_SPLITS, taps, channels, device=x.device)
    _weight_kernel[triton.cdiv(channels, block), _SPLITS](
        x, gradient, partial, batch, height, width, channels, _SPLITS,
        KERNEL=kernel, TAPS=taps, TILE_H=_TILE_H, TILE_W=_TILE_W, BLOCK=block, num_warps=4,
    )  # fmt: skip
    sums = partial.sum(0)
    for_weight = sums[: kernel**2].t().reshape(channels, 1, kernel, kernel).contiguous()
    return for_x, for_weight, sums[kernel**2].clone()


@depthwise_backward.register_fake
def _(x: Tensor, weight: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = {"dtype": torch.float32, "device": x.device}
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        torch.empty(weight.shape, **wide),
        torch.empty(len(weight), **wide),
    )


def _backward(ctx, gradient):  # type: ignore[no-untyped-def]
    x, weight = ctx.saved_tensors
    for_x, for_weight, for_bias = depthwise_backward(x, weight, gradient)
    return for_x, for_weight.to(weight.dtype), for_bias.to(weight.dtype)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # noqa: ARG001
    ctx.save_for_backward(*inputs[:2])


depthwise.register_autograd(_backward, setup_context=_keep)
