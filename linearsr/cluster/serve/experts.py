"""Experts as replicas: each takes its steps on what it is sent, in batches."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import torch
from ray import serve
from ray.serve import metrics

from linearsr.cluster.serve.config import ServeConfig
from linearsr.cluster.weights import load_upscaler
from linearsr.config import Options
from linearsr.errors import WeightsError
from linearsr.imaging.files import Picture
from linearsr.noise.experts import Segment, ranges
from linearsr.upscaler import Upscaler, Work

MILLISECONDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 30_000)


@dataclass(frozen=True)
class Passed:
    """A work on its way from expert to expert, and the milliseconds it has spent."""

    work: Work
    queue: float = 0.0
    # By the experts' names.
    denoise: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Item:
    passed: Passed
    segment: Segment
    came: float


class Experts:
    """A replica with some experts of a model; it knows the steps it is told, not the plan."""

    def __init__(self, config: ServeConfig, which: tuple[int, ...]) -> None:
        self.upscaler = load_upscaler(config.model, config.device, only=which)
        for expert in which:
            self_check(self.upscaler, expert)
        # Always the same one: each thread that computes would start a team of OpenMP's of its own.
        self.thread = ThreadPoolExecutor(1)
        # One queue for each expert and replica: as a decorator there would be one for the class.
        queue = serve.batch(max_batch_size=config.batch, batch_wait_timeout_s=config.batch_wait)
        self.queues = {expert: queue(self._denoise) for expert in which}
        keys = ("expert",)
        about = {"boundaries": MILLISECONDS, "tag_keys": keys}
        self.waited = metrics.Histogram("linearsr_queue_ms", "before a batch", **about)
        self.stepped = metrics.Histogram("linearsr_step_ms", "one step of a batch", **about)
        self.sizes = metrics.Histogram(
            "linearsr_batch_size", "works", boundaries=[1, 2, 4, 8, 16, 32, 64], tag_keys=keys
        )

    async def denoise(self, passed: Passed, segment: Segment) -> Passed:
        """The work after the steps of one of this replica's experts."""
        item = _Item(passed, segment, time.perf_counter())
        result: Passed | Exception = await self.queues[segment.expert](item)
        if isinstance(result, Exception):
            raise result
        return result

    async def ready(self) -> bool:
        """An answer says that the model is loaded and was checked."""
        return True

    async def _denoise(self, items: list[_Item]) -> list[Passed | Exception]:
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

    def _together(self, items: list[_Item]) -> list[Passed | Exception]:
        began = time.perf_counter()
        batch = [(item.passed.work, item.segment) for item in items]
        works = self.upscaler.denoise_batch(batch)
        took = 1000 * (time.perf_counter() - began)
        name = self.upscaler.expert_name(items[0].segment.expert)
        apart = {(w.latents[0].shape, w.solver, not w.previous, s.stop - s.start) for w, s in batch}
        steps = sum(count for *_, count in apart)
        tags = {"expert": name}
        self.sizes.observe(len(items), tags)
        self.stepped.observe(took / steps, tags)
        told: list[Passed | Exception] = []
        for item, work in zip(items, works, strict=True):
            waited = 1000 * (began - item.came)
            self.waited.observe(waited, tags)
            spent = {**item.passed.denoise, name: took}
            told.append(Passed(work, item.passed.queue + waited, spent))
        return told


def self_check(upscaler: Upscaler, expert: int) -> None:
    """One step of its range on a tiny picture. Raises WeightsError for one that is not finite."""
    picture = Picture(torch.full((3, 8, 8), 0.5), None, 8, False, None, None, "png")
    low, high = ranges(upscaler.config.sampling.boundaries)[expert]
    job = replace(upscaler.prepare(picture, Options(steps=1)), timesteps=(high, low))
    (latent,) = upscaler.denoise(job, Segment(expert, 0, 1)).latents
    if not torch.isfinite(latent).all():
        name = upscaler.expert_name(expert)
        raise WeightsError(f"{upscaler.config.name}: expert {name} gives NaN; replace its weights")
