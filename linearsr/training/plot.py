"""A plot of a run: loss above, validation metrics below, the knee marked in both."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from linearsr.errors import require

Point = Mapping[str, float]


def report(
    title: str, history: Sequence[Point], validated: Sequence[Point], knee: int | None, status: str
) -> bytes:
    """Draw the report of a run and return it as PNG bytes.

    history: dicts with step, loss, gradient_norm, learning_rate, as `loop.Report`.
    validated: dicts with step and one value per metric. knee: a step, or None while rising.
    """
    require("train", "matplotlib")
    from matplotlib.figure import Figure

    metrics = sorted({name for point in validated for name in point if name != "step"})
    figure = Figure(figsize=(8, 2.6 + 1.7 * len(metrics)))
    axes = figure.subplots(1 + len(metrics), 1, sharex=True, squeeze=False)[:, 0]
    steps = [p["step"] for p in history]
    axes[0].plot(steps, [p["loss"] for p in history], color="tab:blue", lw=1)
    for axis, name in zip(axes[1:], metrics, strict=True):
        points = [p for p in validated if name in p]
        steps, values = [p["step"] for p in points], [p[name] for p in points]
        axis.plot(steps, values, "o-", ms=3, lw=1, color="k")
    for axis, name in zip(axes, ("loss", *metrics), strict=True):
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
        if knee is not None:
            axis.axvline(knee, color="tab:red", linestyle="--", linewidth=1.2)
    where = "no knee yet: still rising" if knee is None else f"knee {status} at step {knee}"
    axes[0].set_title(f"{title}: {where}")
    axes[-1].set_xlabel("step")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return buffer.getvalue()
