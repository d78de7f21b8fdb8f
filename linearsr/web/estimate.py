"""How long a request will take, from the work that it plans and the speed of earlier requests."""

from __future__ import annotations

import asyncio
import io
import logging
import math
from collections import deque
from collections.abc import Iterable
from contextlib import aclosing
from typing import Annotated, Any, NamedTuple

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from linearsr.config import FileOptions, ModelConfig, Options
from linearsr.errors import LinearSRError, OptionError, TooLarge, one_line
from linearsr.imaging.files import result_format
from linearsr.pipeline.memory import memory_needed
from linearsr.pipeline.sizes import output_size
from linearsr.pipeline.tiling import plan_work
from linearsr.web.service import Events, Limits, NotReady, Result, Service, UpscaleRequest
from linearsr.web.upload import (
    Absent,
    Fields,
    Side,
    check_bytes,
    check_format,
    check_pages,
    check_steps,
)
from linearsr.weights import expert_names

# Sides of the squares that are upscaled before there was a request. The first one only warms up
# caches. The second one is large enough that its cells take as long as those of a large picture.
WARM_UP = (64, 256)
# The number of latest requests whose speed counts.
REMEMBERED = 32


class _Speed(NamedTuple):
    """The work of a request, and the seconds that it took.

    cells: latent cells of all tiles, times steps. pixels: of the pictures that the network made.
    denoise: seconds in the experts. rest: seconds before, between and after them.
    """

    cells: int
    pixels: int
    denoise: float
    rest: float


class Measured:
    """A service that learns its own speed from the requests that finish.

    The rates are means over the latest requests, weighted by their work, so large pictures count
    most.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._speeds: deque[_Speed] = deque(maxlen=REMEMBERED)
        self._warming = asyncio.Lock()
        self.models, self.ready, self.memory = service.models, service.ready, service.memory

    async def upscale(self, request: UpscaleRequest) -> Events:
        """Yield the events of the service, and learn from the result."""
        async with aclosing(self._service.upscale(request)) as events:
            async for event in events:
                if isinstance(event, Result) and request.pages and event.timing:
                    self.learn(request, event)
                yield event

    async def seconds(self, width: int, height: int, options: Options) -> float:
        """Return how long a picture of this size takes if it need not wait for others.

        Raises NotReady if there has been no request yet, and the endpoint cannot try one.
        """
        if not self._speeds:
            await self.warm_up()
        if not self._speeds:
            raise NotReady("the speed of this endpoint is not known yet; try again soon")
        model = self.models()[0]
        steps = (options.steps or model.sampling.steps) if options.detail else 1
        cells, pixels = _work(model, [(width, height)], options)
        per_cell = sum(s.denoise for s in self._speeds) / sum(s.cells for s in self._speeds)
        per_pixel = sum(s.rest for s in self._speeds) / sum(s.pixels for s in self._speeds)
        return steps * cells * per_cell + pixels * per_pixel

    async def warm_up(self) -> None:
        """Upscale two small pictures, unless requests have been upscaled already."""
        async with self._warming:
            if self._speeds:
                return
            try:
                for side in WARM_UP:
                    await self._try(side)
            except LinearSRError as error:
                logging.getLogger(__name__).warning("the speed was not measured: %s", error)

    async def _try(self, side: int) -> None:
        pages = () if side == WARM_UP[0] else ((side, side),)
        request = UpscaleRequest(_noise(side), Options(), FileOptions(), pages=pages)
        async with aclosing(self.upscale(request)) as events:
            async for _ in events:
                pass

    def learn(self, request: UpscaleRequest, result: Result) -> None:
        """Remember the speed of a request that has pages and a timing."""
        model, timing = self.models()[0], result.timing
        denoise = sum(timing.get(name, 0) for name in expert_names(model)) / 1000
        rest = sum(timing.values()) / 1000 - denoise - timing.get("queue", 0) / 1000
        cells, pixels = _work(model, request.pages, request.options)
        self._speeds.append(_Speed(cells * result.steps, pixels, denoise, rest))


class Question(Fields):
    """A picture that has not been sent: its size, and the form's fields that matter."""

    width: Side
    """Width of the picture in pixels, not of the result."""
    height: Side
    """Height of the picture in pixels, not of the result."""
    bytes: Annotated[int, Field(ge=0)] | Absent = None
    """Size of the picture's file in bytes."""

    def fields(self, model: ModelConfig) -> dict[str, Any]:
        """Return the fields of Options and FileOptions. Raises OptionError."""
        fields = super().fields(model)
        # In a form, these are the size of the result.
        return {name: value for name, value in fields.items() if name not in ("width", "height")}


class Estimate(BaseModel):
    """How long an upload would take, and whether the limits admit it."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    seconds: float
    """Seconds that the work takes if it need not wait for other requests."""
    width: int
    """Width of the result in pixels."""
    height: int
    """Height of the result in pixels."""
    fits: bool
    """Whether the limits admit the picture."""
    detail: str
    """Why the limits do not admit it, and what they would admit; otherwise empty."""


async def estimate(question: Question, service: Measured, limits: Limits) -> Estimate:
    """Answer a question. Raises OptionError for fields that the form would refuse too."""
    model, size = service.models()[0], (question.width, question.height)
    options, _ = question.parsed(model, limits.pixels)
    seconds, detail = await service.seconds(*size, options), ""
    try:
        check_bytes(question.bytes or 0, limits)
        check_steps(options, limits, model)
        check_pages([size], options, limits)
        check_format(size, options, result_format("png", question.format))
        _check_memory(bytes_needed(model, *size, options), await service.memory())
        _check_seconds(seconds, limits)
    except (OptionError, TooLarge) as error:
        detail = one_line(error)
    height, width = output_size(question.height, question.width, options)
    return Estimate(seconds=seconds, width=width, height=height, fits=not detail, detail=detail)


def _check_memory(needed: int, free: int) -> None:
    """Raise TooLarge if a request needs more bytes than one may have."""
    if needed > free:
        most = free / needed
        raise TooLarge(
            f"the picture needs about {needed / 2**30:.1f} GiB of memory here, and "
            f"{free / 2**30:.1f} GiB are free; crop it or make it smaller, to at most "
            f"{100 * math.sqrt(most):.0f}% of its width and height"
        )


def _check_seconds(seconds: float, limits: Limits) -> None:
    """Raise TooLarge if a request would be ended before its result."""
    if seconds > limits.seconds:
        raise TooLarge(
            f"the picture would take about {seconds / 60:.0f} minutes here, more than the limit of "
            f"{limits.seconds / 60:.0f}; crop it, make it smaller or use fewer steps"
        )


def bytes_needed(model: ModelConfig, width: int, height: int, options: Options) -> int:
    """Return about how much memory a picture of this size needs, in bytes."""
    work = plan_work(model, height, width, options)
    return memory_needed(height, width, options, work.size, tiled=work.tiled)


def _work(
    model: ModelConfig, pages: Iterable[tuple[int, int]], options: Options
) -> tuple[int, int]:
    """Return the latent cells and the pixels of the network's pictures, over all pages."""
    works = [plan_work(model, height, width, options) for width, height in pages]
    return sum(work.cells for work in works), sum(math.prod(work.size) for work in works)


def _noise(side: int) -> bytes:
    """Return a PNG of noise, which takes longest to encode."""
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
