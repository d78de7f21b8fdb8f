"""Every configuration, as frozen pydantic models that refuse unknown keys.

Knows names, ranges and defaults; imports neither torch nor ray, so a command line can be checked
before anything heavy is loaded.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from typing_extensions import Self

from linearsr.errors import OptionError

Positive = Annotated[int, Field(gt=0)]
# Ways from noise to picture: see `linearsr.diffusion.solvers`.
Solver = Literal["euler", "dpm", "adams"]


class Config(BaseModel):
    """Base of all configs: immutable, unknown keys refused; text below a field describes it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @classmethod
    def parse(cls, /, **fields: object) -> Self:
        """A config from untyped fields. Raises OptionError naming the field and what it may be."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0]) if first["loc"] else "options"
            raise OptionError(f"{name}: {first['msg']} (got {first['input']!r})") from error


class DenoiserConfig(Config):
    """Shape of one `linearsr.denoiser.LinearSR` (paper section 3; blocks as in Sana, 2410.10629).

    `prediction` says what the last layer means. "velocity" is Sana's own: the output is v.
    "preconditioned" wraps the same network in EDM's skip and scale (Karras et al. 2022, eq. 7),
    written for the straight path; see `linearsr.diffusion.path.Preconditioning`. It frees a narrow
    network from having to carry 48 channels of noise through to its output.
    """

    latent_channels: int = Field(gt=0)
    """Channels of a latent cell."""
    depth: int = Field(gt=0)
    """Blocks."""
    width: int = Field(gt=0)
    """Channels of a token."""
    head_dim: int = Field(default=32, gt=0)
    """Channels of an attention head."""
    ffn_ratio: float = Field(default=2.5, gt=0)
    """Channels inside a Mix-FFN, as a multiple of the width."""
    qk_norm: bool = True
    """RMS norm of queries and keys: without it, bfloat16 overflows."""
    local_kernel: int = Field(default=0, ge=0, le=7)
    """Side of a depthwise convolution of the values, added to the linear attention; 0 builds none.
    Linear attention spreads its weight over the whole picture; this keeps near neighbours apart."""
    tag_dim: int | None = None
    """Channels of one tag embedding; None builds no cross-attention at all."""
    tag_heads: int = Field(default=8, gt=0)
    """Heads of the cross-attention to tags."""
    stem_channels: tuple[Positive, Positive, Positive] = (32, 64, 64)
    """Of the LR stem's three convolutions."""
    stem_strides: tuple[Positive, Positive, Positive] = (2, 2, 1)
    """Of the LR stem's three convolutions; they multiply up to the latent's downscale factor."""
    condition_latent: bool = False
    """Whether the LR picture, upsampled and encoded as HR is, is joined on channels as well."""
    prediction: Literal["velocity", "preconditioned"] = "velocity"
    """What the last layer means."""
    timestep_scale: float = Field(default=1000.0, gt=0)
    """Timesteps are embedded on [0, timestep_scale]; Sana was trained on [0, 1000]."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> DenoiserConfig:
        if self.width % self.head_dim:
            raise ValueError(f"width {self.width} is no multiple of head_dim {self.head_dim}")
        if self.local_kernel and self.local_kernel % 2 == 0:
            raise ValueError(f"local_kernel must be odd, or 0 for none: {self.local_kernel}")
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
    """The lossless one, or the learned one."""
    factor: int = Field(gt=0)
    """Pixels to a latent cell, along a side."""
    scale: float = Field(gt=0)
    """One latent unit in picture units ([-1, 1]) for space-to-depth, or DC-AE's scaling factor."""
    source: str | None = None
    """Where DC-AE is found: a folder or hub id."""


