"""The configs of models and requests: frozen pydantic models that refuse unknown keys.

The text below a field is shown in --help and in docs/reference. Imports neither torch nor Ray, so
that a command line can be checked before anything heavy is loaded.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from typing_extensions import Self

from linearsr.errors import OptionError

# A file of weights from somewhere may name any numbers, so these bound what is made of them.
MAX_CHANNELS = 65_536
MAX_SIDE = 64
Channels = Annotated[int, Field(gt=0, le=MAX_CHANNELS)]
Side = Annotated[int, Field(gt=0, le=MAX_SIDE)]
# Ways of taking steps from noise to picture: see `linearsr.diffusion.solvers`.
Solver = Literal["euler", "dpm", "adams"]


class Config(BaseModel):
    """Base class of configs: frozen; refuses unknown keys; the text below a field describes it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @classmethod
    def parse(cls, /, **fields: object) -> Self:
        """Make a config from untyped fields. Raises OptionError naming the field and its range."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            place, message = explain(error)
            raise OptionError(f"{place.split('.')[0] or 'options'}: {message}") from error


def explain(error: ValidationError) -> tuple[str, str]:
    """Return the path of the first wrong field, "" for the whole config, and what is wrong."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    # A whole config is the input of a check of several fields; the message names those.
    if not isinstance(first["input"], dict | BaseModel):
        message += f" (got {first['input']!r})"
    return ".".join(map(str, first["loc"])), message


class DenoiserConfig(Config):
    """Shape of one `linearsr.denoiser.LinearSR` (paper section 3; blocks as in Sana, 2410.10629).

    `prediction` is the meaning of the last layer. "velocity" is Sana's: the output is v.
    "preconditioned" wraps the same network in EDM's skip and scale (Karras et al. 2022, eq. 7),
    rewritten for the straight path; see `linearsr.diffusion.path.Preconditioning`. It frees a
    narrow network from carrying 48 channels of noise through to its output.
    """

    latent_channels: int = Field(gt=0, le=MAX_CHANNELS)
    """Number of channels of a latent cell."""
    depth: int = Field(gt=0, le=1000)
    """Number of blocks."""
    width: int = Field(gt=0, le=MAX_CHANNELS)
    """Number of channels of a token."""
    head_dim: int = Field(default=32, gt=0, le=MAX_CHANNELS)
    """Number of channels of an attention head."""
    ffn_ratio: float = Field(default=2.5, gt=0, le=64)
    """Number of channels inside a Mix-FFN, as a multiple of the width."""
    qk_norm: bool = True
    """Whether queries and keys are RMS-normalised, as from Sana 1.5 on; without it, nothing holds
    their growth back (docs/design/method.md)."""
    local_kernel: int = Field(default=0, ge=0, le=7)
    """Side of a depthwise convolution of the values that is added to the linear attention; 0 for
    none. Linear attention spreads its weight over the whole picture; the convolution tells near
    neighbours apart."""
    tag_dim: int | None = Field(default=None, gt=0, le=MAX_CHANNELS)
    """Number of channels of a tag embedding; None for a model without cross-attention."""
    tag_heads: int = Field(default=8, gt=0, le=MAX_CHANNELS)
    """Number of heads of the cross-attention to tags."""
    stem_channels: tuple[Channels, Channels, Channels] = (32, 64, 64)
    """Output channels of the LR stem's three convolutions."""
    stem_strides: tuple[Side, Side, Side] = (2, 2, 1)
    """Strides of the LR stem's three convolutions; their product is the latent's factor."""
    condition_latent: bool = False
    """Whether the LR picture, enlarged and encoded like HR, is also concatenated to the latent."""
    prediction: Literal["velocity", "preconditioned"] = "velocity"
    """Meaning of the last layer's output."""
    timestep_scale: float = Field(default=1000.0, gt=0)
    """Upper end of the range on which timesteps are embedded; Sana was trained on [0, 1000]."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> DenoiserConfig:
        if self.width % self.head_dim:
            raise ValueError(f"width {self.width} is not a multiple of head_dim {self.head_dim}")
        if self.local_kernel and self.local_kernel % 2 == 0:
            raise ValueError(f"local_kernel must be odd, or 0 for none, not {self.local_kernel}")
        if self.tag_dim is not None and self.width % self.tag_heads:
            raise ValueError(f"width {self.width} is not a multiple of tag_heads {self.tag_heads}")
        return self


# The linear layers of a block that adapters may stand beside, by their names in it.
AdaptedLayer = Literal[
    "attention.qkv",
    "attention.out",
    "tag_attention.q",
    "tag_attention.kv",
    "tag_attention.out",
    "ffn.expand",
    "ffn.project",
]


class LoRAConfig(Config):
    """Shape of low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685).

    An expert's layer has the weight W + alpha / rank * B A. All experts share W, the base; each has
    matrices A (rank, inputs) and B (outputs, rank) of its own. A recipe has no adapters by default,
    and trains whole experts; `lora={}` takes the defaults below.
    """

    rank: int = Field(default=32, gt=0, le=1024)
    """Number of rows of A and of columns of B."""
    alpha: float = Field(default=32.0, gt=0, le=10_000, allow_inf_nan=False)
    """Strength of the adapters: B A is multiplied by alpha / rank."""
    layers: tuple[AdaptedLayer, ...] = Field(default=get_args(AdaptedLayer), min_length=1)
    """Layers of each block that get an adapter; those of the cross-attention count only in models
    with tags."""

    @field_validator("layers")
    @classmethod
    def _each_once(cls, layers: tuple[AdaptedLayer, ...]) -> tuple[AdaptedLayer, ...]:
        if len(set(layers)) != len(layers):
            raise ValueError(f"each layer may be named once, unlike {layers}")
        return layers


class LatentConfig(Config):
    """How pictures become latents.

    "space-to-depth" takes the residual over the bicubic picture, folds each `factor` x `factor`
    block into channels without loss, and divides by `scale` so that the spread is near one. "dc-ae"
    encodes the picture itself with diffusers' `AutoencoderDC` from `source`.
    """

    kind: Literal["space-to-depth", "dc-ae"]
    """Kind of latent: lossless ("space-to-depth") or learned ("dc-ae")."""
    factor: int = Field(gt=0, le=MAX_SIDE)
    """Side of a latent cell in pixels."""
    scale: float = Field(gt=0)
    """One latent unit in picture units ([-1, 1]) for space-to-depth, or DC-AE's scaling factor."""
    source: str | None = None
    """Folder, s3:// folder or hub id of the DC-AE; an id may end in "@" and a revision."""
    decoder: str | None = None
    """Another DC-AE, named as in `source`, whose decoder replaces that of `source`: a lighter one
    that was trained for the same latents, such as DC-AE-Lite."""


