"""The state of a request between stages: plain data that may travel between machines."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from linearsr.config import Options, Solver
from linearsr.diffusion.experts import Segment
from linearsr.imaging.files import Picture
from linearsr.imaging.resample import enlarged_part
from linearsr.imaging.tiles import Tile


@dataclass(frozen=True, kw_only=True)
class DenoiseState:
    """The part of a request that a denoiser needs: tensors and plain values, no models.

    lr: the input (1, 3, h, w) in [-1, 1].
    size: height and width of the bicubic enlargement; where the latent grid is larger, the last
        pixels are repeated.
    latents: one (1, C, th, tw) per tile, at the timestep where the next segment starts; denoisers
        keep their dtype.
    timesteps: steps + 1 of them, from 1 to 0.
    tags: (1, T, tag_dim) embeddings, so that denoisers need no tag encoder; None without tags.
    previous: shaped as `latents`: what a second-order solver saw at the step before; empty if the
        next step does not look back.
    blends: whether the result is blended with the clean latent that the first step guesses.
    guess: shaped as `latents`: that guess; empty before the first step, and if nothing is blended.
    """

    lr: Tensor
    size: tuple[int, int]
    tiles: tuple[Tile, ...]
    latents: tuple[Tensor, ...]
    timesteps: tuple[float, ...]
    tags: Tensor | None = None
    solver: Solver = "euler"
    previous: tuple[Tensor, ...] = ()
    blends: bool = False
    guess: tuple[Tensor, ...] = ()

    def enlarged_lr(self, tile: Tile, factor: int, device: torch.device) -> Tensor:
        """Return the bicubic picture under one tile, equal to that part of the whole one.

        factor: pixels per latent cell along a side. Returns (1, 3, factor * th, factor * tw).
        """
        return enlarged_part(self.lr, *self.size, tile.scaled(factor), device)


AnyState = TypeVar("AnyState", bound=DenoiseState)


@dataclass(frozen=True, kw_only=True)
class UpscaleState(DenoiseState):
    """A whole request between stages: the denoiser's part, and what the first and last stage add.

    scale: how many times larger the network makes the picture, before any resampling.
    """

    picture: Picture
    options: Options
    steps: int
    scale: float
    segments: tuple[Segment, ...]

    def denoise_state(self) -> DenoiseState:
        """Return the denoiser's part alone, so that the picture does not travel with it."""
        return DenoiseState(**_denoise_fields(self))

    def after(self, denoised: DenoiseState) -> UpscaleState:
        """Return this request with the denoiser's part replaced."""
        return dataclasses.replace(self, **_denoise_fields(denoised))


def _denoise_fields(state: DenoiseState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(DenoiseState)}
