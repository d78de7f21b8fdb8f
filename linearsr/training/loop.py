"""One training stage: batches in, steps, EMA, a guard against divergence, reports out.

Plain torch. Knows nothing of Ray, files of photographs, or which expert it is training: it is
handed batches, a range of timesteps and a `report` function. All randomness of a step comes from
the stage's seed and the numbers of its pairs, so a stage continues the same after a restart and
does the same on one rank as on several.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from linearsr.denoiser import LinearSR
from linearsr.errors import WeightsError
from linearsr.imaging.resample import resize
from linearsr.latent import Autoencoder
from linearsr.noise.path import add_noise, velocity
from linearsr.tags.encoder import TagEncoder
from linearsr.training.config import TimestepConfig, TrainConfig
from linearsr.training.data import Batch
from linearsr.training.ema import EMA
from linearsr.training.engine import Engine
from linearsr.training.guard import Diverged, Guard, Signals, check_finite

PROGRESS = "progress.json"


class Report(NamedTuple):
    """What a stage tells its caller every `report_every` steps (means since the last one)."""

    step: int
    loss: float
    loss_at_one: float
    gradient_norm: float
    activation: float
    learning_rate: float
    images_per_second: float


@dataclass
class Progress:
    """Where a stage stands; with the tensors of engine and EMA, all it needs to go on.

    seen: pairs consumed, over all attempts: the number of the next one.
    attempt: how often the guard has sent the stage back; the rate falls with each.
    """

    step: int = 0
    seen: int = 0
    attempt: int = 0
    world: int = 1
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Stage:
    """A stage under way: what steps, what is averaged, what is done."""

    engine: Engine
    autoencoder: Autoencoder
    config: TrainConfig
    ema: EMA
    guard: Guard
    progress: Progress
    encoder: TagEncoder | None = None

    @classmethod
    def start(
        cls,
        engine: Engine,
        autoencoder: Autoencoder,
        config: TrainConfig,
        encoder: TagEncoder | None = None,
    ) -> Stage:
        """A stage at its first step, from the weights that `engine` holds.

        encoder: of a model that takes tags (`linearsr.tags.encoder.tag_encoder`).
        """
        ema = EMA(engine.module, config.ema, engine.rank, engine.world)
        guard, progress = Guard(config.guard), Progress(world=engine.world)
        return cls(engine, autoencoder, config, ema, guard, progress, encoder)

    def save(self, folder: Path) -> None:
        """Write this rank's share of a checkpoint; call on all ranks alike.

        Raises Diverged, and writes nothing, when a weight is not finite.
        """
        finite = all(torch.isfinite(p).all().item() for p in self.engine.module.parameters())
        bad, _ = self.engine.share(float(not finite), 0.0)
        if bad:
            raise Diverged(f"step {self.progress.step}: weights are not finite; nothing was saved")
        self.engine.save(folder)
        self.ema.save(folder)
        if self.engine.rank == 0:
            (folder / PROGRESS).write_text(json.dumps(asdict(self.progress)))

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint folder. Raises WeightsError if it does not fit."""
        self.progress = read_progress(folder)
        self.engine.load(folder)
        self.ema.load(folder)
        self.progress.world = self.engine.world


