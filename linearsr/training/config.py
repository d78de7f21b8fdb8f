"""What one stage of training is made of: timesteps, rates, lengths, the guard. Imports no torch."""

from __future__ import annotations

from pydantic import Field, model_validator

from linearsr.config import Config
from linearsr.training.guard import GuardConfig


class TimestepConfig(Config):
    """Which timesteps are trained: sigmoid(N(mean, spread)) kept to (low, high], some at t = 1."""

    mean: float = 0.5
    spread: float = Field(default=1.0, gt=0)
    at_one: float = Field(default=0.25, ge=0, le=1)
    low: float = Field(default=0.0, ge=0, lt=1)
    high: float = Field(default=1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _range(self) -> TimestepConfig:
        if self.low >= self.high:
            raise ValueError(f"low {self.low} must lie below high {self.high}")
        return self


class TrainConfig(Config):
    """One stage of training."""

    steps: int = Field(gt=0)
    learning_rate: float = Field(default=1e-3, gt=0)
    warmup: int = Field(default=50, ge=0)
    # The share of the stage, at its end, over which the rate falls to zero.
    decay: float = Field(default=0.6, ge=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0)
    ema: float = Field(default=0.999, ge=0, lt=1)
    timesteps: TimestepConfig = TimestepConfig()
    # L1 between the decoded guess of the clean picture and the true one, at high SNR, for fidelity.
    pixel_weight: float = Field(default=0.0, ge=0)
    pixel_below: float = Field(default=0.223, gt=0, le=1)
    guard: GuardConfig = GuardConfig()
    report_every: int = Field(default=50, gt=0)
    # A multiple of report_every; each checkpoint is also validated.
    checkpoint_every: int = Field(default=250, gt=0)
    seed: int = Field(default=0, ge=0)
    # Compute in bfloat16 over float32 weights: for GPUs, and CPUs with AMX.
    bfloat16: bool = False

    @model_validator(mode="after")
    def _checkpoints_are_reports(self) -> TrainConfig:
        if self.checkpoint_every % self.report_every:
            raise ValueError(
                f"checkpoint_every {self.checkpoint_every} must be a multiple of report_every "
                f"{self.report_every}"
            )
        return self