class TagEncoderConfig(Config):
    """How tags become the embeddings that a model's cross-attention was trained on.

    "gemma": the last hidden states of Gemma 2 for the tags joined by ", ", as Sana encodes its
    captions.
    """

    kind: Literal["gemma"]
    """Kind of embedding."""
    source: str
    """Folder, s3:// folder or hub id of Gemma; an id may end in "@" and a revision."""


class SamplingConfig(Config):
    """How noise turns into a picture by default; a request may override `steps` and `solver`."""

    steps: int = Field(default=4, ge=1, le=50)
    """Number of steps from noise to picture."""
    solver: Solver = "euler"
    """Solver that takes the steps (docs/design/sampling.md)."""
    flow_shift: float = Field(default=3.0, gt=0)
    """How strongly the steps gather at high noise (Sana's flow shift); 1 spaces them evenly."""
    boundaries: tuple[float, ...] = Field(default=(0.223, 0.875, 0.939), max_length=50)
    """Timesteps between experts, ascending; the first expert (most noise) lies above the last."""
    plans: tuple[tuple[float, ...], ...] = Field(default=(), max_length=50)
    """Schedules for particular numbers of steps: each lists the timesteps at which its steps start,
    from 1.0 down. Other numbers of steps take the shifted schedule."""

    @model_validator(mode="after")
    def _in_order(self) -> SamplingConfig:
        edges = (0.0, *self.boundaries, 1.0)
        if any(low >= high for low, high in pairwise(edges)):
            raise ValueError(f"boundaries must rise strictly inside (0, 1), not {self.boundaries}")
        for plan in self.plans:
            if not 1 <= len(plan) <= 50 or plan[0] != 1:
                raise ValueError(
                    f"a plan must have 1 to 50 timesteps and start at 1.0, unlike {plan}"
                )
            if not all(high > low for high, low in pairwise((*plan, 0.0))):
                raise ValueError(
                    f"a plan's timesteps must fall strictly and stay above 0, unlike {plan}"
                )
        if len({len(plan) for plan in self.plans}) != len(self.plans):
            raise ValueError(f"plans must differ in their number of steps, unlike {self.plans}")
        return self


class ModelConfig(Config):
    """The config of a whole model: everything in its weights bundle except the tensors."""

    name: str = Field(max_length=200)
    """Name of the model in tables and in the metadata of results."""
    scale: int = Field(default=4, gt=0, le=MAX_SIDE)
    """Largest scale that the model was trained for; larger results are enlarged by bicubic."""
    smallest_scale: float | None = Field(default=None, ge=1)
    """Smallest scale that the model was trained for; smaller results are shrunk by bicubic. None
    means that the model was trained for `scale` alone."""
    denoiser: DenoiserConfig
    """Shape of each expert."""
    latent: LatentConfig
    """How pictures become latents."""
    tags: TagEncoderConfig | None = None
    """How tags become embeddings; None for a model that takes no tags."""
    sampling: SamplingConfig = SamplingConfig()
    """Default steps, and which expert takes which."""

    @model_validator(mode="after")
    def _parts_fit(self) -> ModelConfig:
        factor, strides = self.latent.factor, self.denoiser.stem_strides
        if math.prod(strides) != factor:
            raise ValueError(
                f"the product of stem_strides {strides} must be the latent's factor {factor}"
            )
        folded = 3 * factor**2
        channels = self.denoiser.latent_channels
        if self.latent.kind == "space-to-depth" and channels != folded:
            raise ValueError(
                f"latent_channels must be {folded} for a space-to-depth latent of factor {factor}, "
                f"not {channels}"
            )
        if self.tags is not None and self.denoiser.tag_dim is None:
            raise ValueError("tags need a denoiser with cross-attention: set its tag_dim")
        if self.smallest_scale is not None and self.smallest_scale > self.scale:
            raise ValueError(f"smallest_scale {self.smallest_scale} is above scale {self.scale}")
        return self

    def trained_scale(self, scale: float) -> float:
        """Return the scale nearest to `scale` that the model was trained for."""
        smallest = self.scale if self.smallest_scale is None else self.smallest_scale
        return min(max(scale, smallest), self.scale)


