"""Solvers from noise to a clean latent, one function call per segment of the timesteps.

They know nothing of experts or pictures: the caller says which steps to take with which denoiser.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from linearsr.config import Solver
from linearsr.diffusion.path import clean_guess, euler_step

Denoise = Callable[[Tensor, Tensor], Tensor]


class SolverState(NamedTuple):
    """The result of the steps so far, and all that the next step needs.

    latent: (B, C, h, w).
    previous: the velocity or the estimate of the clean latent at the step before, which solvers of
        second order use, in the shape of `latent`; None before the first step, or if the next step
        does not use it (`uses_previous`).
    guess: the very first step's estimate of the clean latent, in the shape of `latent`, or None if
        the caller does not need it. `sample` ignores it; its caller computes it.
    """

    latent: Tensor
    previous: Tensor | None = None
    guess: Tensor | None = None


def sample(
    solver: Solver,
    denoise: Denoise,
    state: SolverState,
    timesteps: Sequence[float] | Tensor,
    start: int = 0,
    stop: int | None = None,
) -> SolverState:
    """Return the state after steps `start` to `stop` (exclusive) of `timesteps`.

    denoise: a function of the latent and t (B,) that returns the velocity.
    timesteps: (steps + 1,) for the whole batch, or (steps + 1, B) for each sample. If
        `state.previous` is set, they must include the step before `start`.

    Several calls in turn give the same bits as one call for all steps, if each continues from the
    state that the one before has returned.

    One step from t = 1 lands on the conditional mean (fidelity); more steps move towards one
    plausible picture (perception).

    Besides "euler" there are two solvers of second order. Both take Euler's step and correct it by
    the change since the step before, so they call `denoise` no more often:

    "adams": Adams-Bashforth for the velocity, which is taken as a straight line in t.
    "dpm": DPM-Solver++ 2M (Lu et al. 2022, 2211.01095, algorithm 2) for the clean latent, in
        half-log-SNR. That is infinite at both ends, so the first two steps and the last are
        Euler's.
    """
    stop = len(timesteps) - 1 if stop is None else stop
    latent, previous = state.latent, state.previous
    t = torch.as_tensor(timesteps)
    t = t if t.ndim == 2 else t[:, None].expand(-1, latent.shape[0])
    if solver == "euler":
        t = t.to(latent.device)
        for i in range(start, stop):
            latent = euler_step(latent, denoise(latent, t[i]), t[i], t[i + 1])
        return SolverState(latent)
    weights = _weights(solver, t).to(latent.dtype).to(latent.device)
    t = t.to(latent.device)
    for i in range(start, stop):
        v = denoise(latent, t[i])
        current = clean_guess(latent, v, t[i]) if solver == "dpm" else v
        latent = euler_step(latent, v, t[i], t[i + 1])
        if previous is not None:
            latent = latent + weights[i].view(-1, 1, 1, 1) * (current - previous)
        previous = current
    return SolverState(latent, previous)


def uses_previous(solver: Solver, timesteps: Sequence[float], step: int) -> bool:
    """Return whether step `step` of `timesteps` (steps + 1,) uses a result of the one before."""
    if solver == "euler" or step >= len(timesteps) - 1:
        return False
    return bool(_weights(solver, torch.tensor(timesteps)[:, None])[step])


def _weights(solver: Solver, t: Tensor) -> Tensor:
    """Return the share of the change since the step before to add, (steps, B) in float64.

    t: (steps + 1, B). The line through both results is extended by one step of the solver's own
    time; half of its rise is the mean over that step.
    """
    t = t.double().contiguous()
    time = torch.log((1 - t) / t) if solver == "dpm" else t
    ahead = time.diff(dim=0)
    before = torch.cat([torch.full_like(ahead[:1], torch.inf), ahead[:-1]])
    euler = 1 - t[1:] / t[:-1] if solver == "dpm" else ahead
    # An infinite step onto t = 0 is of first order, as in diffusers.
    return torch.where(ahead.isfinite(), euler * ahead / (2 * before), 0)
