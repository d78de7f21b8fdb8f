"""The training loop of one stage: batches in, steps, EMA, a guard against divergence, reports out.

Plain torch. Knows nothing of Ray, files of photographs, or which expert it trains: it gets batches,
a range of timesteps and a `report` function. All randomness of a step comes from the stage's seed
and the numbers of its pairs, so a stage continues the same after a restart and does the same on one
rank as on several.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from linearsr.denoiser import LinearSR
from linearsr.denoiser.model import Condition
from linearsr.diffusion.path import add_noise, velocity
from linearsr.errors import WeightsError
from linearsr.imaging.resample import resize
from linearsr.latent import Autoencoder
from linearsr.tags.encoder import TagEncoder
from linearsr.training.config import TimestepConfig, TrainConfig
from linearsr.training.data import Batch
from linearsr.training.ema import EMA
from linearsr.training.engine import Engine
from linearsr.training.guard import Diverged, Guard, Signals, check_finite
from linearsr.training.lora import Origin

PROGRESS = "progress.json"


class Report(NamedTuple):
    """Means over the steps since the last report; there is one every `report_every` steps.

    loss_at_one: loss of the pairs at t = 1, 0 if there were none.
    activation: largest |activation|, not a mean.
    discriminator: loss of the discriminator, 0 in stages without one.
    """

    step: int
    loss: float
    loss_at_one: float
    gradient_norm: float
    activation: float
    learning_rate: float
    images_per_second: float
    discriminator: float = 0.0


@dataclass
class Progress:
    """The progress of a stage: all that it needs to continue, besides engine's and EMA's tensors.

    seen: number of pairs used, over all attempts; also the number of the next pair.
    attempt: number of restarts after a divergence; each lowers the learning rate.
    world: number of ranks.
    minutes: time spent in training, over all attempts and restarts.
    """

    step: int = 0
    seen: int = 0
    attempt: int = 0
    world: int = 1
    minutes: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


class Losses(NamedTuple):
    """Losses of a batch of B pairs.

    total: (B,); their mean is minimised. reported: (B,), the part of `total` that is reported and
    guarded, never negative. t: (B,), the pairs' timesteps.
    """

    total: Tensor
    reported: Tensor
    t: Tensor


class Objective:
    """The objective that a stage minimises, and the auxiliary network that it may train for this.

    This one is that of most stages: `flow_loss`, without an auxiliary network.
    """

    def losses(self, state: TrainState, batch: Batch) -> Losses:
        """Return the losses of this rank's part of a global batch, in the engine's precision."""
        model, autoencoder = state.engine.module, state.autoencoder
        losses, t = flow_loss(model, autoencoder, batch, state.config, state.encoder)
        return Losses(losses, losses, t)

    def learn(self, state: TrainState, fraction: float) -> float:  # noqa: ARG002
        """Train the auxiliary network for a step, after the model's own; return its loss, or 0.

        fraction: learning rate of the step as a fraction of the config's. Raises Diverged, on all
        ranks alike.
        """
        return 0.0

    def save(self, folder: Path) -> None:
        """Write the auxiliary network's state; only the first rank calls it."""

    def load(self, folder: Path) -> None:
        """Read the auxiliary network's state, on every rank. Raises WeightsError."""


