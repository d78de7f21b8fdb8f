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
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar

import ray
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from linearsr.config import FileOptions
from linearsr.distributed.models import load_upscaler
from linearsr.distributed.serve.config import ServeConfig
from linearsr.distributed.serve.expert import Handoff
from linearsr.distributed.serve.finisher import Finisher
from linearsr.distributed.serve.retry import (
    ReplicaDied,
    RetryableError,
    StaleModel,
    WeightsChanged,
    cause,
    retry_policy,
)
from linearsr.pipeline.codec import read_tagged
from linearsr.pipeline.memory import OutOfMemory
from linearsr.pipeline.state import UpscaleState
from linearsr.web.service import Events, NotReady, Progress, Request, Result

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
        # No GPU is reserved here.
        self.upscaler = load_upscaler(config.model, "cpu", only=())
        self.local = Finisher(config, "cpu") if finisher is None else None
        self.experts = {e: handle for of, handle in zip(groups, experts, strict=True) for e in of}
        self.finisher = finisher
        self.threads = ThreadPoolExecutor(config.places)

    async def upscale(self, request: Request) -> Events:
        """See `linearsr.web.service.Service`."""
        try:
            async with aclosing(self._upscale(request)) as events:
                async for event in events:
                    yield event
        except StaleModel:
            raise  # to the ingress, which knows the new routers
        except RetryableError as error:
            raise NotReady(f"{error}, again and again; try again later") from error

    async def _upscale(self, request: Request) -> Events:
        began = time.perf_counter()
        picture, options = await self._threaded(
            read_tagged, self.upscaler, request.data, request.options, request.files
        )
        for tile in self.upscaler.tile_sizes(picture, options):
            with contextlib.suppress(OutOfMemory):
                job = await self._threaded(self.upscaler.prepare, picture, options, tile)
                prepared = 1000 * (time.perf_counter() - began)
                async with aclosing(self._attempts(job, request)) as events:
                    async for event in events:
                        if isinstance(event, Result):
                            event = replace(event, timing={"prepare": prepared, **event.timing})
                        yield event
                return
        raise OutOfMemory("the experts' memory did not suffice; try a smaller picture or tile")

    async def _attempts(self, job: UpscaleState, request: Request) -> Events:
        """Sent again from the start when it failed on the way by no fault of its own.

        While there is no replica at all, Serve keeps what is sent until there is one.
        """
        async for attempt in retry_policy(
            self.config.attempts, kinds=(ReplicaDied, WeightsChanged)
        ):
            sent = time.perf_counter()
            responses = self._send(job)
            if request.progress:
                async for progress in self._progress(job, responses):
                    yield progress
            with attempt:
                result = await self._finished(job, responses[-1], request.files)
        spent = 1000 * (time.perf_counter() - sent) - sum(result.timing.values())
        yield replace(result, timing={**result.timing, "travel": spent})

    def _send(self, job: UpscaleState) -> list[DeploymentResponse]:
        """One call for each segment, all at once: each waits for the one before it by itself."""
        responses: list[DeploymentResponse] = []
        for segment in job.segments:
            passed = (
                responses[-1] if responses else Handoff(job.denoise_state(), self.upscaler.config)
            )
            responses.append(self.experts[segment.expert].denoise.remote(passed, segment))
        return responses

    async def _progress(
        self, job: UpscaleState, responses: Sequence[DeploymentResponse]
    ) -> AsyncIterator[Progress]:
        for segment, response in zip(job.segments, responses, strict=True):
            yield Progress(self._name(segment.expert), segment.start, job.steps)
            try:
                # As Serve itself waits for an argument: until it is there, without fetching it.
                await (await response._to_object_ref())._ready()
            except Exception:
                return  # what it failed with, the last one of them will raise
            yield Progress(self._name(segment.expert), segment.stop, job.steps)

    def _name(self, expert: int) -> str:
        return self.upscaler.expert_name(expert)

    async def _finished(
        self, job: UpscaleState, last: DeploymentResponse, files: FileOptions
    ) -> Result:
        try:
            if self.local is not None:
                return await self.local.finish(job, await last, files)
            assert self.finisher is not None
            result: Result = await self.finisher.finish.remote(job, last, files)
            return result
        except (ray.exceptions.RayError, RayServeException) as error:
            raise cause(error) from error

    async def _threaded(self, work: Callable[..., Value], *given: Any, **named: Any) -> Value:
        """`work` in a thread: others' requests are answered meanwhile."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.threads, lambda: work(*given, **named))
