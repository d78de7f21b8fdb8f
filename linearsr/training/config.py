"""The configuration of one training stage: timesteps, rates, lengths, guard. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from linearsr.config import Config
from linearsr.training.guard import GuardConfig


class TimestepConfig(Config):
    """The timesteps that are trained: sigmoid(N(mean, spread)) in (low, high], some at t = 1."""

    mean: float = 0.5
    """Mean of the normal distribution, before the sigmoid."""
    spread: float = Field(default=1.0, gt=0)
    """Standard deviation of the normal distribution."""
    at_one: float = Field(default=0.25, ge=0, le=1)
    """Share of pairs at t = 1, pure noise; counts only if the range ends at 1."""
    low: float = Field(default=0.0, ge=0, lt=1)
    """Lower end of the range, which is not part of it."""
    high: float = Field(default=1.0, gt=0, le=1)
    """Upper end of the range, which is part of it."""

    @model_validator(mode="after")
    def _range(self) -> TimestepConfig:
        if self.low >= self.high:
            raise ValueError(f"low {self.low} must lie below high {self.high}")
        return self


class TrainConfig(Config):
    """One stage of training."""

    steps: int = Field(gt=0)
    """Number of optimizer steps; each takes one global batch."""
    minutes: float | None = Field(default=None, gt=0)
    """Time limit of the stage in minutes, all restarts together; by default, only `steps` end it.
    The learning rate follows steps or minutes, whichever is further."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """AdamW's learning rate after the warm-up."""
    warmup: int = Field(default=50, ge=0)
    """Number of steps over which the learning rate rises from zero."""
    decay: float = Field(default=0.6, ge=0, le=1)
    """Share of the stage, at its end, over which the learning rate falls to zero."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's weight decay."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's betas. The second moment is short because batches are small and gradients differ
    between noise levels."""
    clip: float = Field(default=1.0, gt=0)
    """Largest gradient norm; larger gradients are scaled down to it."""
    ema: float = Field(default=0.999, ge=0, lt=1)
    """Decay per step of the averaged weights; those are validated and exported."""
    timesteps: TimestepConfig = TimestepConfig()
    """Timesteps that are trained."""
    pixel_weight: float = Field(default=0.0, ge=0)
    """Weight of the L1 distance between the decoded guess and the true picture at low noise, for
    fidelity; 0 does without decoding."""
    pixel_below: float = Field(default=0.223, gt=0, le=1)
    """Largest timestep at which pixel_weight counts."""
    guard: GuardConfig = GuardConfig()
    """Protection against divergence."""
    report_every: int = Field(default=50, gt=0)
    """Number of steps between two reports of loss, gradient norm and learning rate."""
    checkpoint_every: int = Field(default=250, gt=0)
    """Number of steps between two checkpoints, a multiple of report_every; each is validated."""
    seed: int = Field(default=0, ge=0)
    """Seed for crops, degradation, timesteps and noise."""
    accumulation: int = Field(default=1, ge=1)
    """Number of micro-batches, one after the other, that each worker takes its part of a global
    batch in (gradient accumulation). More of them need less memory for activations. Batch, steps
    and rates stay as they are, and so do gradients up to rounding: with DeepSpeed in bfloat16, the
    sum of the micro-batches is bfloat16 too. `data.batch` must be a multiple of workers times
    this."""
    activation_checkpointing: bool = False
    """Whether the backward pass computes each block's activations again instead of keeping them
    (torch.utils.checkpoint). Memory falls to about one block's, and a step computes four forward
    passes instead of three; the gradients stay the same."""
    bfloat16: bool | Literal["auto"] = "auto"
    """Whether to compute in bfloat16 over float32 weights. "auto" does if every worker's processor
    multiplies bfloat16 in hardware, as GPUs do, and CPUs with AMX or AVX512-BF16."""

    @property
    def pixels(self) -> bool:
        """Return whether the stage compares pictures, and so needs HR even beside its latents."""
        return self.pixel_weight > 0

    @model_validator(mode="after")
    def _checkpoints_are_reports(self) -> TrainConfig:
        if self.checkpoint_every % self.report_every:
            raise ValueError(
                f"checkpoint_every {self.checkpoint_every} must be a multiple of report_every "
                f"{self.report_every}"
            )
        return self


class PerceptualConfig(TrainConfig):
    """A perceptual stage, which trains one expert by the pictures that it makes.

    The expert's guess of the clean latent is decoded and compared with the true picture by L1 and
    LPIPS, and a discriminator tells it from real pictures.
    """

    l1: float = Field(default=4.0, ge=0)
    """Weight of the mean absolute difference between pictures in [-1, 1]."""
    lpips: float = Field(default=1.0, ge=0)
    """Weight of LPIPS; with 0, its trunk is not needed."""
    net: Literal["squeeze"] = "squeeze"
    """Network that LPIPS compares pictures by."""
    trunk: str | None = None
    """File with torchvision's weights of that network, at a path that all nodes see; by default,
    the one that LINEARSR_LPIPS_TRUNK names, or the one in torchvision's cache."""
    gan: float = Field(default=0.03, ge=0)
    """Weight of the loss against the discriminator; with 0, there is none."""
    gan_warmup: int = Field(default=150, ge=0)
    """Number of steps over which the weight `gan` rises from zero."""
    channels: tuple[int, int, int, int, int] = (48, 48, 96, 192, 192)
    """Channels of the discriminator's convolutions."""
    discriminator_rate: float = Field(default=4e-4, gt=0)
    """Learning rate of the discriminator."""
    detour: float = Field(default=0.3, ge=0, le=1)
    """Share of pairs whose start comes from two sampling steps instead of one: the first expert's,
    and one more by the expert before the trained one, or by the trained one itself."""
    crop: int | None = Field(default=None, gt=0)
    """Side, in latent cells, of the part that is decoded and judged; by default, all of it."""

    @property
    def pixels(self) -> bool:
        """Return True: this stage compares pictures."""
        return True