@dataclass
class TrainState:
    """A training stage while it runs: its engine, its average and its progress.

    clock: returns seconds since any fixed moment; the stage counts its minutes by it.
    """

    engine: Engine
    autoencoder: Autoencoder
    config: TrainConfig
    ema: EMA
    guard: Guard
    progress: Progress
    encoder: TagEncoder | None = None
    objective: Objective = field(default_factory=Objective)
    clock: Callable[[], float] = time.monotonic

    @classmethod
    def start(
        cls,
        engine: Engine,
        autoencoder: Autoencoder,
        config: TrainConfig,
        encoder: TagEncoder | None = None,
        objective: Objective | None = None,
        origin: Origin | None = None,
    ) -> TrainState:
        """Return the state before the first step, with the weights that `engine` holds.

        encoder: the tag encoder of a model that takes tags (`linearsr.tags.encoder.tag_encoder`).
        objective: flow matching by default. origin: see `EMA`.
        """
        ema = EMA(engine.module, config.ema, engine.rank, engine.world, origin)
        guard, progress = Guard(config.guard), Progress(world=engine.world)
        objective = objective or Objective()
        return cls(engine, autoencoder, config, ema, guard, progress, encoder, objective)

    @property
    def finished(self) -> bool:
        """Return whether the steps or the minutes of the stage are spent."""
        spent = self.config.minutes is not None and self.progress.minutes >= self.config.minutes
        return spent or self.progress.step >= self.config.steps

    def save(self, folder: Path) -> None:
        """Write this rank's part of a checkpoint; call it on all ranks alike.

        Raises Diverged, and writes nothing, if a weight is not finite.
        """
        finite = all(torch.isfinite(p).all().item() for p in self.engine.module.parameters())
        bad, _ = self.engine.share(float(not finite), 0.0)
        if bad:
            raise Diverged(f"step {self.progress.step}: weights are not finite; nothing was saved")
        self.engine.save(folder)
        self.ema.save(folder)
        if self.engine.rank == 0:
            self.objective.save(folder)
            (folder / PROGRESS).write_text(json.dumps(asdict(self.progress)))

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint folder. Raises WeightsError if it does not fit."""
        self.progress = read_progress(folder)
        self.ema.check(folder)
        self.engine.load(folder)
        self.ema.load(folder)
        self.objective.load(folder)
        self.progress.world = self.engine.world


def read_progress(folder: Path) -> Progress:
    """Read the progress of a checkpoint folder. Raises WeightsError if it is not one."""
    try:
        return Progress(**json.loads((folder / PROGRESS).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise WeightsError(f"{folder}: not a checkpoint of a training stage ({error})") from error


def learning_rate(step: int, config: TrainConfig, attempt: int = 0, minutes: float = 0.0) -> float:
    """Return the learning rate: warm-up, plateau, then a line to zero over the last `decay`.

    The stage's progress is that of its steps or its minutes, whichever is further. Each restart
    after a divergence lowers the whole schedule.
    """
    up = min(1.0, (step + 1) / max(config.warmup, 1))
    used = max(float(step), config.steps * min(1.0, minutes / (config.minutes or math.inf)))
    down = min(1.0, (config.steps - used) / max(config.decay * config.steps, 1))
    return config.learning_rate * config.guard.slow_down**attempt * min(up, down)


def draw_timesteps(uniforms: Tensor, config: TimestepConfig) -> Tensor:
    """Return timesteps (B,) in (low, high] from `uniforms` (B, 2) in [0, 1), logit-normal."""
    normal = torch.distributions.Normal(config.mean, config.spread)
    edges = torch.logit(torch.tensor([config.low, config.high], dtype=torch.float64), eps=1e-9)
    low, high = normal.cdf(edges.float())
    u = low + (high - low) * uniforms[:, 0]
    t = torch.sigmoid(normal.icdf(u.clamp(1e-6, 1 - 1e-6)))
    if config.high < 1:
        return t
    return torch.where(uniforms[:, 1] < config.at_one, 1.0, t)


def draw(numbers: Tensor, shape: torch.Size, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Return timesteps (B,) and noise (B, *shape) of the pairs with these numbers, on the CPU."""
    uniforms, noise = [], []
    for number in numbers.tolist():
        rng = np.random.default_rng([config.seed, number, 1])
        uniforms.append(rng.random(2, dtype=np.float32))
        noise.append(rng.standard_normal(shape, dtype=np.float32))
    t = draw_timesteps(torch.from_numpy(np.stack(uniforms)), config.timesteps)
    return t, torch.from_numpy(np.stack(noise))


