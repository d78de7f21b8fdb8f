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
from linearsr import weights
from linearsr.config import LINEARSR_1_6B, Acceleration, Options
from linearsr.imaging.files import Picture
from linearsr.latent import autoencoder
from linearsr.pipeline.upscaler import Upscaler

STEPS = (20, 4, 2, 1)
SIDE, TOY_SIDE = 1024, 128
# A result whose decoding takes several tiles.
TILED_SIDE = 4096


def rows(settings: Settings) -> Iterator[Row]:
    """Yield the times of pictures and of decoding, without CUDA graphs and with them."""
    if not installed("diffusers"):
        yield missing("whole pictures", "diffusers")
        return
    config = narrow(LINEARSR_1_6B) if settings.toy else LINEARSR_1_6B
    with tempfile.TemporaryDirectory() as scratch:
        plain = image.model(
            config, settings.device, settings.dtype, Path(scratch), narrow=settings.toy
        )
        yield from _pictures(plain, config.name, settings)
        yield from _decoding(plain.autoencoder, "DC-AE decodes", settings)
        # On the same tensors: the forwards are recorded from here on.
        graphs = Upscaler(
            weights.Bundle(plain.config, plain.experts, {}),
            settings.device,
            acceleration=Acceleration(cuda_graph=True),
        )
        yield from _pictures(graphs, f"{config.name}, CUDA graph", settings)
        yield from _decoding(graphs.autoencoder, "DC-AE decodes, CUDA graph", settings)


def _pictures(upscaler: Upscaler, name: str, settings: Settings) -> Iterator[Row]:
    """Yield the time of a picture and of its parts, by its steps."""
    side = TOY_SIDE if settings.toy else SIDE
    lr = Picture(torch.rand(3, side // 4, side // 4, generator=torch.Generator().manual_seed(0)))
    for steps in STEPS:
        run = partial(upscaler.upscale, lr, Options(steps=steps))
        timed = in_turn({"picture": run}, settings.device, rounds=3)["picture"]
        if timed.failure:
            yield {"what": name, "side": side, "steps": steps, "note": timed.failure}
            continue
        parts = image.parts_of(run, settings.device, timed.seconds)
        yield {
            "what": name,
            "side": side,
            "steps": steps,
            "ms": 1e3 * timed.seconds,
            **{f"{part}, ms": 1e3 * seconds for part, seconds in parts.items()},
            "MiB": round(timed.memory / 2**20),
        }


def _decoding(decoder: autoencoder.Autoencoder, name: str, settings: Settings) -> Iterator[Row]:
    """Yield the time of decoding alone, of one tile and of several."""
    for side in (TOY_SIDE,) if settings.toy else (SIDE, TILED_SIDE):
        cells = side // decoder.factor
        shape = (1, LINEARSR_1_6B.denoiser.latent_channels, cells, cells)
        latent = torch.randn(shape, device=settings.device)
        lr = torch.zeros(1, 3, side, side, device=settings.device)
        decode = torch.inference_mode()(lambda latent=latent, lr=lr: decoder.decode(latent, lr))
        timed = in_turn({"decode": decode}, settings.device, rounds=3)["decode"]
        row: Row = {"what": name, "side": side}
        yield (
            {**row, "note": timed.failure}
            if timed.failure
            else {
                **row,
                "ms": 1e3 * timed.seconds,
                "MiB": round(timed.memory / 2**20),
            }
        )
