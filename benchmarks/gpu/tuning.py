"""The gated convolution, half of a large model's forward, with several launch settings."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.stage import Row, Settings
from benchmarks.timing import in_turn
from linearsr.config import LINEARSR_0_6B, LINEARSR_1_6B
from linearsr.kernels.fused_ops import GATE_LAUNCHES, GateLaunch, triton_depthwise_gate

SIDE = 1024
# Tiles of pixels, channels of a tile, warps.
TILES, CHANNELS, WARPS = ((2, 8), (4, 8), (4, 16), (8, 8)), (32, 64, 128), (4, 8)
TOY = (GateLaunch(4, 8, 64, 4), GateLaunch(2, 8, 32, 4))  # for 32 channels of 4 x 4 pixels


def rows(settings: Settings) -> Iterator[Row]:
    """Yield the time of each setting on the hidden layer of a picture of 1024 px."""
    # One launch takes less time than the wait for its end.
    repeats = 1 if settings.toy else 20
    chosen = GATE_LAUNCHES[settings.dtype]
    choices = itertools.product(TILES, CHANNELS, WARPS)
    launches = TOY if settings.toy else [GateLaunch(*t, c, w) for t, c, w in choices]
    for config in (LINEARSR_1_6B, LINEARSR_0_6B):
        channels = int(config.denoiser.width * config.denoiser.ffn_ratio)
        channels = 32 if settings.toy else channels
        side = 4 if settings.toy else SIDE // config.latent.factor
        shapes = (1, side, side, 2 * channels), (2 * channels, 1, 3, 3), (2 * channels,)
        hidden, weight, bias = (
            torch.randn(shape, device=settings.device, dtype=settings.dtype) for shape in shapes
        )
        for launch in launches:
            run = partial(_repeat, repeats, hidden, weight, bias, launch)
            row: Row = {"what": config.name, "height, width, channels, warps": str(tuple(launch))}
            try:
                timed = in_turn(
                    {str(launch): run}, settings.device, rounds=1 if settings.toy else 5
                )[str(launch)]
            except Exception as error:  # Triton's own, for more registers than there are
                yield {**row, "note": type(error).__name__}
                continue
            if timed.failure:
                yield {**row, "note": timed.failure}
                continue
            note = {"note": "the package's"} if launch == chosen else {}
            yield {**row, "us": 1e6 * timed.seconds / repeats, **note}


def _repeat(times: int, *arguments: Any) -> None:
    for _ in range(times):
        triton_depthwise_gate(*arguments)