class Conditions(NamedTuple):
    """The inputs of a denoiser besides the noisy latent, for a batch of B pairs.

    lr_picture: (B, 3, H, W), LR at HR's size. joined: its latent, for models that take it.
    tags, mask: embeddings (B, T, tag_dim) and which of them are real, for models that take tags.
    """

    lr_picture: Tensor
    joined: Tensor | None
    tags: Tensor | None
    mask: Tensor | None

    @classmethod
    def of(
        cls, batch: Batch, model: LinearSR, autoencoder: Autoencoder, encoder: TagEncoder | None
    ) -> Conditions:
        """Return the conditions of all pairs of the batch; call it without gradients."""
        stored = batch.stored
        if stored is None:
            lr_picture = resize(batch.lr, *batch.hr.shape[-2:])
            joined = autoencoder.condition(lr_picture) if model.config.condition_latent else None
        else:
            sides = (cells * autoencoder.factor for cells in stored.clean.shape[-2:])
            lr_picture, joined = resize(batch.lr, *sides), stored.condition
        if encoder is None:
            return cls(lr_picture, joined, None, None)
        if stored is not None and stored.tags is not None:
            embeddings, mask = stored.tags
        else:
            # Encoded even if no pair has a tag: all ranks must use the same parameters.
            embeddings, mask = encoder(batch.tags or [()] * len(batch.numbers))
        tags = embeddings.to(batch.lr.device, model.embed.weight.dtype)
        return cls(lr_picture, joined, tags, mask.to(batch.lr.device))

    def only(self, chosen: Tensor) -> Conditions:
        """Return the conditions of the pairs that the mask `chosen` (B,) keeps."""
        return Conditions(*(None if part is None else part[chosen] for part in self))  # type: ignore[arg-type]

    def encode(self, model: LinearSR) -> Condition:
        """Return the condition in the form that `model` takes."""
        picture = self.lr_picture.to(model.embed.weight.dtype)
        return model.condition(picture, self.joined, self.tags, self.mask)


def flow_loss(
    model: LinearSR,
    autoencoder: Autoencoder,
    batch: Batch,
    config: TrainConfig,
    encoder: TagEncoder | None = None,
) -> tuple[Tensor, Tensor]:
    """Return losses (B,) of conditional flow matching, and the timesteps (B,).

    The loss of a pair is the mean of |v_theta(z_t, t, LR) - (eps - z_0)|^2. With
    `config.pixel_weight`, the L1 distance of the decoded guess z_t - t v to the HR picture is added
    where t <= `config.pixel_below`. With an `encoder`, the tags of the batch guide the model. What
    the batch has stored is not computed again.
    """
    device = batch.lr.device
    with torch.no_grad():
        conditions = Conditions.of(batch, model, autoencoder, encoder)
        lr_picture = conditions.lr_picture
        stored = batch.stored
        clean = autoencoder.encode(batch.hr, lr_picture) if stored is None else stored.clean
        t, noise = (x.to(device) for x in draw(batch.numbers, clean.shape[1:], config))
        latent = add_noise(clean, noise, t)
    v = model(latent, t, conditions.encode(model))
    losses = (v - velocity(clean, noise)).square().mean(dim=(1, 2, 3))
    near = t <= config.pixel_below
    if config.pixel_weight and near.any():
        guess = autoencoder.decode((latent - t.view(-1, 1, 1, 1) * v)[near], lr_picture[near])
        distance = (guess - batch.hr[near]).abs().mean(dim=(1, 2, 3))
        losses = losses.index_add(0, near.nonzero()[:, 0], config.pixel_weight * distance)
    return losses, t


