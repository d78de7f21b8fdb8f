"""The perceptual objective: pictures that look like the truth, from where sampling starts them.

    noise ─ first expert ─▶ z_t ─ trained expert ─▶ clean latent ─ decode ─▶ L1, LPIPS, critic
            └─ at times one more step by another expert ─┘

The trained expert starts from a latent that sampling in a few steps would bring it: an Euler walk
by the frozen experts before it, to a random timestep of its own range. So its guess becomes good
enough to be the result, at any number of steps. Knows nothing of Ray, files or recipes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

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
from linearsr.training.loop import Conditions, Losses, Objective, TrainState, draw

DISCRIMINATOR = "discriminator.pt"


class Shown(NamedTuple):
    """Pictures (B, 3, H, W) in [-1, 1] that the discriminator judges: HR, generated, and LR."""

    real: Tensor
    fake: Tensor
    lr_picture: Tensor


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

    def fooled(self, picture: Tensor, lr_picture: Tensor, *, first: bool = True) -> Tensor:
        """Return the generator's loss (B,), with gradients to the picture alone.

        first: whether these are the first pictures of a step.
        """
        self._align(first)
        self.model.requires_grad_(False)
        loss = fooled(self.model(picture, lr_picture))
        self.model.requires_grad_(True)
        return loss

    def _align(self, first: bool) -> None:
        """Let all micro-batches of a step see the same weights.

        Each pass in training improves the estimates of the spectral norms, so a micro-batch after
        the first one begins with those that the first one began with.
        """
        if first:
            self.estimates = [estimate.clone() for estimate in self.model.buffers()]
        for estimate, start in zip(self.model.buffers(), self.estimates, strict=True):
            estimate.copy_(start)

    def step(self, shown: Sequence[Shown], engine: Engine, fraction: float) -> float:
        """Take one optimizer step on the mean gradient of all ranks; return this rank's loss.

        shown: the pictures of the step's micro-batches. Raises Diverged, on all ranks alike and
        before any weight changes, if the gradient is not finite.
        """
        total = 0.0
        for number, (real, fake, lr_picture) in enumerate(shown):
            self._align(number == 0)
            loss = hinge(self.model(real, lr_picture), self.model(fake, lr_picture)) / len(shown)
            loss.backward()
            total += loss.item()
        parameters = list(self.model.parameters())
        engine.average([p.grad for p in parameters if p.grad is not None])
        norm = nn.utils.clip_grad_norm_(parameters, self.config.clip).item()
        if not math.isfinite(norm):
            raise Diverged(f"the discriminator's gradient is not finite ({norm})")
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.discriminator_rate * fraction
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


class Perceptual(Objective):
    """The objective of a perceptual stage of one expert.

    first: the expert that starts from noise; it is frozen. before: the expert before the trained
    one, also frozen; None if that is the first. between: the (low, high] timesteps of `before`.
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
        self.shown: list[Shown] = []  # in this step so far

    def losses(self, state: TrainState, batch: Batch) -> Losses:
        """Return the losses: the weighted distances, and with the adversarial loss in `total`."""
        model, autoencoder = state.engine.module, state.autoencoder
        with torch.no_grad():
            conditions = Conditions.of(batch, model, autoencoder, state.encoder)
            latent, t = self.arrive(state, batch, conditions)
        guess = clean_guess(latent, model(latent, t, conditions.encode(model)), t)
        guess, real, lr_picture = self._cut(guess, batch, conditions.lr_picture, autoencoder.factor)
        picture = autoencoder.decode(guess, lr_picture)
        # The differences are small: bfloat16 would lose them.
        with torch.autocast(self.device.type, enabled=False):
            distance = self.distance(picture.float(), real)
            total = distance + self._fooling(picture.float(), real, lr_picture, state.progress.step)
        return Losses(total, distance, t)

    def distance(self, picture: Tensor, real: Tensor) -> Tensor:
        """Return weighted L1 plus LPIPS (B,) between pictures (B, 3, H, W) in [-1, 1]."""
        distance = self.config.l1 * (picture - real).abs().mean(dim=(1, 2, 3))
        if self.lpips is not None:
            distance = distance + self.config.lpips * self.lpips(picture, real).flatten()
        return distance

    def _fooling(self, picture: Tensor, real: Tensor, lr_picture: Tensor, step: int) -> Tensor:
        if self.critic is None:
            return picture.new_zeros(len(picture))
        fooling = self.critic.fooled(picture, lr_picture, first=not self.shown)
        self.shown.append(Shown(real, picture.detach(), lr_picture))
        return self.config.gan * min(1.0, step / max(self.config.gan_warmup, 1)) * fooling

    def arrive(
        self, state: TrainState, batch: Batch, conditions: Conditions
    ) -> tuple[Tensor, Tensor]:
        """Return latents (B, C, h, w) that sampling in a few steps brings to t (B,), and t.

        The first expert steps from noise to t. For some pairs it stops on the way, and the expert
        before the trained one, or the trained one itself, steps on to t. Call it without gradients.
        """
        model, factor = state.engine.module, state.autoencoder.factor
        cells = [side // factor for side in batch.hr.shape[-2:]]
        shape = torch.Size([model.config.latent_channels, *cells])
        t, noise = (x.to(batch.hr) for x in draw(batch.numbers, shape, self.config))
        middle, by_before, by_itself = self._detours(batch.numbers, t)
        one, way = torch.ones_like(t), torch.where(by_before | by_itself, middle, t)
        latent = euler_step(noise, self.first(noise, one, conditions.encode(self.first)), one, way)
        for other, chosen in ((self.before, by_before), (model, by_itself)):
            if other is not None and chosen.any():
                start, begin = latent[chosen], middle[chosen]
                v = other(start, begin, conditions.only(chosen).encode(other))
                latent[chosen] = euler_step(start, v, begin, t[chosen])
        # Weights that were cast here, without gradients, must not be reused with gradients.
        torch.clear_autocast_cache()
        return latent, t

    def _detours(self, numbers: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return a timestep above t for each pair (B,), and two masks (B,) of the pairs that step
        on from there by the expert before, or by the trained one; the others have no detour."""
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
        """Crop the latent, the HR picture and the LR picture to the part that the losses compare.

        The crop lies at a random place for each pair. All three stay whole if `config.crop` is None
        or not less than the latent's shorter side.
        """
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
        """Take the discriminator's step on the pictures since the last one; return its loss."""
        if self.critic is None:
            return 0.0
        loss = self.critic.step(self.shown, state.engine, fraction)
        self.shown.clear()
        return state.engine.share(loss, 0.0)[0]

    def save(self, folder: Path) -> None:
        """Write the discriminator and its optimizer into one file of tensors."""
        if self.critic is not None:
            model, optimizer = self.critic.model.state_dict(), self.critic.optimizer.state_dict()
            torch.save({"model": model, "optimizer": optimizer}, folder / DISCRIMINATOR)

    def load(self, folder: Path) -> None:
        """Read the discriminator and its optimizer; only tensors are unpickled.

        Raises WeightsError if the checkpoint has no discriminator, or one of other shapes.
        """
        if self.critic is not None:
            with as_weights_error(folder):
                path = folder / DISCRIMINATOR
                state = torch.load(path, weights_only=True, map_location=self.device)
                self.critic.model.load_state_dict(state["model"])
                self.critic.optimizer.load_state_dict(state["optimizer"])


def check(config: PerceptualConfig) -> None:
    """Raise MissingExtra or WeightsError, saying what to do, if LPIPS or its weights are absent."""
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