class Options(Config):
    """The choices of a request; the same fields on the command line, in HTTP forms and in jobs."""

    scale: float = Field(default=4, ge=1, le=4)
    """How many times larger the result is, from 1 to 4; 1 repairs without enlarging."""
    width: int | None = Field(default=None, ge=1, le=65535)
    """Width of the result in pixels, 1 to 65535, instead of a scale; unless the height is given
    too, it follows from the aspect ratio."""
    height: int | None = Field(default=None, ge=1, le=65535)
    """Height of the result in pixels, 1 to 65535, instead of a scale; unless the width is given
    too, it follows from the aspect ratio."""
    steps: int | None = Field(default=None, ge=1, le=50)
    """Number of sampling steps, 1 to 50; by default the model's own. With 1, the result is the
    average of all plausible pictures, which is closest to the truth but soft; with more, it is a
    single plausible picture, which is sharper."""
    detail: float = Field(default=1.0, ge=0, le=1)
    """Share of the detail from the steps after the first that is kept, 0 to 1: 0 gives the result
    of a single step, 1 keeps all of it."""
    solver: Solver | None = None
    """Solver that takes the steps, by default the model's own; dpm and adams are more accurate
    than euler with the same number of steps (docs/design/sampling.md)."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed for the noise; the same seed gives the same pixels."""
    tags: Literal["auto"] | tuple[str, ...] = ()
    """Names of objects in the picture, most important first, separated by commas; or "auto" to let
    the tagger name them. Only for models that were trained with tags; by default, none."""
    tile: Annotated[int, Field(ge=16)] | Literal["auto", "off"] = "auto"
    """Side of a tile in input pixels, at least 16; "off" for no tiles; "auto" starts with large
    tiles and halves them when memory runs out."""
    colour_fix: Literal["wavelet", "adain", "none"] = "wavelet"
    """Method that gives the result the colours of the input."""

    @field_validator("tags", mode="before")
    @classmethod
    def _split(cls, tags: object) -> object:
        if not isinstance(tags, str) or tags == "auto":
            return tags
        return tuple(tag.strip() for tag in tags.split(",") if tag.strip())


def _format_name(value: object) -> object:
    """Return the name that we use for a format: jpeg, JPG and .jpg are all jpg."""
    if not isinstance(value, str):
        return value
    name = value.lower().removeprefix(".")
    return {"jpeg": "jpg", "tiff": "tif"}.get(name, name)


Format = Annotated[Literal["png", "jpg", "webp", "tif"], BeforeValidator(_format_name)]


class Acceleration(Config):
    """Ways to run a model faster on CUDA. They are off by default: no GPU has shown their gain."""

    compile: bool = False
    """Compile the model with torch.compile, once per picture size; only on CUDA. It pays for many
    pictures of one size."""
    cuda_graph: bool = False
    """Start all kernels of a step at once, by a CUDA graph; only on CUDA. A graph is recorded when
    tiles of a size come for the second time."""
    fp8: bool = False
    """Multiply 8-bit floats in the model's blocks, which changes the pixels a little; only on CUDA
    (compute capability 8.9 or higher)."""


class FileOptions(Config):
    """How picture files are read and written; the same fields everywhere, as with `Options`."""

    format: Format | None = None
    """Format of the results; by default that of each input, or PNG for input formats that cannot
    be written."""
    quality: int = Field(default=95, ge=1, le=100)
    """Quality of JPEG and WebP files, 1 to 100."""
    max_pixels: int = Field(default=100_000_000, ge=1)
    """Largest number of pixels that an input may have."""


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
    # Two steps: structure, the fidelity end, and then texture, which adds the detail.
    sampling=SamplingConfig(steps=2, plans=((1.0, 0.35), (1.0, 0.9, 0.5, 0.2))),
)

_DC_AE = LatentConfig(
    kind="dc-ae", factor=32, scale=0.41407, source="mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers"
)
# Sana's own copy: unlike Google's, it can be downloaded without an account.
_GEMMA = TagEncoderConfig(kind="gemma", source="Efficient-Large-Model/gemma-2-2b-it")


def _sana(name: str, depth: int, width: int, tag_heads: int) -> ModelConfig:
    """A model that Sana's weights of the same size can initialise (their text width is 2304)."""
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
