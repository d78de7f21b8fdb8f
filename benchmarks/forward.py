"""One forward of the denoiser: ours against diffusers' Sana with the same weights, and softmax."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks import gate, tables
from benchmarks.contestants import TAGS, Contestants, Forward
from benchmarks.machine import Machine
from benchmarks.tables import Row
from benchmarks.timing import Asked, Expected, in_turn
from linearsr.config import ModelConfig
from linearsr.denoiser import LinearSR

BASE = "diffusers"


def run(machine: Machine, asked: Asked, folder: Path) -> tuple[str, list[Row]]:
    """Each model at each size."""
    pages, all_rows = ["## One forward of the denoiser"], []
    for config in asked.models:
        contestants = Contestants(config, machine.device, machine.dtype)
        compiled = min(asked.sides) <= asked.compiled_up_to
        errors = gate.check(contestants, compiled)
        rows, expected = [], Expected(asked.limit)
        for side in asked.sides:
            rows += _at(contestants, side, asked, expected)
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
            f"![one forward]({picture})",
        ]
        all_rows += [row._replace(what=f"{config.name}: {row.what}") for row in rows]
    return "\n\n".join(pages), all_rows


def _at(contestants: Contestants, side: int, asked: Asked, expected: Expected) -> list[Row]:
    ways = contestants.forwards(contestants.inputs(side), side <= asked.compiled_up_to)
    if contestants.config.denoiser.tag_dim is None:
        ways["LinearSR, as shipped (no tags)"] = _as_shipped(contestants, side)
    power = {gate.NOT_THE_SAME: 2}
    started = {n: w for n, w in ways.items() if expected.within(n, side, power.get(n, 1))}
    gate.check_finite({n: w for n, w in started.items() if n == "LinearSR"}, side)
    timed = in_turn(started, contestants.device, asked.rounds)
    flops, rows = contestants.flops(side), []
    for name in ways:
        if name not in timed:
            rows.append(Row(name, side))
            continue
        expected.saw(name, side, timed[name].seconds)
        # Another function does another number of operations.
        counted = None if name == gate.NOT_THE_SAME or "shipped" in name else flops
        rows.append(Row(name, side, timed[name].seconds, timed[name].memory, counted))
    return rows


def _as_shipped(contestants: Contestants, side: int) -> Forward:
    config: ModelConfig = contestants.config
    device, dtype = contestants.device, contestants.dtype
    model = LinearSR(config.denoiser).to(device, dtype).eval()
    given = contestants.inputs(side)
    picture = torch.randn(1, 3, side, side).to(device, dtype)
    condition = model.condition(picture, torch.randn_like(given.latent))
    latent = given.latent.contiguous(memory_format=torch.channels_last)
    return lambda: model(latent, given.t, condition)
