"""The divergence guard: three signals are watched, and a stage that blows up is stopped.

Plain Python: knows nothing of tensors, ranks or checkpoints. What happens after `Diverged` (go back
to the knee, lower the rate) is the caller's business.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import NamedTuple

from pydantic import Field

from linearsr.config import Config
from linearsr.errors import LinearSRError


class Diverged(LinearSRError):
    """A stage has blown up or is no longer finite; it must go back to an earlier checkpoint."""


class GuardConfig(Config):
    """When a stage counts as diverged, and how it is restarted.

    A signal has blown up when the median of its last `window` values exceeds `factor` times the
    smallest such median so far. Losses vary little once trained, gradients and activations more.
    """

    window: int = Field(default=10, ge=1)
    """Number of steps that a median is taken over."""
    loss_factor: float = Field(default=5.0, gt=1)
    """Largest allowed ratio of the loss's median to its smallest median so far."""
    gradient_factor: float = Field(default=100.0, gt=1)
    """The same for the gradient norm."""
    activation_factor: float = Field(default=30.0, gt=1)
    """The same for the largest activation."""
    slow_down: float = Field(default=0.3, gt=0, lt=1)
    """Factor of the learning rate after each divergence."""
    restarts: int = Field(default=3, ge=0)
    """How many times a diverged stage is restarted before it fails."""


class Signals(NamedTuple):
    """One step's mean loss, gradient norm before clipping, and largest |activation|."""

    loss: float
    gradient: float
    activation: float


class _Watch:
    """One signal, compared with its own calmest stretch."""

    def __init__(self, window: int, factor: float) -> None:
        self.recent: deque[float] = deque(maxlen=window)
        self.factor = factor
        self.calmest = math.inf

    def blown_up(self, value: float) -> bool:
        self.recent.append(value)
        # The first value was seen before any update: it is calm by definition.
        typical = median(self.recent) if len(self.recent) == self.recent.maxlen else self.recent[0]
        self.calmest = min(self.calmest, typical)
        return typical > self.factor * self.calmest


class Guard:
    """Checks the signals of every step; with equal signals, all ranks raise Diverged alike."""

    def __init__(self, config: GuardConfig) -> None:
        factors = (config.loss_factor, config.gradient_factor, config.activation_factor)
        self.watches = [_Watch(config.window, factor) for factor in factors]

    def check(self, step: int, signals: Signals) -> None:
        """Raise Diverged, naming the signal, if one has blown up or is not finite."""
        check_finite(step, signals)
        for name, watch, value in zip(Signals._fields, self.watches, signals, strict=True):
            if watch.blown_up(value):
                raise Diverged(
                    f"step {step}: the running median of the {name} is over {watch.factor:g} times "
                    f"its minimum so far, {watch.calmest:.3g} (last value {value:.3g})"
                )


def check_finite(step: int, signals: Signals) -> None:
    """Raise Diverged if a signal is NaN or infinite."""
    if not all(map(math.isfinite, signals)):
        values = ", ".join(f"{k} {v:.3g}" for k, v in signals._asdict().items())
        raise Diverged(f"step {step}: not finite ({values})")
