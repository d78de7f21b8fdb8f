"""The timesteps of a sampler, from noise (1) to the clean latent (0). Imports no torch."""

from __future__ import annotations

from linearsr.config import SamplingConfig
from linearsr.errors import OptionError


def schedule(sampling: SamplingConfig, steps: int | None = None) -> list[float]:
    """Return the timesteps from 1 to 0 for a number of steps; None is the model's own number.

    If one of `sampling.plans` has that many steps, its timesteps are returned, otherwise those of
    `shifted`. Raises OptionError unless `steps` is from 1 to 50.
    """
    steps = sampling.steps if steps is None else steps
    if not 1 <= steps <= 50:
        raise OptionError(f"steps must be 1 to 50, not {steps}")
    for plan in sampling.plans:
        if len(plan) == steps:
            return [*plan, 0.0]
    return shifted(steps, sampling.flow_shift)


def shifted(steps: int, flow_shift: float) -> list[float]:
    """Return steps + 1 timesteps from 1 to 0, uniform and then shifted: s t / (1 + (s - 1) t).

    A shift above one spends more steps where noise is high (Esser et al. 2024, eq. 23).
    """
    uniform = (1 - i / steps for i in range(steps + 1))
    return [flow_shift * t / (1 + (flow_shift - 1) * t) for t in uniform]