class TagEncoderConfig(Config):
    """How tags become the embeddings that a model's cross-attention was trained on.

    "gemma": the last hidden states of Gemma 2 over the tags joined by ", " (as Sana encodes its
    captions), from `source`, a transformers folder or hub id. "hashed": a vector per tag, made of
    its letters alone; needs nothing, knows no meaning but what training gives it.
    """

    kind: Literal["gemma", "hashed"]
    """With meaning, or without."""
    source: str | None = None
    """Gemma's transformers folder or hub id."""

    @model_validator(mode="after")
    def _source_fits(self) -> TagEncoderConfig:
        if (self.kind == "gemma") != (self.source is not None):
            raise ValueError("source is the model of gemma, and of nothing else")
        return self


class SamplingConfig(Config):
    """How noise turns into a picture by default; a request may override `steps` and `solver`."""

    steps: int = Field(default=4, ge=1, le=50)
    """Steps from noise to picture."""
    solver: Solver = "euler"
    """Which way each step goes (docs/design/sampling.md)."""
    flow_shift: float = Field(default=3.0, gt=0)
    """How much of the steps goes to high noise (Sana's flow shift)."""
    boundaries: tuple[float, ...] = (0.223, 0.875, 0.939)
    """Timesteps between experts, ascending; the first expert (most noise) lies above the last."""
    plans: tuple[tuple[float, ...], ...] = ()
    """Timesteps at which the steps start, from 1.0 down, for requests of as many steps; other
    requests take the shifted schedule."""

    @model_validator(mode="after")
    def _boundaries_rise(self) -> SamplingConfig:
        edges = (0.0, *self.boundaries, 1.0)
        if any(low >= high for low, high in pairwise(edges)):
            raise ValueError(f"boundaries must rise strictly inside (0, 1): {self.boundaries}")
        return self

    @model_validator(mode="after")
    def _plans_fall(self) -> SamplingConfig:
        for plan in self.plans:
            if not 1 <= len(plan) <= 50 or plan[0] != 1:
                raise ValueError(f"a plan has 1 to 50 timesteps, the first of them 1.0: {plan}")
            if not all(high > low for high, low in pairwise((*plan, 0.0))):
                raise ValueError(f"a plan's timesteps must fall strictly and stay above 0: {plan}")
        if len({len(plan) for plan in self.plans}) != len(self.plans):
            raise ValueError(f"plans must differ in their number of steps: {self.plans}")
        return self


class ModelConfig(Config):
    """A whole model: what a weights bundle carries besides its tensors."""

    name: str
    """What tables and results call it."""
    scale: int = Field(default=4, gt=0)
    """The largest scale that it was trained for: larger results are enlarged by bicubic."""
    smallest_scale: float | None = Field(default=None, ge=1)
    """The smallest scale that it was trained for: smaller results are shrunk by bicubic. None means
    that it was trained for `scale` alone."""
    denoiser: DenoiserConfig
    latent: LatentConfig
    tags: TagEncoderConfig | None = None
    """None: the model takes no tags, even if its cross-attention could."""
    sampling: SamplingConfig = SamplingConfig()

    @model_validator(mode="after")
    def _parts_fit(self) -> ModelConfig:
        factor, strides = self.latent.factor, self.denoiser.stem_strides
        if math.prod(strides) != factor:
            raise ValueError(
                f"stem_strides {strides} must multiply to the latent's factor {factor}"
            )
        folded = 3 * factor**2
        channels = self.denoiser.latent_channels
        if self.latent.kind == "space-to-depth" and channels != folded:
            raise ValueError(f"folding by {factor} gives {folded} latent channels, not {channels}")
        if self.tags is not None and self.denoiser.tag_dim is None:
            raise ValueError("tags need a denoiser with cross-attention: set its tag_dim")
        if self.smallest_scale is not None and self.smallest_scale > self.scale:
            raise ValueError(f"smallest_scale {self.smallest_scale} is above scale {self.scale}")
        return self

    def trained_scale(self, scale: float) -> float:
        """The scale nearest to `scale` that the model was trained for."""
        smallest = self.scale if self.smallest_scale is None else self.smallest_scale
        return min(max(scale, smallest), self.scale)


