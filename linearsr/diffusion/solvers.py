"""Noise -> clean latent: the timestep schedule, and ways over one segment of it.

Knows nothing of experts or pictures: it is told which steps to take, and with which denoiser.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from linearsr.config import SamplingConfig, Solver
from linearsr.diffusion.path import clean_guess, euler_step
from linearsr.errors import OptionError

Denoise = Callable[[Tensor, Tensor], Tensor]


def schedule(sampling: SamplingConfig, steps: int | None = None) -> list[float]:
    """The timesteps of so many steps (by default the model's own number), from 1 to 0.

    They are those of the model's plan of that length, or else the shifted schedule. Raises
    OptionError for steps that are not 1 to 50.
    """
    steps = sampling.steps if steps is None else steps
    if not 1 <= steps <= 50:
        raise OptionError(f"steps must be 1 to 50, not {steps}")
    for plan in sampling.plans:
        if len(plan) == steps:
            return [*plan, 0.0]
    return shifted(steps, sampling.flow_shift)


def shifted(steps: int, flow_shift: float) -> list[float]:
    """steps + 1 timesteps from 1 to 0, uniform and then shifted: s t / (1 + (s - 1) t).

    A shift above one spends more steps where noise is high (Esser et al. 2024, eq. 23).
    """
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


class SolverState(NamedTuple):
    """Where a sampler has come to, and what it must know to go on.

    latent: (B, C, h, w). previous: of the same shape, what a solver of second order saw at the step
    before (the velocity, or the guess of the clean latent); None where there was no step, or the
    next one has no use for it (`looks_back`).
    guess: of the same shape, the clean latent as the first step of all guessed it; None where it is
    not asked for. `sample` neither reads nor returns it.
    """

    latent: Tensor
    previous: Tensor | None = None
    guess: Tensor | None = None


def sample(
    solver: Solver,
    denoise: Denoise,
    walk: SolverState,
    timesteps: Sequence[float] | Tensor,
    start: int = 0,
    stop: int | None = None,
) -> SolverState:
    """Take steps `start` to `stop` of `timesteps` by the solver of that name.

    The arguments are those of `euler`. `timesteps` must reach one step further back than `start`
    where `walk` has something from that step. Segments in turn give the bits of one run if each
    goes on from the walk of the one before.

    Both solvers of second order take Euler's step and correct it by how what they look at has
    changed since the step before, so they ask `denoise` no more often:

    "adams": Adams-Bashforth for the velocity, which is taken as a straight line in t.
    "dpm": DPM-Solver++ 2M (Lu et al. 2022, 2211.01095, algorithm 2) for the clean latent, in
    half-log-SNR. That is infinite at both ends, so the first two steps and the last are Euler's.
    """
    if solver == "euler":
        return SolverState(euler(denoise, walk.latent, timesteps, start, stop))
    stop = len(timesteps) - 1 if stop is None else stop
    latent, previous = walk.latent, walk.previous
    t = torch.as_tensor(timesteps)
    t = t if t.ndim == 2 else t[:, None].expand(-1, latent.shape[0])
    weights = _weights(solver, t).to(latent.dtype).to(latent.device)
    t = t.to(latent.device)
    for i in range(start, stop):
        v = denoise(latent, t[i])
        seen = clean_guess(latent, v, t[i]) if solver == "dpm" else v
        latent = euler_step(latent, v, t[i], t[i + 1])
        if previous is not None:
            latent = latent + weights[i].view(-1, 1, 1, 1) * (seen - previous)
        previous = seen
    return SolverState(latent, previous)


def looks_back(solver: Solver, timesteps: Sequence[float], step: int) -> bool:
    """Whether that step of `timesteps` (steps + 1,) uses what was seen at the step before."""
    if solver == "euler" or step >= len(timesteps) - 1:
        return False
    return bool(_weights(solver, torch.tensor(timesteps)[:, None])[step])


def _weights(solver: Solver, t: Tensor) -> Tensor:
    """How much of the change since the step before is added, (steps, B), in float64.

    t: (steps + 1, B). A line through both is followed for another step of the solver's clock, and
    half of that is its mean.
    """
    t = t.double().contiguous()
    clock = torch.log((1 - t) / t) if solver == "dpm" else t
    ahead = clock.diff(dim=0)
    before = torch.cat([torch.full_like(ahead[:1], torch.inf), ahead[:-1]])
    euler = 1 - t[1:] / t[:-1] if solver == "dpm" else ahead
    # An infinite step onto t = 0 is of first order, as in diffusers.
    return torch.where(ahead.isfinite(), euler * ahead / (2 * before), 0)
