"""Judging a checkpoint: fixed pictures, fixed seeds, named metrics, and a strip to look at.

Knows nothing of Ray or of how a checkpoint was trained: it is given a bundle and pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from linearsr import weights
from linearsr.config import Options
from linearsr.errors import LinearSRError
from linearsr.evaluation.judge import seeded_lr, upscaled
from linearsr.imaging.degradation import PRESETS
from linearsr.imaging.resample import resize
from linearsr.metrics.measure import measure
from linearsr.pipeline.upscaler import Upscaler
from linearsr.training.recipes import ValidationConfig, split_metric

STRIP = 3


def validate(
    bundle: weights.Bundle,
    pictures: Sequence[tuple[str, Tensor]],
    config: ValidationConfig,
    device: str = "cpu",
    skipped: Callable[[str], None] = print,
) -> tuple[dict[str, float], Tensor]:
    """Means of `config.metrics` over named HR pictures (3, H, W) in [0, 1], and a strip of samples.

    A model that takes tags is given those of the default tagger, if `config.tags` says so.

    The strip, (3, H, W) in [0, 1], has a row for each of the first pictures: LR, the result at each
    number of steps, HR. Metrics that cannot be had are told to `skipped` once, and left out.
    """
    upscaler = Upscaler(bundle, device)
    wanted = [split_metric(name) for name in config.metrics]
    steps = sorted({count for _, count in wanted})
    values: dict[str, list[float]] = {name: [] for name in config.metrics}
    rows: list[Tensor] = []
    tags: Literal["auto"] | tuple[str, ...] = "auto" if config.tags and bundle.config.tags else ()
    for name, hr in pictures:
        hr = _middle(hr, config.size, bundle.config.scale)
        lr = seeded_lr(hr, name, bundle.config.scale, PRESETS[config.degradation])
        results = {
            count: upscaled(upscaler, lr, Options(steps=count, tags=tags)) for count in steps
        }
        if len(rows) < STRIP:
            rows.append(torch.cat([resize(lr[None], *hr.shape[1:])[0], *results.values(), hr], 2))
        for metric, value in _measured(wanted, results, hr, bundle.config.scale, values, skipped):
            values[metric].append(value)
    means = {metric: float(np.mean(found)) for metric, found in values.items() if found}
    return means, _stack(rows).clamp(0, 1)


def _measured(
    wanted: list[tuple[str, int]],
    results: dict[int, Tensor],
    hr: Tensor,
    scale: int,
    values: dict[str, list[float]],
    skipped: Callable[[str], None],
) -> Iterator[tuple[str, float]]:
    for metric, count in wanted:
        name = f"{metric}@{count}"
        if name not in values:
            continue
        try:
            yield name, measure(metric, results[count][None], hr[None], scale)
        except LinearSRError as error:
            del values[name]
            skipped(f"{name} is left out: {error}")


def _middle(hr: Tensor, size: int, scale: int) -> Tensor:
    height, width = (min(size, n) // scale * scale for n in hr.shape[1:])
    top, left = (hr.shape[1] - height) // 2, (hr.shape[2] - width) // 2
    return hr[:, top : top + height, left : left + width]


def _stack(rows: list[Tensor]) -> Tensor:
    """Rows one above the other, padded to the widest."""
    width = max(row.shape[2] for row in rows)
    padded = [torch.nn.functional.pad(row, (0, width - row.shape[2])) for row in rows]
    return torch.cat(padded, 1)
