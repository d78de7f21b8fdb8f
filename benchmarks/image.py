"""Time a whole picture, stage by stage, beside bicubic and Real-ESRGAN."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks import tables
from benchmarks.machine import Machine
from benchmarks.tables import Row
from benchmarks.timing import Expected, Run, Settings, in_turn, seconds_of
from linearsr import weights
from linearsr.config import ModelConfig, Options
from linearsr.denoiser import LinearSR
from linearsr.imaging.files import Picture
from linearsr.imaging.resample import resize
from linearsr.latent import autoencoder
from linearsr.pipeline import upscaler as pipeline
from linearsr.pipeline.state import DenoiseState
from linearsr.pipeline.upscaler import Upscaler

BICUBIC, REAL_ESRGAN = "bicubic", "Real-ESRGAN x4plus"
PAPER_STEPS = 20


def run(machine: Machine, settings: Settings, folder: Path) -> tuple[str, list[Row]]:
    """Time each model at each size, from decoded LR to finished HR, with its own steps and 20."""
    rows, expected = [], Expected(settings.limit)
    with tempfile.TemporaryDirectory() as scratch:
        upscalers = [
            model(config, machine.device, machine.dtype, Path(scratch))
            for config in settings.models
        ]
    rival = real_esrgan(settings.real_esrgan, machine)
    for side in settings.sides:
        lr = photograph(side // 4)
        runs: dict[str, Run] = {BICUBIC: _there_and_back(_bicubic, lr, machine.device)}
        if rival:
            runs[REAL_ESRGAN] = _there_and_back(rival, lr, machine.device)
        for upscaler in upscalers:
            for steps in sorted({upscaler.config.sampling.steps, PAPER_STEPS}):
                name = f"{upscaler.config.name}, {steps} steps"
                runs[name] = _picture(upscaler, lr, steps)
        started = {n: r for n, r in runs.items() if expected.within(n, side)}
        timed = in_turn(started, machine.device, settings.rounds)
        for name in runs:
            row = tables.row(name, side, timed, expected)
            if row.seconds and name not in (BICUBIC, REAL_ESRGAN):
                row = row._replace(parts=parts_of(started[name], machine.device, row.seconds))
            rows.append(row)
    tables.plot(rows, "A whole picture, x4", folder / "image.png")
    whose = "weights given" if settings.real_esrgan else "random weights: for its time alone"
    rivals = f"Real-ESRGAN is spandrel's, {whose}." if rival else "Real-ESRGAN: no spandrel here."
    lines = [
        "## A whole picture",
        f"x4, from float32 pixels in main memory to the same: no file is read or written. {rivals} "
        "Peak memory is beyond weights, and on a GPU that of the GPU.",
        tables.table(rows, BICUBIC),
        "Where the time goes (what is left over is noise, joining tiles, rounding):",
        tables.parts_table(rows),
        "![a whole picture](image.png)",
    ]
    return "\n\n".join(lines), rows


def photograph(side: int) -> Picture:
    """Return a photograph of side x side pixels."""
    import skimage.data

    image = Image.fromarray(np.asarray(skimage.data.astronaut())).resize((side, side))
    pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1).float() / 255
    return Picture(pixels)


def model(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    scratch: Path,
    *,
    narrow: bool = False,
) -> Upscaler:
    """Load the bundled weights, or make random ones of the real shape, with a random DC-AE.

    narrow: give DC-AE an eighth of its channels.
    """
    if config.name in weights.available():
        return Upscaler.load(config.name, str(device))
    folder = scratch / "dc-ae"
    if not folder.exists():
        shape = {"latent_channels": config.denoiser.latent_channels}
        ae = autoencoder.sana_dc_ae(8 if narrow else 1, **shape, scaling_factor=config.latent.scale)
        ae.save_pretrained(folder)
    latent = config.latent.model_copy(update={"source": str(folder)})
    # Without tags: their embeddings would need the weights of Gemma.
    config = config.model_copy(update={"latent": latent, "tags": None})
    with device:
        expert = LinearSR(config.denoiser).to(dtype).requires_grad_(False).eval()
    experts = [expert] * (len(config.sampling.boundaries) + 1)
    upscaler = Upscaler(weights.Bundle(config, experts, {}), device)
    _ = upscaler.autoencoder  # read while its folder is there
    return upscaler


def psnr(picture: Tensor, reference: Tensor) -> float:
    """Return the PSNR in dB of two pictures of one shape with values in [0, 1]; inf if equal."""
    error = float((picture - reference).square().mean())
    return -10 * math.log10(error) if error else math.inf


def real_esrgan(file: Path | None, machine: Machine) -> Callable[[Tensor], Tensor] | None:
    """Load x4plus (23 residual blocks) from its own weights, or make random ones."""
    try:
        from spandrel import ModelLoader
        from spandrel.architectures.ESRGAN import ESRGAN
    except ImportError:
        return None
    if file:
        network: Any = ModelLoader().load_from_file(file).model
    else:
        network = ESRGAN(num_filters=64, num_blocks=23, scale=4)
    network = network.to(machine.device, machine.dtype).requires_grad_(False).eval()
    # The fastest memory layout for it.
    network = network.to(memory_format=torch.channels_last)
    layout = torch.channels_last
    return lambda x: network(x.to(machine.dtype).contiguous(memory_format=layout))


def _bicubic(x: Tensor) -> Tensor:
    return resize(x, x.shape[-2] * 4, x.shape[-1] * 4)


def _there_and_back(upscale: Callable[[Tensor], Tensor], lr: Picture, device: torch.device) -> Run:
    """A call that does as much as an upscaler: to the device, and finished pixels back."""
    return lambda: upscale(lr.pixels[None].to(device)).float().clamp(0, 1).cpu()


def _picture(upscaler: Upscaler, lr: Picture, steps: int) -> Run:
    return lambda: upscaler.upscale(lr, Options(steps=steps))


def parts_of(run: Run, device: torch.device, seconds: float) -> dict[str, float]:
    """Return the seconds of each stage in one more run, scaled to those of runs without clocks."""
    with _clocks(device) as parts:
        whole = seconds_of(run, device)
    return {name: spent * seconds / whole for name, spent in parts.items()}


@contextlib.contextmanager
def _clocks(device: torch.device) -> Iterator[dict[str, float]]:
    """Fill the dict with the seconds of each stage while the block runs."""
    parts: dict[str, float] = defaultdict(float)

    def clocked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            results: list[Any] = []
            parts[name] += seconds_of(lambda: results.append(function(*args, **kwargs)), device)
            return results[0]

        return call

    places: list[tuple[str, Any, str]] = [
        ("encode", DenoiseState, "enlarged_lr"),
        ("stem", LinearSR, "condition"),
        ("steps", LinearSR, "forward"),
        ("colour fix", pipeline, "fix_colour"),
    ]
    for kind in (autoencoder.SpaceToDepth, autoencoder.DCAutoencoder):
        places += [("encode", kind, "condition"), ("decode", kind, "decode")]
    with contextlib.ExitStack() as patches:
        for name, owner, attribute in places:
            wrapped = clocked(name, getattr(owner, attribute))
            patches.enter_context(mock.patch.object(owner, attribute, wrapped))
        yield parts
