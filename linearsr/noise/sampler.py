"""Noise -> clean latent: the timestep schedule and Euler's method over one segment of it.

Knows nothing of experts or pictures: it is told which steps to take, and with which denoiser.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from linearsr.errors import OptionError
from linearsr.noise.path import euler_step

Denoise = Callable[[Tensor, Tensor], Tensor]


def schedule(steps: int, flow_shift: float) -> list[float]:
    """steps + 1 timesteps from 1 to 0, uniform and then shifted: s t / (1 + (s - 1) t).

    A shift above one spends more steps where noise is high (Esser et al. 2024, eq. 23).
    """
    if not 1 <= steps <= 50:
        raise OptionError(f"steps must be 1 to 50, not {steps}")
    uniform = (1 - i / steps for i in range(steps + 1))
    return [flow_shift * t / (1 + (flow_shift - 1) * t) for t in uniform]


def euler(
    denoise: Denoise,
    latent: Tensor,
    timesteps: Sequence[float] | Tensor,
    start: int = 0,
    stop: int | None = None,
) -> Tensor:
    """Take steps `start` to `stop` of `timesteps` from `latent` (B, C, h, w).

    `timesteps`: (steps + 1,) for all, or (steps + 1, B) with those of each sample.
    `denoise(latent, t)` returns the velocity at t (B,). One step from t = 1 lands on the
    conditional mean (fidelity); more steps move towards one plausible picture (perception).
    """
    stop = len(timesteps) - 1 if stop is None else stop
    t = torch.as_tensor(timesteps, device=latent.device)
    t = t if t.ndim == 2 else t[:, None].expand(-1, latent.shape[0])
    for i in range(start, stop):
        latent = euler_step(latent, denoise(latent, t[i]), t[i], t[i + 1])
    return latent
