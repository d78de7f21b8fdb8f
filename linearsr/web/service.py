"""What the HTTP interface asks of who does the work; plain data both ways."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Protocol

from pydantic import Field

from linearsr.config import Config, FileOptions, ModelConfig, Options
from linearsr.errors import LinearSRError


class Limits(Config):
    """What one request may ask for; more is refused before any work."""

    bytes: int = Field(default=20_000_000, ge=1, description="of an upload")
    pixels: int = Field(default=4_000_000, ge=1, description="of the picture uploaded")
    output_pixels: int = Field(default=64_000_000, ge=1, description="of the result")
    steps: int = Field(default=50, ge=1, le=50, description="of one picture")
    # In one tile linearsr-tiny takes about 5 kB of memory for each pixel of the picture.
    tile: int = Field(
        default=512, ge=16, description="side in input pixels; tile=off counts as the longer side"
    )
    seconds: float = Field(default=300.0, gt=0, description="from the upload to the result")


class ModelInfo(Config):
    """What a client needs to know of a model."""

    name: str
    scale: int = Field(description="the largest that it was trained for; larger ones are enlarged")
    smallest_scale: float = Field(description="smaller ones cost as much and are shrunk")
    experts: tuple[str, ...] = Field(description="from highest noise to lowest")
    steps: int = Field(description="taken by default")
    plans: tuple[tuple[float, ...], ...] = Field(
        default=(), description="timesteps of requests with as many steps; others are shifted"
    )
    tags: bool = Field(description="whether tags guide it")


@dataclass(frozen=True)
class Request:
    """One picture to upscale."""

    data: bytes
    options: Options
    files: FileOptions
    # Whether anyone listens: telling costs a little at each step of the way.
    progress: bool = False


@dataclass(frozen=True)
class Progress:
    """An expert begins its run of steps, or has taken it."""

    expert: str
    step: int
    steps: int

    @property
    def percent(self) -> int:
        """Of all steps."""
        return 100 * self.step // self.steps


@dataclass(frozen=True)
class Result:
    """An encoded picture and how it came about."""

    image: bytes
    # Of `linearsr.imaging.files.encode`: png, jpeg, webp or tiff.
    format: str
    width: int
    height: int
    model: str
    seed: int
    steps: int
    # How many times larger the network made the picture, before any resampling.
    scale: float
    # Milliseconds of each part: prepare, queue, experts by name, decode, encode, travel.
    timing: dict[str, float] = field(default_factory=dict)


Events = AsyncGenerator[Progress | Result, None]


class Full(LinearSRError):
    """No room for another request now."""

    def __init__(self, seconds: int) -> None:
        super().__init__(seconds)  # as it is made again from its arguments elsewhere
        self.seconds = seconds

    def __str__(self) -> str:
        return f"all places are taken; try again in {self.seconds} s"


class NotReady(LinearSRError):
    """A part of the service has not loaded, or has gone."""


class TookTooLong(LinearSRError):
    """No result within the time that a request may take."""


class Service(Protocol):
    """A model behind the interface."""

    def models(self) -> list[ModelInfo]:
        """Those that are served."""
        ...

    async def ready(self) -> None:
        """Raise NotReady unless every part answers."""
        ...

    def upscale(self, request: Request) -> Events:
        """Progress of each expert where it is asked for, then the result.

        Raises InputError, OptionError, Full or another LinearSRError. Closing the generator gives
        the work up.
        """
        ...


def model_info(config: ModelConfig) -> ModelInfo:
    """What clients are told of a model."""
    from linearsr.weights import expert_names

    return ModelInfo(
        name=config.name,
        scale=config.scale,
        smallest_scale=config.trained_scale(1),
        experts=tuple(expert_names(config)),
        steps=config.sampling.steps,
        plans=config.sampling.plans,
        tags=config.tags is not None,
    )
