"""Every configuration, as frozen pydantic models that refuse unknown keys.

Knows names, ranges and defaults; imports neither torch nor ray, so a command line can be checked
before anything heavy is loaded.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Config(BaseModel):
    """Base of all configs: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DenoiserConfig(Config):
    """Shape of one `linearsr.denoiser.LinearSR` (paper section 3; blocks as in Sana, 2410.10629).

    `prediction` says what the last layer means. "velocity" is Sana's own: the output is v.
    "preconditioned" wraps the same network in EDM's skip and scale (Karras et al. 2022, eq. 7),
    written for the straight path; see `linearsr.noise.path.Preconditioning`. It frees a narrow
    network from having to carry 48 channels of noise through to its output.
    """

    latent_channels: int = Field(gt=0)
    depth: int = Field(gt=0)
    width: int = Field(gt=0)
    head_dim: int = 32
    ffn_ratio: float = Field(default=2.5, gt=0)
    qk_norm: bool = True
    # Channels of one tag embedding; None builds no cross-attention at all.
    tag_dim: int | None = None
    tag_heads: int = 8
    # The LR stem: three convolutions whose strides multiply up to the latent's downscale factor.
    stem_channels: tuple[int, int, int] = (32, 64, 64)
    stem_strides: tuple[int, int, int] = (2, 2, 1)
    # Whether the LR picture, upsampled and encoded like the HR one, is joined on channels as well.
    condition_latent: bool = False
    prediction: Literal["velocity", "preconditioned"] = "velocity"
    # Timesteps are embedded on [0, timestep_scale]; Sana was trained on [0, 1000].
    timestep_scale: float = 1000.0

    @model_validator(mode="after")
    def _heads_divide_width(self) -> DenoiserConfig:
        if self.width % self.head_dim:
            raise ValueError(f"width {self.width} is no multiple of head_dim {self.head_dim}")
        if self.tag_dim is not None and self.width % self.tag_heads:
            raise ValueError(f"width {self.width} is no multiple of tag_heads {self.tag_heads}")
        return self


class LatentConfig(Config):
    """How pictures become latents.

    "space-to-depth" folds each `factor` x `factor` block of the residual over the bicubic picture
    into channels, losslessly, divided by `scale` so that its spread is near one. "dc-ae" encodes
    the picture itself with diffusers' `AutoencoderDC`, found at `source` (folder or hub id).
    """

    kind: Literal["space-to-depth", "dc-ae"]
    factor: int = Field(gt=0)
    # One latent unit in picture units ([-1, 1]) for space-to-depth, or DC-AE's scaling factor.
    scale: float = Field(gt=0)
    source: str | None = None


class SamplingConfig(Config):
    """How noise turns into a picture by default; a request may override `steps`."""

    steps: int = Field(default=4, ge=1, le=50)
    flow_shift: float = Field(default=3.0, gt=0)
    # Timestep boundaries between experts, high to low noise being the last to the first.
    boundaries: tuple[float, ...] = (0.223, 0.875, 0.939)


class ModelConfig(Config):
    """A whole model: what a weights bundle carries besides its tensors."""

    name: str
    scale: int = 4
    denoiser: DenoiserConfig
    latent: LatentConfig
    sampling: SamplingConfig = SamplingConfig()


TINY = ModelConfig(
    name="linearsr-tiny",
    denoiser=DenoiserConfig(
        latent_channels=48,
        depth=8,
        width=96,
        stem_channels=(32, 48, 64),
        stem_strides=(2, 2, 1),
        condition_latent=True,
        prediction="preconditioned",
    ),
    latent=LatentConfig(kind="space-to-depth", factor=4, scale=0.12),
)

_DC_AE = LatentConfig(
    kind="dc-ae", factor=32, scale=0.41407, source="mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers"
)

LINEARSR_0_6B = ModelConfig(
    name="linearsr-0.6b",
    denoiser=DenoiserConfig(
        latent_channels=32,
        depth=28,
        width=1152,
        tag_dim=2304,
        tag_heads=16,
        stem_channels=(64, 128, 64),
        stem_strides=(4, 4, 2),
    ),
    latent=_DC_AE,
    sampling=SamplingConfig(steps=20),
)

LINEARSR_1_6B = ModelConfig(
    name="linearsr-1.6b",
    denoiser=DenoiserConfig(
        latent_channels=32,
        depth=20,
        width=2240,
        tag_dim=2304,
        tag_heads=20,
        stem_channels=(64, 128, 64),
        stem_strides=(4, 4, 2),
    ),
    latent=_DC_AE,
    sampling=SamplingConfig(steps=20),
)

MODELS = {config.name: config for config in (TINY, LINEARSR_0_6B, LINEARSR_1_6B)}
