"""The router: a request's three stages, its segments sent from expert to expert.

    prepare ─▶ experts, by `plan()`: each result goes straight to the next one ─▶ finish

Latents do not come back in between: what a call is given is the promise of the one before it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import ray
from ray.serve.handle import DeploymentHandle, DeploymentResponse
from tenacity import (
    AsyncRetrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_random_exponential,
)

from linearsr.cluster.serve.config import ServeConfig
from linearsr.cluster.serve.experts import Passed
from linearsr.cluster.serve.finisher import Finisher
from linearsr.config import FileOptions
from linearsr.errors import LinearSRError
from linearsr.imaging.files import read
from linearsr.upscaler import Job, OutOfMemory
from linearsr.web.service import Events, NotReady, Progress, Request, Result

# A part that does not answer by then counts as gone.
READY_SECONDS = 5
# What a process or a machine that died looks like from here.
DIED = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.NodeDiedError,
)

Value = TypeVar("Value")


class Router:
    """A replica that reads, plans, sends and writes; it holds no expert.

    groups: which experts each of the handles leads to. finisher: where the latent is learned.
    """

    def __init__(
        self,
        config: ServeConfig,
        groups: Sequence[Sequence[int]],
        experts: Sequence[DeploymentHandle],
        finisher: DeploymentHandle | None,
    ) -> None:
        self.config = config
        self.local = Finisher(config)
        self.upscaler = self.local.upscaler
        self.handles = [*experts, *([finisher] if finisher else [])]
        self.experts = {e: handle for of, handle in zip(groups, experts, strict=True) for e in of}
        self.finisher = finisher
        # Who waits for a segment holds a thread while it does.
        self.threads = ThreadPoolExecutor(2 * config.places)

    async def ready(self) -> None:
        """Raise NotReady unless every part answers."""
        calls = [handle.ready.remote() for handle in self.handles]
        try:
            await asyncio.wait_for(asyncio.gather(*calls), READY_SECONDS)
        except Exception as error:
            raise NotReady("not every expert has loaded; try again soon") from error

    async def upscale(self, request: Request) -> Events:
        """See `linearsr.web.service.Service`."""
        began = time.perf_counter()
        picture = await self._threaded(read, request.data, max_pixels=request.files.max_pixels)
        options = await self._threaded(self.upscaler.with_tags, picture, request.options)
        for tile in self.upscaler.tile_sizes(options):
            with contextlib.suppress(OutOfMemory):
                job = await self._threaded(self.upscaler.prepare, picture, options, tile)
                prepared = 1000 * (time.perf_counter() - began)
                async for event in self._attempts(job, request):
                    if isinstance(event, Result):
                        event = replace(event, timing={"prepare": prepared, **event.timing})
                    yield event
                return
        raise OutOfMemory("the experts' memory did not suffice; try a smaller picture or tile")

    async def _attempts(self, job: Job, request: Request) -> Events:
        """Sent again from the start when someone died on the way: the same seed, the same result.

        While there is no replica at all, Serve keeps what is sent until there is one.
        """
        async for attempt in resends(self.config.attempts):
            sent = time.perf_counter()
            responses = self._send(job)
            if request.progress:
                async for progress in self._progress(job, responses):
                    yield progress
            with attempt:
                result = await self._finished(job, responses[-1], request.files)
        spent = 1000 * (time.perf_counter() - sent) - sum(result.timing.values())
        yield replace(result, timing={**result.timing, "travel": spent})

    def _send(self, job: Job) -> list[DeploymentResponse]:
        """One call for each segment, all at once: each waits for the one before it by itself."""
        responses: list[DeploymentResponse] = []
        for segment in job.segments:
            passed = responses[-1] if responses else Passed(job.work())
            responses.append(self.experts[segment.expert].denoise.remote(passed, segment))
        return responses

    async def _progress(
        self, job: Job, responses: Sequence[DeploymentResponse]
    ) -> AsyncIterator[Progress]:
        for segment, response in zip(job.segments, responses, strict=True):
            yield Progress(self._name(segment.expert), segment.start, job.steps)
            # What it failed with, the last one of them will raise.
            with contextlib.suppress(Exception):
                promise = await response._to_object_ref()
                await self._threaded(ray.wait, [promise], fetch_local=False)
            yield Progress(self._name(segment.expert), segment.stop, job.steps)

    def _name(self, expert: int) -> str:
        return self.upscaler.expert_name(expert)

    async def _finished(self, job: Job, last: DeploymentResponse, files: FileOptions) -> Result:
        try:
            if self.finisher is None:
                return await self.local.finish(job, await last, files)
            result: Result = await self.finisher.finish.remote(job, last, files)
            return result
        except ray.exceptions.RayTaskError as error:
            raise cause(error) from error

    async def _threaded(self, work: Callable[..., Value], *given: Any, **named: Any) -> Value:
        """`work` in a thread: others' requests are answered meanwhile."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.threads, lambda: work(*given, **named))


def cause(error: ray.exceptions.RayTaskError) -> Exception:
    """What was raised in the other process, without Ray's wrapping."""
    inner = error.cause
    while isinstance(inner, ray.exceptions.RayTaskError):
        inner = inner.cause
    return inner if isinstance(inner, (LinearSRError, *DIED)) else error


def resends(attempts: int) -> AsyncRetrying:
    """Attempts at what fails because a process or machine died, and for no other reason."""
    return AsyncRetrying(
        retry=retry_if_exception_type(DIED),
        stop=stop_after_attempt(attempts),
        wait=wait_random_exponential(0.1, max=2),
        reraise=True,
    )
