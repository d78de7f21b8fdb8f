"""Rows of results, and their Markdown tables and plots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.markdown import markdown
from benchmarks.timing import Expected, Timed


class Row(NamedTuple):
    """One way at one size. `seconds` None: it would have taken longer than the limit, or failed."""

    what: str
    side: int
    seconds: float | None = None
    memory: int = 0
    flops: int | None = None
    parts: dict[str, float] | None = None
    failure: str | None = None


def row(what: str, side: int, timed: Mapping[str, Timed], expected: Expected) -> Row:
    """Return the row of a way that was timed, failed or not started; tell `expected` its time."""
    if what not in timed:
        return Row(what, side)
    timed_way = timed[what]
    if timed_way.failure is not None:
        expected.record(what, side, math.inf)
        return Row(what, side, failure=timed_way.failure)
    expected.record(what, side, timed_way.seconds)
    return Row(what, side, timed_way.seconds, timed_way.memory)


def seconds(value: float | None) -> str:
    """Format a time with a suitable unit."""
    if value is None:
        return "over the limit"
    if value < 1e-3:
        return f"{value * 1e6:.0f} µs"
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"


def table(rows: Sequence[Row], base: str, peak: float | None = None) -> str:
    """Return a table of all rows by size, with ratios against the row `base`."""
    head = ["output", "", "time", f"against {base}", "peak memory"]
    head += ["TFLOP/s", "of the peak"] if peak else []
    lines = []
    bases = {row.side: row.seconds for row in rows if row.what == base}
    for row in rows:
        against = bases.get(row.side)
        ratio = f"{against / row.seconds:.2f}x" if against and row.seconds else ""
        memory = f"{row.memory / 2**20:.0f} MiB" if row.seconds else ""
        cells = [f"{row.side}²", row.what, row.failure or seconds(row.seconds), ratio, memory]
        if peak:
            rate = row.flops / row.seconds if row.flops and row.seconds else None
            cells += [f"{rate / 1e12:.3f}", f"{rate / peak:.1%}"] if rate else ["", ""]
        lines.append(cells)
    return markdown(head, lines)


def parts_table(rows: Sequence[Row]) -> str:
    """Return a table of the time that each part of a row takes."""
    timed = [row for row in rows if row.parts]
    names = list(dict.fromkeys(name for row in timed for name in row.parts or {}))
    lines = []
    for row in timed:
        shown = [seconds((row.parts or {}).get(name, 0.0)) for name in names]
        lines.append([f"{row.side}²", row.what, *shown, seconds(row.seconds)])
    return markdown(["output", "", *names, "all"], lines)


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Plot seconds over pixels, both logarithmic, with a line for each way."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for what in dict.fromkeys(row.what for row in rows):
        points = [(row.side, row.seconds) for row in rows if row.what == what and row.seconds]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=what)
    sides = sorted({row.side for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sides, [f"{side}²" for side in sides])
    axes.set_xlabel("output, pixels")
    axes.set_ylabel("seconds")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
