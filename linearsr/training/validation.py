"""Validation of a checkpoint: fixed pictures, fixed seeds, named metrics, and a strip to look at.

Knows nothing of Ray or of how a checkpoint was trained: it gets models and pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from linearsr import weights
from linearsr.config import ModelConfig, Options
from linearsr.denoiser import LinearSR
from linearsr.errors import LinearSRError
from linearsr.evaluation.judge import seeded_lr
from linearsr.imaging.degradation import PRESETS
from linearsr.imaging.files import Picture
from linearsr.imaging.resample import resize
from linearsr.metrics.measure import measure
from linearsr.pipeline.state import UpscaleState
from linearsr.pipeline.upscaler import Upscaler
from linearsr.training.recipes import ValidationConfig, split_metric
from linearsr.weights.bundle import placeholder

# How many pictures the strip shows.
STRIP = 3


def validate(
    model: ModelConfig,
    load: Callable[[int], LinearSR],
    pictures: Sequence[tuple[str, Tensor]],
    config: ValidationConfig,
    device: str = "cpu",
    skipped: Callable[[str], None] = print,
) -> tuple[dict[str, float], Tensor]:
    """Return the means of `config.metrics` over named pictures, and a strip of samples.

    load: returns an expert by its number. Each is loaded once, takes its steps on all pictures, and
    is dropped before the next one, so one expert is in memory at a time.
    pictures: names and HR (3, H, W) in [0, 1]. A model that takes tags gets those of the default
    tagger if `config.tags` says so.
    The strip, (3, H, W) in [0, 1], has a row for each of the first pictures: LR, the result at each
    number of steps, HR. A metric that cannot be computed is left out, and `skipped` gets the reason
    once.
    """
    metrics = {name: split_metric(name) for name in config.metrics}
    steps = sorted({count for _, count in metrics.values()})
    absent = [placeholder(model) for _ in weights.expert_names(model)]
    upscaler = Upscaler(weights.Bundle(model, absent, {}), device)
    truths: list[Tensor] = []
    states: list[UpscaleState] = []
    for name, hr in pictures:
        hr = _middle(hr, config.size, model.scale)
        truths.append(hr)
        lr = seeded_lr(hr, name, model.scale, PRESETS[config.degradation])
        picture = Picture(lr)
        tags: Literal["auto"] | tuple[str, ...] = "auto" if config.tags and model.tags else ()
        options = upscaler.with_tags(picture, Options(tags=tags))
        for count in steps:
            states.append(upscaler.prepare(picture, options.model_copy(update={"steps": count})))
    _denoise(upscaler, load, states)
    values: dict[str, list[float]] = {name: [] for name in metrics}
    rows: list[Tensor] = []
    for number, hr in enumerate(truths):
        mine = states[number * len(steps) : (number + 1) * len(steps)]
        lr = mine[0].picture.pixels
        results = {
            count: upscaler.finish(state).pixels for count, state in zip(steps, mine, strict=True)
        }
        if len(rows) < STRIP:
            rows.append(torch.cat([resize(lr[None], *hr.shape[1:])[0], *results.values(), hr], 2))
        for name in list(values):
            metric, count = metrics[name]
            try:
                values[name].append(measure(metric, results[count][None], hr[None], model.scale))
            except LinearSRError as error:
                del values[name]
                skipped(f"{name} is left out: {error}")
    means = {name: float(np.mean(measured)) for name, measured in values.items() if measured}
    return means, _stack(rows).clamp(0, 1)


def _denoise(
    upscaler: Upscaler, load: Callable[[int], LinearSR], states: list[UpscaleState]
) -> None:
    """Take the steps of all states in place, one expert after the other."""
    for number in range(len(upscaler.experts)):
        mine = [any(segment.expert == number for segment in s.segments) for s in states]
        if not any(mine):
            continue
        absent = upscaler.experts[number]
        upscaler.experts[number] = load(number).to(upscaler.device).requires_grad_(False).eval()
        for i, state in enumerate(states):
            for segment in state.segments:
                if segment.expert == number:
                    states[i] = upscaler.denoise(state, segment)
        upscaler.experts[number] = absent


def _middle(hr: Tensor, size: int, scale: int) -> Tensor:
    height, width = (min(size, n) // scale * scale for n in hr.shape[1:])
    top, left = (hr.shape[1] - height) // 2, (hr.shape[2] - width) // 2
    return hr[:, top : top + height, left : left + width]


def _stack(rows: list[Tensor]) -> Tensor:
    """Put rows one above the other, padded to the widest."""
    width = max(row.shape[2] for row in rows)
    padded = [torch.nn.functional.pad(row, (0, width - row.shape[2])) for row in rows]
    return torch.cat(padded, 1)
