"""The experts of a model as replicas: each takes its steps on batches of requests."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from ray import serve
from ray.serve import metrics

from linearsr.config import ModelConfig, Options
from linearsr.diffusion.experts import Segment, ranges
from linearsr.distributed.models import load_upscaler
from linearsr.distributed.serve.config import ServeConfig
from linearsr.distributed.serve.progress import TileCounter
from linearsr.distributed.serve.retry import StaleModel, WeightsChanged
from linearsr.errors import WeightsError
from linearsr.imaging.files import Picture
from linearsr.pipeline.memory import give_back_freed_memory
from linearsr.pipeline.state import DenoiseState
from linearsr.pipeline.upscaler import Upscaler

# Bytes of a request's latents from which freed memory is given back to Linux, and the seconds after
# which Serve has sent a result, so that its memory is free.
LARGE = 2**28
SENT_SECONDS = 5.0
# Upper bounds of the histograms' buckets.
SIZES = (1, 2, 4, 8, 16, 32, 64)
MILLISECONDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 30_000)


@dataclass(frozen=True)
class Handoff:
    """A request on its way from expert to expert, and the milliseconds it has spent so far."""

    state: DenoiseState
    # The model that the router planned for, and the weights of the first expert.
    config: ModelConfig
    weights: str | None = None
    queue: float = 0.0
    # By the experts' names.
    denoise: dict[str, float] = field(default_factory=dict)
    # The key under which experts note how far they are; None if the client wants no progress.
    note: str | None = None


@dataclass
class _Item:
    """A request in an expert's queue, and later its result.

    Serve holds the last batch of each queue until the next one comes. So `request` and `result` are
    None once the request has ended: otherwise its tensors would stay in memory.
    """

    request: Handoff | None
    segment: Segment
    arrival: float
    tiles: TileCounter
    result: Handoff | Exception | None = None


class Experts:
    """A replica with some experts of a model. Each call names the steps to take."""

    def __init__(self, config: ServeConfig, experts: tuple[int, ...]) -> None:
        self.weights = config.model
        self.upscaler = load_upscaler(
            config.model, config.device, only=experts, acceleration=config.acceleration
        )
        self.forwards = 0
        for expert in experts:
            self_check(self.upscaler, expert)
            self.upscaler.experts[expert].register_forward_hook(self._count)
        # Always the same thread: each thread that computes starts an OpenMP team of its own.
        self.thread = ThreadPoolExecutor(1)
        # As a decorator, `serve.batch` would make one queue for the whole class.
        batch = serve.batch(
            max_batch_size=config.max_batch_size, batch_wait_timeout_s=config.batch_wait_timeout_s
        )
        self.queues = {expert: batch(self._denoise) for expert in experts}
        histogram = partial(metrics.Histogram, boundaries=MILLISECONDS, tag_keys=("expert",))
        self.queue_ms = histogram("linearsr_queue_ms", "time from arrival to the batch")
        self.step_ms = histogram("linearsr_step_ms", "mean time of a forward pass in a batch")
        self.batch_size = histogram("linearsr_batch_size", "requests in a batch", boundaries=SIZES)

    async def denoise(self, handoff: Handoff, segment: Segment) -> Handoff:
        """Return the request after the steps of `segment`, taken by one of this replica's experts.

        Raises StaleModel if it was planned for another model, and WeightsChanged if an earlier
        expert had other weights.
        """
        check_same_model(self.upscaler, handoff)
        if handoff.weights not in (None, self.weights):
            raise WeightsChanged("the experts are getting new weights; send the request again")
        tiles = TileCounter(handoff.note, segment.expert, len(handoff.state.tiles))
        item = _Item(handoff, segment, time.perf_counter(), tiles)
        size = sum(latent.nbytes for latent in handoff.state.latents)
        del handoff
        try:
            await self.queues[segment.expert](item)
            result = item.result
        finally:
            item.request = item.result = None
            if size >= LARGE:
                loop = asyncio.get_running_loop()
                loop.call_later(SENT_SECONDS, self.thread.submit, give_back_freed_memory)
        if isinstance(result, Exception):
            raise result
        assert result is not None
        return result

    async def ready(self) -> bool:
        """Return True, for a health check: no replica starts whose model fails the self-check."""
        return True

    async def _denoise(self, items: list[_Item]) -> list[None]:
        """Take a batch's steps with one expert, and leave the result or the error in each item.

        If the batch fails, its requests are tried one by one, so that only the one at fault fails.
        """
        loop, failure = asyncio.get_running_loop(), None
        try:
            await loop.run_in_executor(self.thread, self._denoise_batch, items)
        except Exception as error:
            failure = _without_frames(error)
            self.upscaler.drop_graphs()
        if failure and len(items) == 1:
            items[0].result = failure
        elif failure:
            for item in items:
                await self._denoise([item])
        return [None] * len(items)

    def _denoise_batch(self, items: list[_Item]) -> None:
        start, self.forwards = time.perf_counter(), 0
        # The others were cancelled while they waited.
        begun = [(item, item.request) for item in items if item.request]
        if not begun:
            return
        batch = [(request.state, item.segment) for item, request in begun]

        def wanted(number: int) -> bool:
            item, _ = begun[number]
            item.tiles.begin_tile()
            return item.request is not None

        states = self.upscaler.denoise_batch(batch, wanted=wanted)
        duration = 1000 * (time.perf_counter() - start)
        name = self.upscaler.expert_name(batch[0][1].expert)
        tags = {"expert": name}
        self.batch_size.observe(sum(item.request is not None for item, _ in begun), tags)
        if self.forwards:
            self.step_ms.observe(duration / self.forwards, tags)
        for (item, request), state in zip(begun, states, strict=True):
            wait = 1000 * (start - item.arrival)
            self.queue_ms.observe(wait, tags)
            if item.request is not None:
                item.result = replace(
                    request,
                    state=state,
                    weights=self.weights,
                    queue=request.queue + wait,
                    denoise={**request.denoise, name: duration},
                )

    def _count(self, *_: object) -> None:
        self.forwards += 1


def _without_frames(error: Exception) -> Exception:
    """Remove the tracebacks of an error and of its causes: their frames keep tensors alive."""
    cause: BaseException | None = error
    while cause is not None:
        cause.__traceback__ = None
        cause = cause.__cause__ or cause.__context__
    return error


def check_same_model(upscaler: Upscaler, handoff: Handoff) -> None:
    """Raise StaleModel if the request was planned for another model than this replica has."""
    if handoff.config != upscaler.config:
        raise StaleModel("the model is being replaced; send the request again")


def self_check(upscaler: Upscaler, expert: int) -> None:
    """Take one step of an expert on a tiny picture. Raises WeightsError unless it stays finite."""
    picture = Picture(torch.full((3, 8, 8), 0.5))
    low, high = ranges(upscaler.config.sampling.boundaries)[expert]
    state = replace(upscaler.prepare(picture, Options(steps=1)), timesteps=(high, low))
    (latent,) = upscaler.denoise(state, Segment(expert, 0, 1)).latents
    if not torch.isfinite(latent).all():
        name = upscaler.expert_name(expert)
        raise WeightsError(f"{upscaler.config.name}: expert {name} gives NaN; replace its weights")
