"""A picture of a run: loss above, validation metrics below, the knee marked in both."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from linearsr.errors import require

Point = Mapping[str, float]


def report(
    title: str, history: Sequence[Point], validated: Sequence[Point], knee: int | None, status: str
) -> bytes:
    """Draw the report of a run and return it as PNG bytes.

    history: dicts with step, loss, gradient_norm, learning_rate, as `loop.Report`.
    validated: dicts with step and one value per metric. knee: a step, or None while rising.
    """
    plt = _pyplot()
    metrics = sorted({name for point in validated for name in point if name != "step"})
    figure, axes = plt.subplots(
        1 + len(metrics), 1, figsize=(8, 2.6 + 1.7 * len(metrics)), sharex=True, squeeze=False
    )
    _loss(axes[0, 0], history)
    for axis, name in zip(axes[1:, 0], metrics, strict=True):
        _metric(axis, name, [p for p in validated if name in p])
    for axis in axes[:, 0]:
        axis.grid(alpha=0.3)
        if knee is not None:
            axis.axvline(knee, color="tab:red", linestyle="--", linewidth=1.2)
    where = "no knee yet: still rising" if knee is None else f"knee {status} at step {knee}"
    axes[0, 0].set_title(f"{title}: {where}")
    axes[-1, 0].set_xlabel("step")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()


def _loss(axis: Any, history: Sequence[Point]) -> None:
    axis.plot([p["step"] for p in history], [p["loss"] for p in history], color="tab:blue", lw=1)
    axis.set_ylabel("loss")


def _metric(axis: Any, name: str, points: Sequence[Point]) -> None:
    axis.plot([p["step"] for p in points], [p[name] for p in points], "o-", ms=3, lw=1, color="k")
    axis.set_ylabel(name)


def _pyplot() -> Any:
    require("train", "matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
