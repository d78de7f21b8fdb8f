"""The perceptual objective: pictures that look like the truth, from wherever sampling begins them.

    noise ─ first expert ─▶ z_t ─ trained expert ─▶ clean latent ─ decode ─▶ L1, LPIPS, critic
            └─ at times one more step by another expert ─┘

What the trained expert starts from is what sampling brings it in a few steps: an Euler walk by the
experts before it, frozen, to a random timestep of its own range. So its one guess becomes good
enough to end with, at whatever number of steps. Knows nothing of Ray, files or recipes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from linearsr.config import ModelConfig
from linearsr.denoiser import LinearSR
from linearsr.diffusion.experts import ranges
from linearsr.diffusion.path import clean_guess, euler_step
from linearsr.metrics import lpips
from linearsr.training.config import PerceptualConfig
from linearsr.training.data import Batch
from linearsr.training.discriminator import Discriminator, fooled, hinge
from linearsr.training.engine import Engine, as_weights_error
from linearsr.training.guard import Diverged
from linearsr.training.loop import Given, Losses, TrainState, draw

DISCRIMINATOR = "discriminator.pt"


class Critic:
    """A discriminator and its optimizer, the same on every rank."""

    def __init__(self, config: PerceptualConfig, device: torch.device) -> None:
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = Discriminator(config.channels).to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), config.discriminator_rate, config.betas, weight_decay=0.0
        )

    def fooled(self, picture: Tensor, lr_picture: Tensor) -> Tensor:
        """The generator's loss (B,), with gradients to the picture alone."""
        self.model.requires_grad_(False)
        loss = fooled(self.model(picture, lr_picture))
        self.model.requires_grad_(True)
        return loss

    def step(
        self, real: Tensor, fake: Tensor, lr_picture: Tensor, engine: Engine, fraction: float
    ) -> float:
        """One update over all ranks; this rank's loss.

        A gradient that is not finite changes nothing, and raises Diverged on all ranks alike.
        """
        loss = hinge(self.model(real, lr_picture), self.model(fake, lr_picture))
        loss.backward()
        parameters = list(self.model.parameters())
        engine.average([p.grad for p in parameters if p.grad is not None])
        norm = nn.utils.clip_grad_norm_(parameters, self.config.clip).item()
        if not math.isfinite(norm):
            raise Diverged(f"the discriminator's gradient is not finite ({norm})")
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.discriminator_rate * fraction
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def state(self) -> dict[str, Any]:
        """Tensors and plain values only."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Of another discriminator's state, RuntimeError or ValueError."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


class Perceptual:
    """The objective of a perceptual stage of one expert.

    first: the expert that starts from noise, frozen. before: the one next to the trained one, also
    frozen; None where that is the first. between: the (low, high] timesteps of `before`.
    """

    def __init__(
        self,
        config: PerceptualConfig,
        device: torch.device,
        first: LinearSR,
        before: LinearSR | None = None,
        between: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        self.config, self.device = config, device
        self.first = first.to(device).requires_grad_(False).eval()
        self.before = None if before is None else before.to(device).requires_grad_(False).eval()
        self.between = between
        judge = _lpips(config)
        self.lpips = None if judge is None else judge.to(device)
        self.critic = Critic(config, device) if config.gan else None
        self.shown: tuple[Tensor, Tensor, Tensor] | None = None

    def losses(self, state: TrainState, batch: Batch) -> Losses:
        """The weighted distances and, on top of them, how far the discriminator is from fooled."""
        model, autoencoder = state.engine.module, state.autoencoder
        with torch.no_grad():
            given = Given.of(batch, model, autoencoder, state.encoder)
            latent, t = self.arrive(state, batch, given)
        guess = clean_guess(latent, model(latent, t, given.condition(model)), t)
        guess, real, lr_picture = self._cut(guess, batch, given.lr_picture, autoencoder.factor)
        picture = autoencoder.decode(guess, lr_picture)
        # The distances are of small differences: bfloat16 would not see them.
        with torch.autocast(self.device.type, enabled=False):
            told = self.distance(picture.float(), real)
            total = told + self._fooling(picture.float(), real, lr_picture, state.progress.step)
        return Losses(total, told, t)

    def distance(self, picture: Tensor, real: Tensor) -> Tensor:
        """Weighted L1 and LPIPS (B,) between pictures (B, 3, H, W) in [-1, 1]."""
        distance = self.config.l1 * (picture - real).abs().mean(dim=(1, 2, 3))
        if self.lpips is not None:
            distance = distance + self.config.lpips * self.lpips(picture, real).flatten()
        return distance

    def _fooling(self, picture: Tensor, real: Tensor, lr_picture: Tensor, step: int) -> Tensor:
        if self.critic is None:
            return picture.new_zeros(len(picture))
        self.shown = real, picture.detach(), lr_picture
        weight = self.config.gan * min(1.0, step / max(self.config.gan_warmup, 1))
        return weight * self.critic.fooled(picture, lr_picture)

    def arrive(self, state: TrainState, batch: Batch, given: Given) -> tuple[Tensor, Tensor]:
        """Noisy latents (B, C, h, w) as sampling in a few steps brings them to t (B,), and t.

        The first expert steps from noise to t, or to a timestep in between, from where the expert
        before the trained one or the trained one itself goes on to t. Call without gradients.
        """
        model, factor = state.engine.module, state.autoencoder.factor
        cells = [side // factor for side in batch.hr.shape[-2:]]
        shape = torch.Size([model.config.latent_channels, *cells])
        t, noise = (x.to(batch.hr) for x in draw(batch.numbers, shape, self.config))
        middle, by_before, by_itself = self._detours(batch.numbers, t)
        one, way = torch.ones_like(t), torch.where(by_before | by_itself, middle, t)
        latent = euler_step(noise, self.first(noise, one, given.condition(self.first)), one, way)
        for other, chosen in ((self.before, by_before), (model, by_itself)):
            if other is not None and chosen.any():
                start, begin = latent[chosen], middle[chosen]
                v = other(start, begin, given.only(chosen).condition(other))
                latent[chosen] = euler_step(start, v, begin, t[chosen])
        # Weights that were cast here, without gradients, must not be found again later.
        torch.clear_autocast_cache()
        return latent, t

    def _detours(self, numbers: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For each pair (B,): a timestep above t, whether the expert before steps from there, and
        whether the trained one does."""
        rngs = (np.random.default_rng([self.config.seed, n, 3]) for n in numbers.tolist())
        u = torch.from_numpy(np.stack([rng.random(3, dtype=np.float32) for rng in rngs])).to(t)
        detour = u[:, 0] < self.config.detour
        by_before = detour & (u[:, 1] < (0.0 if self.before is None else 0.5))
        low = torch.where(by_before, self.between[0], t)
        high = torch.where(by_before, self.between[1], self.config.timesteps.high)
        return high - u[:, 2] * (high - low), by_before, detour & ~by_before

    def _cut(
        self, guess: Tensor, batch: Batch, lr_picture: Tensor, factor: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The part of latent, truth and LR picture that is judged: another one for each pair."""
        side, cells = self.config.crop, guess.shape[-2:]
        if side is None or side >= min(cells):
            return guess, batch.hr, lr_picture
        parts = []
        for i, number in enumerate(batch.numbers.tolist()):
            rng = np.random.default_rng([self.config.seed, number, 4])
            top, left = (int(rng.integers(n - side + 1)) for n in cells)
            parts.append(
                [
                    picture[i, :, top * f : (top + side) * f, left * f : (left + side) * f]
                    for picture, f in ((guess, 1), (batch.hr, factor), (lr_picture, factor))
                ]
            )
        latent, real, bicubic = (torch.stack(part) for part in zip(*parts, strict=True))
        return latent, real, bicubic

    def learn(self, state: TrainState, fraction: float) -> float:
        """The discriminator's step, on the pictures that `losses` has just judged."""
        if self.critic is None or self.shown is None:
            return 0.0
        loss = self.critic.step(*self.shown, state.engine, fraction)
        return state.engine.share(loss, 0.0)[0]

    def save(self, folder: Path) -> None:
        """The discriminator and its optimizer, in one file of tensors."""
        if self.critic is not None:
            torch.save(self.critic.state(), folder / DISCRIMINATOR)

    def load(self, folder: Path) -> None:
        """Tensors only. Raises WeightsError for a checkpoint without a discriminator like this."""
        if self.critic is not None:
            with as_weights_error(folder):
                path = folder / DISCRIMINATOR
                state = torch.load(path, weights_only=True, map_location=self.device)
                self.critic.restore(state)


def check(config: PerceptualConfig) -> None:
    """Raise MissingExtra or WeightsError, saying what to do, where the stage has no LPIPS."""
    _lpips(config)


def _lpips(config: PerceptualConfig) -> nn.Module | None:
    if not config.lpips:
        return None
    return lpips.load(None if config.trunk is None else Path(config.trunk), config.net)


def objective(
    model: ModelConfig,
    config: PerceptualConfig,
    expert: int,
    load: Callable[[int], LinearSR],
    engine: Engine,
) -> Perceptual:
    """Return the objective for `expert` (from 1 on) of a model.

    load: returns the weights that an expert has at the start of the stage. It is called for the
    experts that the objective keeps, one after the other: the first one and the one before
    `expert`. They are kept in the precision of the trained one.
    Raises MissingExtra or WeightsError if LPIPS or its weights are missing.
    """
    dtype = engine.module.embed.weight.dtype
    first = load(0).to(engine.device, dtype)
    before = load(expert - 1).to(engine.device, dtype) if expert > 1 else None
    between = ranges(model.sampling.boundaries)[expert - 1]
    return Perceptual(config, engine.device, first, before, between)
