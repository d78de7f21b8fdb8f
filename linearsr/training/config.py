"""What one stage of training is made of: timesteps, rates, lengths, the guard. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from linearsr.config import Config
from linearsr.training.guard import GuardConfig


class TimestepConfig(Config):
    """Which timesteps are trained: sigmoid(N(mean, spread)) kept to (low, high], some at t = 1."""

    mean: float = 0.5
    """Of the normal distribution, before the sigmoid."""
    spread: float = Field(default=1.0, gt=0)
    """Its standard deviation."""
    at_one: float = Field(default=0.25, ge=0, le=1)
    """The share of pairs at t = 1, pure noise, if the range ends there."""
    low: float = Field(default=0.0, ge=0, lt=1)
    """The range starts above this timestep."""
    high: float = Field(default=1.0, gt=0, le=1)
    """The range ends with this timestep."""

    @model_validator(mode="after")
    def _range(self) -> TimestepConfig:
        if self.low >= self.high:
            raise ValueError(f"low {self.low} must lie below high {self.high}")
        return self


class TrainConfig(Config):
    """One stage of training."""

    steps: int = Field(gt=0)
    """Optimizer steps, each of one global batch."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Of AdamW, after the warm-up."""
    warmup: int = Field(default=50, ge=0)
    """Steps over which the rate rises from zero."""
    decay: float = Field(default=0.6, ge=0, le=1)
    """The share of the stage, at its end, over which the rate falls to zero."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Of AdamW."""
    clip: float = Field(default=1.0, gt=0)
    """The gradient's norm is clipped to this."""
    ema: float = Field(default=0.999, ge=0, lt=1)
    """Of the averaged weights, which are validated and exported."""
    timesteps: TimestepConfig = TimestepConfig()
    pixel_weight: float = Field(default=0.0, ge=0)
    """Weight of the L1 between the decoded guess and the true picture at high SNR, for fidelity."""
    pixel_below: float = Field(default=0.223, gt=0, le=1)
    """The timestep up to which pixel_weight counts."""
    guard: GuardConfig = GuardConfig()
    report_every: int = Field(default=50, gt=0)
    """Steps between two reports of loss, gradient norm and rate."""
    checkpoint_every: int = Field(default=250, gt=0)
    """A multiple of report_every; each checkpoint is also validated."""
    seed: int = Field(default=0, ge=0)
    """Of crops, timesteps and noise."""
    bfloat16: bool | Literal["auto"] = "auto"
    """Compute in bfloat16 over float32 weights; "auto" where every worker's processor multiplies it
    in hardware: GPUs, and CPUs with AMX or AVX512-BF16."""

    @model_validator(mode="after")
    def _checkpoints_are_reports(self) -> TrainConfig:
        if self.checkpoint_every % self.report_every:
            raise ValueError(
                f"checkpoint_every {self.checkpoint_every} must be a multiple of report_every "
                f"{self.report_every}"
            )
        return self
