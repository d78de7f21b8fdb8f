"""Experts as replicas: each takes its steps on what it is sent, in batches."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import torch
from ray import serve
from ray.serve import metrics

from linearsr.config import ModelConfig, Options
from linearsr.diffusion.experts import Segment, ranges
from linearsr.distributed.models import load_upscaler
from linearsr.distributed.serve.config import ServeConfig
from linearsr.distributed.serve.retry import StaleModel, WeightsChanged
from linearsr.errors import WeightsError
from linearsr.imaging.files import Picture
from linearsr.pipeline.state import DenoiseState
from linearsr.pipeline.upscaler import Upscaler

MILLISECONDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 30_000)


@dataclass(frozen=True)
class Handoff:
    """A work on its way from expert to expert, and the milliseconds it has spent."""

    work: DenoiseState
    # What the router planned for, and the weights that the first expert had.
    config: ModelConfig
    weights: str | None = None
    queue: float = 0.0
    # By the experts' names.
    denoise: dict[str, float] = field(default_factory=dict)


@dataclass
class _Item:
    passed: Handoff
    segment: Segment
    came: float
    wanted: bool = True


class Experts:
    """A replica with some experts of a model; it knows the steps it is told, not the plan."""

    def __init__(self, config: ServeConfig, which: tuple[int, ...]) -> None:
        self.weights = config.model
        self.upscaler = load_upscaler(config.model, config.device, only=which)
        self.forwards = 0
        for expert in which:
            self_check(self.upscaler, expert)
            self.upscaler.experts[expert].register_forward_hook(self._count)
        # Always the same one: each thread that computes would start a team of OpenMP's of its own.
        self.thread = ThreadPoolExecutor(1)
        # One queue for each expert and replica: as a decorator there would be one for the class.
        queue = serve.batch(max_batch_size=config.batch, batch_wait_timeout_s=config.batch_wait)
        self.queues = {expert: queue(self._denoise) for expert in which}
        keys = ("expert",)
        about = {"boundaries": MILLISECONDS, "tag_keys": keys}
        self.waited = metrics.Histogram("linearsr_queue_ms", "waited for a batch", **about)
        self.stepped = metrics.Histogram(
            "linearsr_step_ms", "a forward of a batch, on average", **about
        )
        self.sizes = metrics.Histogram(
            "linearsr_batch_size", "works", boundaries=[1, 2, 4, 8, 16, 32, 64], tag_keys=keys
        )

    async def denoise(self, passed: Handoff, segment: Segment) -> Handoff:
        """The work after the steps of one of this replica's experts.

        Raises StaleModel for a work planned for another model, and WeightsChanged for one that was begun
        with other weights.
        """
        check_planned_for(self.upscaler, passed)
        if passed.weights not in (None, self.weights):
            raise WeightsChanged("experts are being replaced by those of other weights")
        item = _Item(passed, segment, time.perf_counter())
        try:
            result: Handoff | Exception = await self.queues[segment.expert](item)
        except asyncio.CancelledError:
            item.wanted = False
            raise
        if isinstance(result, Exception):
            raise result
        return result

    async def ready(self) -> bool:
        """An answer says that the model is loaded and was checked."""
        return True

    async def _denoise(self, items: list[_Item]) -> list[Handoff | Exception]:
        """All of one expert. A batch that fails is tried one by one: one's fault is one's own."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self.thread, self._together, items)
        except Exception as error:
            # With its frames it would keep the tensors of the batch alive.
            failed = error.with_traceback(None)
        if len(items) == 1:
            return [failed]
        return [(await self._denoise([item]))[0] for item in items]

    def _together(self, items: list[_Item]) -> list[Handoff | Exception]:
        began, self.forwards = time.perf_counter(), 0
        batch = [(item.passed.work, item.segment) for item in items]
        works = self.upscaler.denoise_batch(batch, wanted=lambda i: items[i].wanted)
        took = 1000 * (time.perf_counter() - began)
        name = self.upscaler.expert_name(items[0].segment.expert)
        tags = {"expert": name}
        self.sizes.observe(sum(item.wanted for item in items), tags)
        if self.forwards:
            self.stepped.observe(took / self.forwards, tags)
        told: list[Handoff | Exception] = []
        for item, work in zip(items, works, strict=True):
            waited = 1000 * (began - item.came)
            self.waited.observe(waited, tags)
            spent = {**item.passed.denoise, name: took}
            queue = item.passed.queue + waited
            told.append(Handoff(work, item.passed.config, self.weights, queue, spent))
        return told

    def _count(self, *_: object) -> None:
        self.forwards += 1


def check_planned_for(upscaler: Upscaler, passed: Handoff) -> None:
    """Raise StaleModel for a work of another model's router."""
    if passed.config != upscaler.config:
        raise StaleModel("the model it was planned for is being replaced")


def self_check(upscaler: Upscaler, expert: int) -> None:
    """One step of its range on a tiny picture. Raises WeightsError for one that is not finite."""
    picture = Picture(torch.full((3, 8, 8), 0.5), None, 8, False, None, None, "png")
    low, high = ranges(upscaler.config.sampling.boundaries)[expert]
    job = replace(upscaler.prepare(picture, Options(steps=1)), timesteps=(high, low))
    (latent,) = upscaler.denoise(job, Segment(expert, 0, 1)).latents
    if not torch.isfinite(latent).all():
        name = upscaler.expert_name(expert)
        raise WeightsError(f"{upscaler.config.name}: expert {name} gives NaN; replace its weights")
