"""The interface between the HTTP layer and the backend that runs the model, as plain data."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Protocol

from pydantic import Field

from linearsr.config import Config, FileOptions, ModelConfig, Options
from linearsr.errors import LinearSRError, OptionError


class Limits(Config):
    """The limits of one request; a request beyond them is refused before any work is done."""

    # A photograph of a phone (12 to 16 megapixels) at x1 and x2.
    bytes: int = Field(default=50_000_000, ge=1)
    """Maximum size of an upload in bytes."""
    pixels: int = Field(default=16_000_000, ge=1)
    """Maximum number of pixels of the uploaded picture."""
    output_pixels: int = Field(default=64_000_000, ge=1)
    """Maximum number of pixels of the result."""
    steps: int = Field(default=50, ge=1, le=50)
    """Maximum number of steps."""
    # With one tile, linearsr-tiny takes about 5 kB of memory for each pixel of the picture.
    tile: int = Field(default=512, ge=16)
    """Maximum side of a tile in input pixels; tile=off counts as the longer side."""
    seconds: float = Field(default=3600.0, gt=0)
    """Maximum time from the upload to the result in seconds."""


class JobLimits(Config):
    """The limits of jobs, which are requests with `Prefer: respond-async`."""

    count: int = Field(default=100, ge=0)
    """Maximum number of jobs that are kept at the same time, finished ones included; 0 for no
    jobs."""
    bytes: int = Field(default=2_000_000_000, ge=1)
    """Maximum number of bytes on disk for the pictures and results of all jobs."""
    running: int = Field(default=2, ge=1)
    """Maximum number of jobs that are worked on at the same time; the others wait."""
    seconds: float = Field(default=21_600.0, gt=0)
    """Maximum time for the work on one job in seconds, without its wait."""
    kept_seconds: float = Field(default=3_600.0, gt=0)
    """Time for which a finished job is kept in seconds."""


class ModelInfo(Config):
    """The properties of a model that a client needs to know."""

    name: str
    scale: int
    """Largest scale of the training; beyond it, the result is enlarged by resampling."""
    smallest_scale: float
    """Smallest scale of the network; below it, the result is shrunk, which saves no time."""
    experts: tuple[str, ...]
    """Names of the experts, from the highest noise to the lowest."""
    steps: int
    """Default number of steps."""
    plans: tuple[tuple[float, ...], ...] = ()
    """Timesteps for requests with as many steps; other requests take the shifted schedule."""
    tags: bool
    """Whether the model can be guided by tags."""


@dataclass(frozen=True)
class UpscaleRequest:
    """One picture to upscale."""

    data: bytes
    options: Options
    files: FileOptions
    # Whether the client wants progress, which costs a little time at each expert.
    progress: bool = False
    # Width and height of each page that the result holds; empty if they were not measured.
    pages: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Progress:
    """The number of steps taken so far, sent when an expert begins, between its tiles, and when it
    ends.

    part: steps that the expert has taken since on some of the tiles, as a share of all tiles.
    """

    expert: str
    step: int
    steps: int
    part: float = 0.0

    @property
    def percent(self) -> int:
        """The steps taken so far, in percent of all steps."""
        return int(100 * (self.step + self.part) / self.steps)

    def public(self) -> dict[str, str | int]:
        """Return what clients see of it."""
        return {
            "expert": self.expert,
            "step": self.step,
            "steps": self.steps,
            "percent": self.percent,
        }


@dataclass(frozen=True)
class Result:
    """An encoded picture, and how it was made."""

    image: bytes
    # A name from `linearsr.imaging.files.encode`: png, jpeg, webp or tiff.
    format: str
    width: int
    height: int
    model: str
    seed: int
    steps: int
    # The scale at which the network worked, before any resampling.
    scale: float
    # Milliseconds of prepare, queue, each expert by name, decode, encode and travel.
    timing: dict[str, float] = field(default_factory=dict)
    # Notes for a user: parts that were left out of the result, or may be damaged.
    notes: tuple[str, ...] = ()


Events = AsyncGenerator[Progress | Result, None]


class Full(LinearSRError):
    """All slots and queue places are taken; the request may be sent again in `seconds`."""

    def __init__(self, seconds: int) -> None:
        super().__init__(seconds)  # the arguments from which pickle makes it again
        self.seconds = seconds

    def __str__(self) -> str:
        return f"the server is busy; try again in {self.seconds} s"


class NotReady(LinearSRError):
    """A part of the service has not loaded yet, has died, or is shutting down."""


class UnknownModel(OptionError):
    """A request names a model that is not served."""


class UnknownJob(LinearSRError):
    """There is no job of this id for the bearer of this token, or it has expired."""


class NotFinished(LinearSRError):
    """A job has no result yet; ask again in `seconds`."""

    def __init__(self, seconds: int) -> None:
        super().__init__(seconds)
        self.seconds = seconds

    def __str__(self) -> str:
        return f"the job has not finished; ask again in {self.seconds} s"


class TookTooLong(LinearSRError):
    """There was no result within the time limit of a request."""


class Upscaling(Protocol):
    """The part of a `Service` that upscales."""

    def upscale(self, request: UpscaleRequest) -> Events:
        """Yield the progress of each expert if the request wants it, then the result.

        Raises InputError, OptionError, Full or another LinearSRError. Closing the generator cancels
        the request and frees its slot.
        """
        ...


class Service(Upscaling, Protocol):
    """The interface of the backend that runs the model."""

    def models(self) -> list[ModelConfig]:
        """Return the configs of the models that are served; the first one is the default."""
        ...

    async def ready(self) -> None:
        """Raise NotReady unless every part answers."""
        ...

    async def memory(self) -> int:
        """Return how many bytes of memory one request may need. Raises NotReady."""
        ...


def model_info(config: ModelConfig) -> ModelInfo:
    """Return the properties of a model that clients need to know."""
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