class Options(Config):
    """What a request may choose; the same fields everywhere (command line, HTTP, jobs)."""

    scale: float = Field(default=4, ge=1, le=4)
    """How many times larger the result is, such as 2 or 2.5; 1 repairs without enlarging."""
    width: int | None = Field(default=None, ge=1, le=65535)
    """Final width in pixels instead of a scale; without a height it keeps the aspect ratio."""
    height: int | None = Field(default=None, ge=1, le=65535)
    """Final height in pixels, likewise."""
    steps: int | None = Field(default=None, ge=1, le=50)
    """1: closest to the truth (conditional mean). More: sharper, one plausible picture."""
    detail: float = Field(default=1.0, ge=0, le=1)
    """How much of what the steps after the first add is kept: 0 is the picture of --steps 1."""
    solver: Solver | None = None
    """The solver of the steps (docs/design/sampling.md); None is the model's own."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the noise: same seed, same pixels."""
    tags: Literal["auto"] | tuple[str, ...] = ()
    """Objects in the picture, best first; text is split at commas; "auto" asks the tagger."""
    tile: Annotated[int, Field(ge=16)] | Literal["auto", "off"] = "auto"
    """Side of a tile in input pixels; "auto" tries smaller ones when memory runs out."""
    colour_fix: Literal["wavelet", "adain", "none"] = "wavelet"
    """How the result gets the colours of the input back."""

    @field_validator("tags", mode="before")
    @classmethod
    def _split(cls, tags: object) -> object:
        if not isinstance(tags, str) or tags == "auto":
            return tags
        return tuple(tag.strip() for tag in tags.split(",") if tag.strip())


class FileOptions(Config):
    """How picture files are read and written; the same fields everywhere."""

    format: Literal["png", "jpg", "webp", "tif"] | None = None
    """A suffix for all results; None keeps that of each input where it can be written."""
    quality: int = Field(default=95, ge=1, le=100)
    """Of JPEG and WebP."""
    max_pixels: int = Field(default=100_000_000, ge=1)
    """Larger pictures are refused."""


TINY = ModelConfig(
    name="linearsr-tiny",
    denoiser=DenoiserConfig(
        latent_channels=48,
        depth=8,
        width=128,
        local_kernel=3,
        stem_channels=(32, 48, 64),
        stem_strides=(2, 2, 1),
        condition_latent=True,
        prediction="preconditioned",
    ),
    latent=LatentConfig(kind="space-to-depth", factor=4, scale=0.12),
    # Structure, then texture: the fidelity end, and detail on top of it.
    sampling=SamplingConfig(steps=2, plans=((1.0, 0.35), (1.0, 0.9, 0.5, 0.2))),
)

_DC_AE = LatentConfig(
    kind="dc-ae", factor=32, scale=0.41407, source="mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers"
)
# Sana's own copy: unlike Google's, it can be had without an account.
_GEMMA = TagEncoderConfig(kind="gemma", source="Efficient-Large-Model/gemma-2-2b-it")


def _sana(name: str, depth: int, width: int, tag_heads: int) -> ModelConfig:
    """A model that Sana's weights of the same size can start (their text width is 2304)."""
    denoiser = DenoiserConfig(
        latent_channels=32,
        depth=depth,
        width=width,
        tag_dim=2304,
        tag_heads=tag_heads,
        stem_channels=(64, 128, 64),
        stem_strides=(4, 4, 2),
    )
    sampling = SamplingConfig(steps=20)
    return ModelConfig(name=name, denoiser=denoiser, latent=_DC_AE, tags=_GEMMA, sampling=sampling)


LINEARSR_0_6B = _sana("linearsr-0.6b", depth=28, width=1152, tag_heads=16)
LINEARSR_1_6B = _sana("linearsr-1.6b", depth=20, width=2240, tag_heads=20)

MODELS = {config.name: config for config in (TINY, LINEARSR_0_6B, LINEARSR_1_6B)}
