"""Whole pictures with the large models' real sizes and random weights, each part apart."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks import image
from benchmarks.gpu.forward import narrow
from benchmarks.gpu.stage import Row, Settings, installed, missing
from benchmarks.timing import in_turn
from linearsr.config import LINEARSR_1_6B, Options
from linearsr.imaging.files import Picture
from linearsr.latent import autoencoder

STEPS = (20, 4, 2, 1)
SIDE, TOY_SIDE = 1024, 128
# A result whose decoding takes several tiles.
TILED_SIDE = 4096


def rows(settings: Settings) -> Iterator[Row]:
    """Yield the time of a picture and of its parts, by its steps, then that of tiled decoding."""
    if not installed("diffusers"):
        yield missing("whole pictures", "diffusers")
        return
    config = narrow(LINEARSR_1_6B) if settings.toy else LINEARSR_1_6B
    with tempfile.TemporaryDirectory() as scratch:
        upscaler = image.model(
            config, settings.device, settings.dtype, Path(scratch), narrow=settings.toy
        )
    side = TOY_SIDE if settings.toy else SIDE
    lr = Picture(torch.rand(3, side // 4, side // 4, generator=torch.Generator().manual_seed(0)))
    for steps in STEPS:
        run = partial(upscaler.upscale, lr, Options(steps=steps))
        timed = in_turn({"picture": run}, settings.device, rounds=3)["picture"]
        if timed.failure:
            yield {"what": config.name, "side": side, "steps": steps, "note": timed.failure}
            continue
        parts = image.parts_of(run, settings.device, timed.seconds)
        yield {
            "what": config.name,
            "side": side,
            "steps": steps,
            "ms": 1e3 * timed.seconds,
            **{f"{name}, ms": 1e3 * seconds for name, seconds in parts.items()},
            "MiB": round(timed.memory / 2**20),
        }
    yield from _decoding(upscaler.autoencoder, settings)


def _decoding(decoder: autoencoder.Autoencoder, settings: Settings) -> Iterator[Row]:
    """Yield the time of decoding alone, of one tile and of several."""
    for side in (TOY_SIDE,) if settings.toy else (SIDE, TILED_SIDE):
        cells = side // decoder.factor
        shape = (1, LINEARSR_1_6B.denoiser.latent_channels, cells, cells)
        latent = torch.randn(shape, device=settings.device)
        lr = torch.zeros(1, 3, side, side, device=settings.device)
        decode = torch.inference_mode()(lambda latent=latent, lr=lr: decoder.decode(latent, lr))
        timed = in_turn({"decode": decode}, settings.device, rounds=3)["decode"]
        row: Row = {"what": "DC-AE decodes", "side": side}
        yield (
            {**row, "note": timed.failure}
            if timed.failure
            else {
                **row,
                "ms": 1e3 * timed.seconds,
                "MiB": round(timed.memory / 2**20),
            }
        )
