"""Measure the gain of each optimisation: the same picture with it and without, in turn."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks.image import photograph, psnr
from benchmarks.machine import Machine
from benchmarks.tables import Row, seconds
from benchmarks.timing import Settings, in_turn
from linearsr.config import Options
from linearsr.denoiser import LinearSR, cpu_block
from linearsr.imaging.files import Picture
from linearsr.pipeline import tiling
from linearsr.pipeline.state import UpscaleState
from linearsr.pipeline.upscaler import Upscaler

LARGEST = 2048
COMPILED = "torch.compile of plain blocks, for strips"
SMALLER_TILE = 192
SMALLER_STRIP = 1024
Switching = Callable[[], AbstractContextManager[object]]


class Switch(NamedTuple):
    """An optimisation: `off` and `on` set it while a picture is upscaled."""

    name: str
    off: Switching
    on: Switching = contextlib.nullcontext


def run(machine: Machine, settings: Settings, _: Path) -> tuple[str, list[Row]]:
    """Time the bundled model with its default steps, at sizes up to LARGEST."""
    upscaler = Upscaler.load("linearsr-tiny", str(machine.device))
    rows: list[Row] = []
    lines = ["| output | | without | with | gain | PSNR between them |", "|---" * 6 + "|"]
    switches = _switches(upscaler)
    for side in (side for side in settings.sides if side <= LARGEST):
        picture = photograph(side // 4)
        for switch in switches:
            if switch.name == COMPILED and side > settings.compiled_up_to:
                continue
            names = f"{switch.name}: without", f"{switch.name}: with"
            ways = zip(names, (switch.off, switch.on), strict=True)
            results: dict[str, Tensor] = {}

            def upscale(name: str, way: Switching) -> None:
                with way():
                    results[name] = upscaler.upscale(picture, Options()).pixels  # noqa: B023

            runs = {name: (lambda n=name, w=way: upscale(n, w)) for name, way in ways}
            timed = in_turn(runs, machine.device, settings.rounds)
            failed = next((t.failure for t in timed.values() if t.failure), None)
            if failed:
                lines.append(f"| {side}² | {switch.name} | {failed} | | | |")
                continue
            off, on = (timed[name].seconds for name in names)
            change = psnr(results[names[0]], results[names[1]])
            lines.append(
                f"| {side}² | {switch.name} | {seconds(off)} | {seconds(on)} | {off / on:.2f}x "
                f"| {change:.1f} dB |"
            )
            rows += [Row(name, side, timed[name].seconds, timed[name].memory) for name in names]
    return "## What each optimisation gives\n\n" + "\n".join(lines), rows


def _switches(upscaler: Upscaler) -> list[Switch]:
    compiled = Switch(COMPILED, contextlib.nullcontext, _compiled(upscaler))
    if upscaler.device.type == "cuda":
        kernels = Switch("Triton kernels", lambda: mock.patch.dict(os.environ, _TORCH_KERNELS))
        joining = Switch(
            "pictures joined on the GPU, not on the CPU",
            lambda: mock.patch.object(Upscaler, "_finish_on", _finished_on_the_cpu),
        )
        return [kernels, joining, compiled]
    switches = [
        Switch(
            "strips of rows, not the plain order",
            lambda: mock.patch.object(LinearSR, "use_strips", False),
        ),
        Switch(
            f"tiles of {tiling.AUTO_TILE} cells, not {SMALLER_TILE}",
            lambda: mock.patch.object(tiling, "AUTO_TILE", SMALLER_TILE),
        ),
        Switch(
            f"strips of {cpu_block.CACHED_TOKENS} tokens, not {SMALLER_STRIP}",
            lambda: mock.patch.object(cpu_block, "CACHED_TOKENS", SMALLER_STRIP),
        ),
        Switch(
            "SiLU in the pass of the product before it, not its own",
            lambda: mock.patch.object(cpu_block, "_fuses", return_value=False),
        ),
        Switch(
            "int8 products in plain order, for strips in bfloat16",
            contextlib.nullcontext,
            _experts(upscaler, _int8),
        ),
    ]
    if upscaler.experts[0].embed.weight.dtype == torch.bfloat16:
        switches.append(Switch("bfloat16, not float32", _experts(upscaler, LinearSR.float)))
    return [*switches, compiled]


_TORCH_KERNELS = {"LINEARSR_KERNELS": "torch"}


def _experts(upscaler: Upscaler, convert: Callable[[LinearSR], LinearSR]) -> Switching:
    """A switch to converted copies of the same experts."""
    others = [convert(copy.deepcopy(expert)) for expert in upscaler.experts]
    return lambda: mock.patch.object(upscaler, "experts", others)


def _int8(model: LinearSR) -> LinearSR:
    """Use PyTorch's dynamic int8 products, which need the plain order and float32."""
    model.use_strips = False
    blocks = torch.ao.quantization.quantize_dynamic(model.float().blocks, {torch.nn.Linear})
    model.blocks = blocks
    return model


_finished = Upscaler._finish_on


def _finished_on_the_cpu(upscaler: Upscaler, job: UpscaleState, _: torch.device) -> Picture:
    return _finished(upscaler, job, torch.device("cpu"))


def _compiled(upscaler: Upscaler) -> Switching:
    def compiled(model: LinearSR) -> LinearSR:
        model.compile_blocks()
        return model

    return _experts(upscaler, compiled)
