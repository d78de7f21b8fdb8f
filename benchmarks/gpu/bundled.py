"""The bundled model: pictures a second at several batch sizes, and the pixels of the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu.stage import Row, Settings
from benchmarks.image import psnr
from benchmarks.timing import in_turn
from linearsr.config import Options
from linearsr.imaging.files import Picture
from linearsr.pipeline.upscaler import Upscaler

LR_SIDE, TOY_SIDE = 256, 24
BATCHES, TOY_BATCHES = (1, 2, 4, 8, 16, 32), (1, 2)
# Two precisions may differ by this much: an 8 bit rounding of every pixel alone gives 58.9 dB.
LEAST_PSNR = 40.0


def rows(settings: Settings) -> Iterator[Row]:
    """Yield the difference from float32 on a CPU, then pictures a second."""
    upscaler = Upscaler.load(device=str(settings.device))
    side = TOY_SIDE if settings.toy else LR_SIDE
    # Smooth enough to be a picture: noise would be.
    field = torch.randn(1, 3, side // 8, side // 8, generator=torch.Generator().manual_seed(0))
    pixels = torch.nn.functional.interpolate(field, size=(side, side), mode="bicubic")
    picture = Picture(pixels[0].mul(0.15).add(0.5).clamp(0, 1))
    yield _compare(upscaler, picture)
    for batch in TOY_BATCHES if settings.toy else BATCHES:
        run = partial(upscale_batch, upscaler, picture, batch)
        timed = in_turn({"batch": run}, settings.device, rounds=3)["batch"]
        row: Row = {"what": f"{side}² to {4 * side}², default steps", "batch": batch}
        if timed.failure:
            yield {**row, "note": timed.failure}
            continue
        yield {
            **row,
            "ms": 1e3 * timed.seconds,
            "pictures/s": batch / timed.seconds,
            "MiB": round(timed.memory / 2**20),
        }


def upscale_batch(upscaler: Upscaler, picture: Picture, batch: int) -> list[Picture]:
    """Upscale a picture `batch` times with as many seeds, together at each expert."""
    states = [upscaler.prepare(picture, Options(seed=seed)) for seed in range(batch)]
    for segment in states[0].segments:
        # As many cells as all tiles have.
        cells = sum(tile.height * tile.width for state in states for tile in state.tiles)
        states = upscaler.denoise_batch([(state, segment) for state in states], cells=cells)
    return [upscaler.finish(state) for state in states]


def _compare(upscaler: Upscaler, picture: Picture) -> Row:
    """Return the PSNR between this device's result and that of float32 on the CPU."""
    exact = Upscaler.load(device="cpu")
    for expert in exact.experts:
        expert.float()
    crop = Picture(picture.pixels[:, :96, :96])
    here, there = (u.upscale(crop, Options()).pixels for u in (upscaler, exact))
    value = psnr(here, there)
    verdict = "equal within rounding" if value >= LEAST_PSNR else f"below {LEAST_PSNR:g} dB: WRONG"
    return {"what": "PSNR against float32 on the CPU, dB", "value": value, "note": verdict}
