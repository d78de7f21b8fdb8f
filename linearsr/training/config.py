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
    minutes: float | None = Field(default=None, gt=0)
    """The stage ends after so many minutes of training, over all restarts, if not by its steps; the
    rate follows whichever is further on."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Of AdamW, after the warm-up."""
    warmup: int = Field(default=50, ge=0)
    """Steps over which the rate rises from zero."""
    decay: float = Field(default=0.6, ge=0, le=1)
    """The share of the stage, at its end, over which the rate falls to zero."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Of AdamW."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Of AdamW: a short second moment suits small batches and noise levels of unlike gradients."""
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


class PerceptualConfig(TrainConfig):
    """A perceptual stage of one expert: its picture is judged, from where sampling brings it.

    The expert's guess of the clean latent is decoded and compared with the truth by L1 and LPIPS,
    and a discriminator tells it from real pictures.
    """

    l1: float = Field(default=4.0, ge=0)
    """Weight of the mean absolute difference, pictures being in [-1, 1]."""
    lpips: float = Field(default=1.0, ge=0)
    """Weight of LPIPS; 0 does without its trunk."""
    net: Literal["squeeze"] = "squeeze"
    """The trunk of LPIPS."""
    trunk: str | None = None
    """A file with torchvision's weights of the trunk, which all nodes see; without, the one that
    LINEARSR_LPIPS_TRUNK names, or torchvision's own in its cache."""
    gan: float = Field(default=0.03, ge=0)
    """Weight of the hinge loss against the discriminator; 0 does without one."""
    gan_warmup: int = Field(default=150, ge=0)
    """Steps over which that weight rises from zero."""
    channels: tuple[int, int, int, int, int] = (48, 48, 96, 192, 192)
    """Channels of the discriminator's convolutions."""
    discriminator_rate: float = Field(default=4e-4, gt=0)
    """The discriminator's learning rate, where this stage's is learning_rate."""
    detour: float = Field(default=0.3, ge=0, le=1)
    """The share of pairs that come by one more step than the first expert's: by the expert before
    the trained one, or by the trained one itself."""
    crop: int | None = Field(default=None, gt=0)
    """Side, in latent cells, of the part that is decoded and judged; without, all of it."""
