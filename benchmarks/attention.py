"""Time the operator alone: linear attention against softmax attention over the same tokens."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import gate, tables
from benchmarks.machine import Machine
from benchmarks.tables import Row
from benchmarks.timing import Expected, Settings, in_turn, log_slope
from linearsr.kernels import relu_linear_attention

LINEAR, SOFTMAX = "linear attention", "softmax attention"


def run(machine: Machine, settings: Settings, folder: Path) -> tuple[str, list[Row]]:
    """Time both, with the heads and tokens of the first model, at each output size."""
    config = settings.models[0]
    dim, width = config.denoiser.head_dim, config.denoiser.width
    gate.check_operator(relu_linear_attention, machine)
    rows, expected = [], Expected(settings.limit)
    for side in settings.sides:
        tokens = (side // config.latent.factor) ** 2
        shape = (1, tokens, width // dim, dim)
        q, k, v = (torch.randn(shape, device=machine.device, dtype=machine.dtype) for _ in "qkv")
        q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))
        runs = {
            LINEAR: lambda: relu_linear_attention(q, k, v),  # noqa: B023
            SOFTMAX: lambda: F.scaled_dot_product_attention(q_, k_, v_),  # noqa: B023
        }
        power = {LINEAR: 1, SOFTMAX: 2}
        runs = {n: r for n, r in runs.items() if expected.within(n, side, power[n])}
        timed = in_turn(runs, machine.device, settings.rounds)
        for name in (LINEAR, SOFTMAX):
            rows.append(tables.row(name, side, timed, expected))
    tables.plot(rows, f"Attention of {config.name} alone", folder / "attention.png")
    points = [(row.side, row.seconds) for row in rows if row.what == LINEAR and row.seconds]
    lines = [
        "## The attention operator",
        f"{width // dim} heads of {dim} channels ({config.name}), {config.latent.factor}² pixels "
        "to a token; softmax is PyTorch's `scaled_dot_product_attention`.",
        tables.table(rows, SOFTMAX),
        f"Log-log slope of linear attention over pixels: {log_slope(points):.3f}.",
        "![attention](attention.png)",
    ]
    return "\n\n".join(lines), rows
