"""One training stage: batches in, steps, EMA, a guard against divergence, reports out.

Plain torch. Knows nothing of Ray, files of photographs, or which expert it is training: it is
handed batches, a range of timesteps and a `report` function.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from linearsr.config import Config
from linearsr.denoiser import LinearSR
from linearsr.errors import LinearSRError
from linearsr.imaging.resample import resize
from linearsr.latent import Autoencoder
from linearsr.noise.path import add_noise, velocity
from linearsr.training.data import Batch


class Diverged(LinearSRError):
    """Loss or gradient stopped being finite; the last good state has been kept."""


class TimestepConfig(Config):
    """Which timesteps are trained: sigmoid(N(mean, spread)) kept to (low, high], some at t = 1."""

    mean: float = 0.5
    spread: float = 1.0
    at_one: float = Field(default=0.25, ge=0, le=1)
    low: float = 0.0
    high: float = 1.0


class TrainConfig(Config):
    """One stage of training."""

    steps: int = Field(gt=0)
    learning_rate: float = 1e-3
    warmup: int = 50
    # The share of the stage, at its end, over which the rate falls to zero.
    decay: float = 0.6
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float = 0.999
    timesteps: TimestepConfig = TimestepConfig()
    report_every: int = 50
    seed: int = 0
    # Compute in bfloat16 over float32 weights: for GPUs, and CPUs with AMX.
    bfloat16: bool = False
    compile: bool = False


class Report(NamedTuple):
    """What a stage tells its caller every `report_every` steps (means since the last one)."""

    step: int
    loss: float
    loss_at_one: float
    gradient_norm: float
    learning_rate: float
    images_per_second: float


@dataclass
class State:
    """Everything a stage needs to go on after an interruption."""

    model: LinearSR
    ema: LinearSR
    optimizer: torch.optim.AdamW
    generator: torch.Generator
    step: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0] * 4)


def start(model: LinearSR, config: TrainConfig) -> State:
    """A fresh state; `model` is trained in place, its EMA is a copy."""
    ema = copy.deepcopy(model).requires_grad_(False)
    generator = torch.Generator().manual_seed(config.seed)
    return State(model, ema, optimizer(model, config), generator)


def optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with a short second moment: small batches, and noise levels of unlike gradients."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        betas=(0.9, 0.99),
        fused=True,
    )


def learning_rate(step: int, config: TrainConfig) -> float:
    """Warm-up, plateau, then a straight line to zero over the last `decay` of the stage."""
    up = min(1.0, (step + 1) / max(config.warmup, 1))
    down = min(1.0, (config.steps - step) / max(config.decay * config.steps, 1))
    return config.learning_rate * min(up, down)


def draw_timesteps(n: int, config: TimestepConfig, generator: torch.Generator) -> Tensor:
    """n timesteps in (low, high] as `config` says; logit-normal inside by inverse sampling."""
    normal = torch.distributions.Normal(config.mean, config.spread)
    edges = torch.logit(torch.tensor([config.low, config.high], dtype=torch.float64), eps=1e-9)
    low, high = normal.cdf(edges.float())
    u = low + (high - low) * torch.rand(n, generator=generator)
    t = torch.sigmoid(normal.icdf(u.clamp(1e-6, 1 - 1e-6)))
    if config.high < 1:
        return t
    return torch.where(torch.rand(n, generator=generator) < config.at_one, 1.0, t)


def flow_loss(
    model: LinearSR, autoencoder: Autoencoder, batch: Batch, t: Tensor, generator: torch.Generator
) -> Tensor:
    """Conditional flow matching, per sample: mean |v_theta(z_t, t, LR) - (eps - z_0)|^2, (B,)."""
    with torch.no_grad():
        lr_picture = resize(batch.lr, *batch.hr.shape[-2:])
        clean = autoencoder.encode(batch.hr, lr_picture)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        latent = add_noise(clean, noise, t)
        joined = autoencoder.condition(lr_picture) if model.config.condition_latent else None
    v = model(latent, t, model.condition(lr_picture, joined))
    return (v - velocity(clean, noise)).square().mean(dim=(1, 2, 3))


def run(
    state: State,
    autoencoder: Autoencoder,
    batches: Iterator[Batch],
    config: TrainConfig,
    report: Callable[[State, Report], None],
) -> State:
    """Train from `state.step` to `config.steps`, calling `report` on the way and at the end.

    Raises Diverged before a step that is not finite is applied.
    """
    loss_of = torch.compile(flow_loss) if config.compile else flow_loss
    device = next(state.model.parameters()).device
    began, since = time.perf_counter(), state.step
    while state.step < config.steps:
        batch = Batch(*(side.to(device, non_blocking=True) for side in next(batches)))
        t = draw_timesteps(len(batch.hr), config.timesteps, state.generator).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bfloat16):
            losses = loss_of(state.model, autoencoder, batch, t, state.generator)
        _step(state, config, losses, t)
        if state.step % config.report_every == 0 or state.step == config.steps:
            seconds = time.perf_counter() - began
            speed = (state.step - since) * len(batch.hr) / seconds
            report(state, _summary(state, config, state.step - since, speed))
            began, since = time.perf_counter(), state.step
    return state


def _step(state: State, config: TrainConfig, losses: Tensor, t: Tensor) -> None:
    loss = losses.mean()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.clip)
    if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
        raise Diverged(f"step {state.step}: loss {loss.item()}, gradient norm {norm.item()}")
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(state.step, config)
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.step += 1
    _update_ema(state, config)
    at_one = losses.detach()[t == 1]
    for i, value in enumerate((loss.item(), norm.item(), at_one.sum().item(), len(at_one))):
        state.sums[i] += value


def _update_ema(state: State, config: TrainConfig) -> None:
    """Exponential moving average whose memory grows, so that the first weights are forgotten."""
    decay = min(config.ema, (1 + state.step) / (10 + state.step))
    with torch.no_grad():
        for ours, theirs in zip(state.ema.parameters(), state.model.parameters(), strict=True):
            ours.lerp_(theirs, 1 - decay)


def _summary(state: State, config: TrainConfig, steps: int, speed: float) -> Report:
    loss, norm, at_one, count = state.sums
    state.sums = [0.0] * 4
    rate = learning_rate(state.step - 1, config)
    return Report(state.step, loss / steps, at_one / max(count, 1), norm / steps, rate, speed)


def save(state: State, path: Path) -> None:
    """Write everything needed to go on, under a temporary name first."""
    payload: dict[str, Any] = {
        "model": state.model.state_dict(),
        "ema": state.ema.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "generator": state.generator.get_state(),
        "step": state.step,
    }
    temporary = path.with_suffix(".tmp")
    torch.save(payload, temporary)
    temporary.replace(path)


def restore(state: State, path: Path) -> None:
    """Put a saved stage back into a fresh `state` of the same shape."""
    device = next(state.model.parameters()).device
    payload = torch.load(path, weights_only=True, map_location=device)
    state.model.load_state_dict(payload["model"])
    state.ema.load_state_dict(payload["ema"])
    state.optimizer.load_state_dict(payload["optimizer"])
    state.generator.set_state(payload["generator"].cpu())
    state.step = payload["step"]