def read_progress(folder: Path) -> Progress:
    """The progress of a checkpoint folder. Raises WeightsError when it is not one."""
    try:
        return Progress(**json.loads((folder / PROGRESS).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise WeightsError(f"{folder}: not a checkpoint of a training stage: {error}") from error


def learning_rate(step: int, config: TrainConfig, attempt: int = 0) -> float:
    """Warm-up, plateau, then a straight line to zero over the last `decay` of the stage.

    Each restart after a divergence lowers all of it.
    """
    up = min(1.0, (step + 1) / max(config.warmup, 1))
    down = min(1.0, (config.steps - step) / max(config.decay * config.steps, 1))
    return config.learning_rate * config.guard.slow_down**attempt * min(up, down)


def draw_timesteps(uniforms: Tensor, config: TimestepConfig) -> Tensor:
    """Timesteps (B,) in (low, high] from `uniforms` (B, 2) in [0, 1): logit-normal by inversion."""
    normal = torch.distributions.Normal(config.mean, config.spread)
    edges = torch.logit(torch.tensor([config.low, config.high], dtype=torch.float64), eps=1e-9)
    low, high = normal.cdf(edges.float())
    u = low + (high - low) * uniforms[:, 0]
    t = torch.sigmoid(normal.icdf(u.clamp(1e-6, 1 - 1e-6)))
    if config.high < 1:
        return t
    return torch.where(uniforms[:, 1] < config.at_one, 1.0, t)


def draw(numbers: Tensor, shape: torch.Size, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Timesteps (B,) and noise (B, *shape) of the pairs with these numbers, on the CPU."""
    uniforms, noise = [], []
    for number in numbers.tolist():
        rng = np.random.default_rng([config.seed, number, 1])
        uniforms.append(rng.random(2, dtype=np.float32))
        noise.append(rng.standard_normal(shape, dtype=np.float32))
    t = draw_timesteps(torch.from_numpy(np.stack(uniforms)), config.timesteps)
    return t, torch.from_numpy(np.stack(noise))


def flow_loss(
    model: LinearSR,
    autoencoder: Autoencoder,
    batch: Batch,
    config: TrainConfig,
    encoder: TagEncoder | None = None,
) -> tuple[Tensor, Tensor]:
    """Conditional flow matching: (B,) losses mean |v_theta(z_t, t, LR) - (eps - z_0)|^2, and t.

    With `config.pixel_weight`, plus the L1 distance of the decoded guess z_t - t v to the HR
    picture where t <= `config.pixel_below`. An `encoder` has the tags of the batch guide the model.
    """
    device, dtype = batch.hr.device, model.embed.weight.dtype
    with torch.no_grad():
        lr_picture = resize(batch.lr, *batch.hr.shape[-2:])
        clean = autoencoder.encode(batch.hr, lr_picture)
        t, noise = (x.to(device) for x in draw(batch.numbers, clean.shape[1:], config))
        latent = add_noise(clean, noise, t)
        joined = autoencoder.condition(lr_picture) if model.config.condition_latent else None
        tags, mask = _encoded(batch, encoder, dtype)
    v = model(latent, t, model.condition(lr_picture.to(dtype), joined, tags, mask))
    losses = (v - velocity(clean, noise)).square().mean(dim=(1, 2, 3))
    near = t <= config.pixel_below
    if config.pixel_weight and near.any():
        guess = autoencoder.decode((latent - t.view(-1, 1, 1, 1) * v)[near], lr_picture[near])
        distance = (guess - batch.hr[near]).abs().mean(dim=(1, 2, 3))
        losses = losses.index_add(0, near.nonzero()[:, 0], config.pixel_weight * distance)
    return losses, t


def _encoded(
    batch: Batch, encoder: TagEncoder | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Embeddings and mask, even if no pair has a tag: all ranks must use the same parameters."""
    if encoder is None:
        return None, None
    embeddings, mask = encoder(batch.tags or [()] * len(batch.numbers))
    return embeddings.to(batch.hr.device, dtype), mask.to(batch.hr.device)


class _Largest:
    """The largest |activation| that leaves the last block, noted on the way through."""

    def __init__(self, model: LinearSR) -> None:
        self.value = torch.zeros(())
        self.hook = model.blocks[-1].register_forward_hook(self._note)

    def _note(self, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        self.value = output.detach().abs().amax()


class _Sums:
    """Running sums between two reports."""

    def __init__(self) -> None:
        self.began, self.steps, self.images = time.perf_counter(), 0, 0
        self.loss = self.gradient = self.at_one = 0.0
        self.activation, self.at_one_count = 0.0, 0

    def add(self, signals: Signals, losses: Tensor, t: Tensor, world: int) -> None:
        self.steps += 1
        self.images += len(t) * world
        self.loss += signals.loss
        self.gradient += signals.gradient
        self.activation = max(self.activation, signals.activation)
        at_one = losses.detach()[t == 1]
        self.at_one += at_one.sum().item()
        self.at_one_count += len(at_one)

    def report(self, step: int, rate: float) -> Report:
        n, speed = self.steps, self.images / (time.perf_counter() - self.began)
        at_one = self.at_one / max(self.at_one_count, 1)
        return Report(step, self.loss / n, at_one, self.gradient / n, self.activation, rate, speed)


def run(
    stage: Stage, batches: Iterator[Batch], report: Callable[[Stage, Report], bool | None]
) -> Stage:
    """Train to `config.steps`, calling `report` every `report_every` steps and at the end.

    `batches`: this rank's part of each global batch, in order. `report` may return True to end the
    stage early. Raises Diverged when the guard fires: before the weights change for what is not
    finite, after it for what has merely grown.
    """
    config, progress = stage.config, stage.progress
    largest, sums = _Largest(stage.engine.module), _Sums()
    try:
        while progress.step < config.steps:
            signals, losses, t = _step(stage, next(batches), largest)
            sums.add(signals, losses, t, stage.engine.world)
            if progress.step % config.report_every == 0 or progress.step == config.steps:
                rate = learning_rate(progress.step - 1, config, progress.attempt)
                summary = sums.report(progress.step, rate)
                progress.history.append(dict(summary._asdict(), attempt=progress.attempt))
                if report(stage, summary):
                    break
                sums = _Sums()
    finally:
        largest.hook.remove()
    return stage


def _step(stage: Stage, batch: Batch, largest: _Largest) -> tuple[Signals, Tensor, Tensor]:
    engine, config, progress = stage.engine, stage.config, stage.progress
    progress.seen += len(batch.numbers) * engine.world
    batch = batch._replace(
        hr=batch.hr.to(engine.device, non_blocking=True),
        lr=batch.lr.to(engine.device, non_blocking=True),
    )
    with engine.precision():
        losses, t = flow_loss(engine.module, stage.autoencoder, batch, config, stage.encoder)
    loss = losses.mean()
    mean, peak = engine.share(loss.item(), largest.value.item())
    check_finite(progress.step, Signals(mean, 0.0, peak))
    rate = learning_rate(progress.step, config, progress.attempt)
    signals = Signals(mean, engine.step(loss, rate), peak)
    stage.guard.check(progress.step, signals)
    progress.step += 1
    stage.ema.update(progress.step)
    return signals, losses, t
