"""The straight path between a clean latent (t = 0) and noise (t = 1), and formulas on it.

    z_t = (1 - t) z_0 + t eps,  v = eps - z_0,  SNR(t) = ((1 - t) / t)^2  (LinearSR section 3.1)

Knows nothing of networks, experts or pictures.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def _like(t: Tensor, x: Tensor) -> Tensor:
    """Return timesteps (B,) in a shape that broadcasts over x (B, ...)."""
    return t.view(-1, *[1] * (x.ndim - 1))


def add_noise(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return z_t for `clean` and `noise` (B, ...) at timesteps `t` (B,) in [0, 1]."""
    t = _like(t, clean)
    return torch.lerp(clean, noise, t)


def velocity(clean: Tensor, noise: Tensor) -> Tensor:
    """Return the regression target dz/dt = eps - z_0, constant along the path."""
    return noise - clean


def euler_step(latent: Tensor, v: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """Return z at `t_next` from z at `t`, both (B,): exact if v is the path's own velocity."""
    return torch.addcmul(latent, _like(t_next - t, latent), v)


def clean_guess(latent: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """Return z_0 from z at `t` (B,) and its velocity: exact if v is the path's own."""
    return latent - _like(t, latent) * v


class Preconditioning(NamedTuple):
    """EDM's preconditioning (Karras et al. 2022, eq. 7) rewritten for the straight path.

    With a clean latent of unit spread and D = (1 - t)^2 + t^2, the best *linear* guess of z_0 from
    z_t is ((1 - t) / D) z_t. The network sees that guess (so at t = 1, where z_t is pure noise, it
    sees zeros and the one-step answer does not depend on the seed) and its output F completes
    it: z_0 = (1 - t)/D z_t + t/sqrt(D) F. As a velocity, with no division by t left:

        v = (2t - 1)/D z_t - F / sqrt(D)

    Each field is (B, 1, 1, 1).
    """

    input_scale: Tensor
    skip: Tensor
    output_scale: Tensor

    @classmethod
    def at(cls, t: Tensor) -> Preconditioning:
        """Return the coefficients at timesteps `t` (B,) in [0, 1]."""
        t = t.view(-1, 1, 1, 1)
        power = (1 - t) ** 2 + t**2
        return cls((1 - t) / power, (2 * t - 1) / power, -power.rsqrt())
