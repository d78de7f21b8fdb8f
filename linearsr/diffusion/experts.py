"""Which expert denoises which timesteps.

Imports neither torch nor ray, so training, the sampler, the Serve router and batch jobs share it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from linearsr.errors import OptionError

# From noise to picture (LinearSR section 3.3).
EXPERTS = ("structure", "refinement", "texture", "polish")
ANCHOR = 0.875
RANGE = (0.0116, 0.9713)
# A boundary rounded to float32 still counts as that boundary: half an ulp near 1 is 3e-8.
TIE = 1e-6


class Segment(NamedTuple):
    """Steps `start` to `stop` (exclusive), which belong to `expert` (0 is highest noise)."""

    expert: int
    start: int
    stop: int


def log_snr(t: float) -> float:
    """Return 2 ln((1 - t) / t) for t in (0, 1)."""
    return 2 * math.log((1 - t) / t)


def timestep(log_snr: float) -> float:
    """Return the t in (0, 1) of a log-SNR."""
    return 1 / (1 + math.exp(log_snr / 2))


def boundaries(
    anchor: float = ANCHOR, low: float = RANGE[0], high: float = RANGE[1]
) -> tuple[float, float, float]:
    """Return three boundaries by hierarchical bisection in log-SNR, ascending in t.

    A model's own boundaries are `SamplingConfig.boundaries`; this is where their default comes
    from. `anchor` splits [low, high]; the log-SNR midpoint of each half maps back to t. The
    defaults give the paper's [0.223, 0.875, 0.939].

    Raises OptionError unless 0 < low < anchor < high < 1.
    """
    if not 0 < low < anchor < high < 1:
        raise OptionError(
            f"boundaries of experts need 0 < low < anchor < high < 1, not low={low}, "
            f"anchor={anchor}, high={high}"
        )
    below = timestep((log_snr(low) + log_snr(anchor)) / 2)
    above = timestep((log_snr(anchor) + log_snr(high)) / 2)
    return below, anchor, above


def expert_at(t: float, bounds: Sequence[float]) -> int:
    """Return the expert of timestep `t` in [0, 1]: 0 above all bounds, len(bounds) below all.

    A tie belongs to the lower-noise expert, in float32 as in float64.
    """
    return sum(t <= bound + TIE for bound in bounds)


def plan(timesteps: Sequence[float], bounds: Sequence[float]) -> list[Segment]:
    """Split the steps into segments of one expert each; every step is in exactly one of them.

    timesteps: the (shifted) t at which each step *starts*, strictly falling, in (0, 1]. Raises
    OptionError for others.
    """
    if not timesteps or not 0 < timesteps[0] <= 1:
        raise OptionError("timesteps must start in (0, 1] and there must be at least one")
    if any(b >= a for a, b in pairwise(timesteps)) or timesteps[-1] <= 0:
        raise OptionError("timesteps must fall strictly and stay above 0")
    segments: list[Segment] = []
    for i, t in enumerate(timesteps):
        expert = expert_at(t, bounds)
        if segments and segments[-1].expert == expert:
            segments[-1] = segments[-1]._replace(stop=i + 1)
        else:
            segments.append(Segment(expert, i, i + 1))
    return segments


def shares(segments: Sequence[Segment], experts: int) -> list[int]:
    """Return the number of steps that each expert takes, which is its load."""
    steps = [0] * experts
    for segment in segments:
        steps[segment.expert] += segment.stop - segment.start
    return steps


def ranges(bounds: Sequence[float]) -> list[tuple[float, float]]:
    """Return the (low, high] timesteps that each expert is trained on, highest noise first."""
    edges = [0.0, *bounds, 1.0]
    return list(pairwise(edges))[::-1]