class _Largest:
    """Hook that records the largest |activation| that leaves the last block in trained passes."""

    def __init__(self, model: LinearSR) -> None:
        self.values: list[Tensor] = []
        self.hook = model.blocks[-1].register_forward_hook(self._note)

    def _note(self, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        if torch.is_grad_enabled():
            self.values.append(output.detach().abs().amax())

    def take(self) -> float:
        """Return the largest value since the last call; NaN if one was NaN."""
        largest = torch.stack(self.values).amax().item()
        self.values.clear()
        return largest


class _Sums:
    """Sums over the steps between two reports."""

    def __init__(self) -> None:
        self.began, self.steps, self.images = time.perf_counter(), 0, 0
        self.loss = self.gradient = self.at_one = self.discriminator = 0.0
        self.activation, self.at_one_count = 0.0, 0

    def add(self, signals: Signals, losses: Losses, discriminator: float, world: int) -> None:
        t = losses.t
        self.steps += 1
        self.images += len(t) * world
        self.discriminator += discriminator
        self.loss += signals.loss
        self.gradient += signals.gradient
        self.activation = max(self.activation, signals.activation)
        at_one = losses.reported.detach()[t == 1]
        self.at_one += at_one.sum().item()
        self.at_one_count += len(at_one)

    def report(self, step: int, rate: float) -> Report:
        n, speed = self.steps, self.images / (time.perf_counter() - self.began)
        at_one = self.at_one / max(self.at_one_count, 1)
        means = self.loss / n, at_one, self.gradient / n
        return Report(step, *means, self.activation, rate, speed, self.discriminator / n)


def run(
    state: TrainState, batches: Iterator[Batch], report: Callable[[TrainState, Report], bool | None]
) -> TrainState:
    """Train until the stage has finished; call `report` every `report_every` steps and at the end.

    batches: this rank's part of each global batch, in order. report: may return True to end the
    stage early. Raises Diverged when the guard fires: before the weights change if a signal is not
    finite, after it if one has grown too much. Raises ValueError if a part cannot be split into
    `config.accumulation` micro-batches (`DataConfig.micro_batch` tells).
    """
    config, progress = state.config, state.progress
    largest, sums = _Largest(state.engine.module), _Sums()
    minutes, began = progress.minutes, state.clock()
    try:
        while not state.finished:
            rate = learning_rate(progress.step, config, progress.attempt, progress.minutes)
            sums.add(*_step(state, next(batches), largest, rate), state.engine.world)
            progress.minutes = minutes + (state.clock() - began) / 60
            if config.minutes is not None:  # all ranks must end together
                _, progress.minutes = state.engine.share(0.0, progress.minutes)
            if progress.step % config.report_every == 0 or state.finished:
                summary = sums.report(progress.step, rate)
                progress.history.append(dict(summary._asdict(), attempt=progress.attempt))
                if report(state, summary):
                    break
                sums = _Sums()
    finally:
        largest.hook.remove()
    return state


def _step(
    state: TrainState, batch: Batch, largest: _Largest, rate: float
) -> tuple[Signals, Losses, float]:
    engine, config, progress = state.engine, state.config, state.progress
    progress.seen += len(batch.numbers) * engine.world
    losses = _accumulate(state, batch.to(engine.device))
    mean, peak = engine.share(losses.reported.mean().item(), largest.take())
    check_finite(progress.step, Signals(mean, 0.0, peak))
    signals = Signals(mean, engine.step(rate), peak)
    state.guard.check(progress.step, signals)
    beside = state.objective.learn(state, rate / config.learning_rate)
    progress.step += 1
    state.ema.update(progress.step)
    return signals, losses, beside


def _accumulate(state: TrainState, batch: Batch) -> Losses:
    """Add up the gradients of a batch, one micro-batch after the other; return its losses."""
    engine, parts = state.engine, batch.split(state.config.accumulation)
    done = []
    for number, part in enumerate(parts, 1):
        with engine.precision():
            losses = state.objective.losses(state, part)
        engine.backward(losses.total.mean() / len(parts), last=number == len(parts))
        done.append([each.detach() for each in losses])
    return Losses(*(torch.cat(each) for each in zip(*done, strict=True)))
