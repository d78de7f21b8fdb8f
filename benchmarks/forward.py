"""Time one forward of the denoiser: ours, diffusers' Sana with the same weights, and softmax."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks import gate, tables
from benchmarks.contestants import TAGS, Contestants, Forward
from benchmarks.machine import Machine
from benchmarks.tables import Row
from benchmarks.timing import Expected, Settings, in_turn
from linearsr.config import ModelConfig
from linearsr.denoiser import LinearSR

BASE = "diffusers"


def run(machine: Machine, settings: Settings, folder: Path) -> tuple[str, list[Row]]:
    """Time each model at each size."""
    pages, all_rows = ["## One forward of the denoiser"], []
    for config in settings.models:
        contestants = Contestants(config, machine.device, machine.dtype)
        compiled = min(settings.sides) <= settings.compiled_up_to
        errors = gate.check(contestants, compiled)
        rows, expected = [], Expected(settings.limit)
        for side in settings.sides:
            rows += _at(contestants, side, settings, expected)
        picture = f"forward-{config.name}.png"
        tables.plot(rows, f"One forward, {config.name}", folder / picture)
        parameters = sum(p.numel() for p in contestants.ours.parameters())
        pages += [
            f"### {config.name}",
            f"{parameters / 1e6:.1f} million parameters, batch 1, {TAGS} tags; the same random "
            "weights everywhere. Relative errors to float64: "
            + ", ".join(f"{name} {error:.2g}" for name, error in errors.items())
            + ".",
            tables.table(rows, BASE, machine.peak),
            "What does not depend on t is computed outside of the clock by LinearSR, as it is once "
            "for all steps (keys and values of tags, what the LR picture adds); diffusers computes "
            "keys and values at every step, and so here. Compiled: `torch.compile(dynamic=False)`, "
            "of LinearSR the plain order. Peak memory is beyond weights and inputs.",
            f"![one forward]({picture})",
        ]
        all_rows += [row._replace(what=f"{config.name}: {row.what}") for row in rows]
    return "\n\n".join(pages), all_rows


def _at(contestants: Contestants, side: int, settings: Settings, expected: Expected) -> list[Row]:
    ways = contestants.forwards(contestants.inputs(side), side <= settings.compiled_up_to)
    if contestants.config.denoiser.tag_dim is None:
        ways["LinearSR, as shipped (no tags)"] = _as_shipped(contestants, side)
    power = {gate.NOT_THE_SAME: 2}
    started = {
        n: gate.finite(n, w, side)
        for n, w in ways.items()
        if expected.within(n, side, power.get(n, 1))
    }
    timed = in_turn(started, contestants.device, settings.rounds)
    flops, rows = contestants.flops(side), []
    for name in ways:
        row = tables.row(name, side, timed, expected)
        # Another function needs another number of operations.
        same = name != gate.NOT_THE_SAME and "shipped" not in name
        rows.append(row._replace(flops=flops if same else None))
    return rows


def _as_shipped(contestants: Contestants, side: int) -> Forward:
    config: ModelConfig = contestants.config
    device, dtype = contestants.device, contestants.dtype
    model = LinearSR(config.denoiser).to(device, dtype).eval()
    inputs = contestants.inputs(side)
    picture = torch.randn(1, 3, side, side).to(device, dtype)
    condition = model.condition(picture, torch.randn_like(inputs.latent))
    latent = inputs.latent.contiguous(memory_format=torch.channels_last)
    return lambda: model(latent, inputs.t, condition)
