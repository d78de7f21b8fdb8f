"""The router: it decodes and plans a request, sends it through the experts, and encodes the result.

    prepare ─▶ experts, by `plan()`: each result goes straight to the next one ─▶ finish

The latents do not come back to the router in between: each call receives the previous call's
future.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import ray
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from linearsr.config import Options
from linearsr.distributed.compat import delete_note
from linearsr.distributed.models import load_upscaler
from linearsr.distributed.serve.budget import MemoryBudget
from linearsr.distributed.serve.config import ServeConfig
from linearsr.distributed.serve.expert import Handoff
from linearsr.distributed.serve.finisher import Finisher
from linearsr.distributed.serve.progress import SECONDS, noted_share
from linearsr.distributed.serve.retry import ReplicaDied, WeightsChanged, unwrap, with_retries
from linearsr.imaging.files import Picture
from linearsr.pipeline.codec import read_tagged
from linearsr.pipeline.memory import OutOfMemory, free_memory, give_back_freed_memory
from linearsr.pipeline.state import UpscaleState
from linearsr.web.estimate import bytes_needed
from linearsr.web.pages import upscale_pages
from linearsr.web.service import Events, Progress, UpscaleRequest

Value = TypeVar("Value")
# The part of a node's free memory that requests may need; the rest is for the experts, and for the
# latents between them.
SHARE_OF_MEMORY = 0.7
# Bytes that a request needs from which freed memory is given back to Linux.
LARGE = 2**30


class Router:
    """A replica that decodes, plans, routes and encodes; it holds no expert.

    groups: the experts behind each handle of `experts`.
    finisher: the deployment that decodes a learned latent; None if the router does it itself.
    """

    def __init__(
        self,
        config: ServeConfig,
        groups: Sequence[Sequence[int]],
        experts: Sequence[DeploymentHandle],
        finisher: DeploymentHandle | None,
    ) -> None:
        # On the CPU: a router reserves no GPU.
        self.upscaler = load_upscaler(config.model, "cpu", only=(), tagger=config.tagger)
        self.local = Finisher(config, "cpu") if finisher is None else None
        self.finisher = finisher
        self.experts = {
            expert: handle
            for group, handle in zip(groups, experts, strict=True)
            for expert in group
        }
        self.threads = ThreadPoolExecutor(config.max_ongoing_requests)
        share = int(SHARE_OF_MEMORY * free_memory() / config.routers)
        self.budget = MemoryBudget(config.router_memory or share)

    async def memory(self) -> int:
        """Return the memory in bytes that requests may need together."""
        return self.budget.total

    async def upscale(self, request: UpscaleRequest) -> Events:
        """Yield progress, then the result: see `linearsr.web.service.Service`.

        All pages of a TIFF file are upscaled in turn if the result is one, in the same slot. A
        request waits while others need the memory. Raises StaleModel if the experts have a new
        model; the ingress then sends the request to a new router.
        """
        read, upscale = partial(self._read, request), partial(self._upscale, request)
        config, options = self.upscaler.config, request.options
        needed = max((bytes_needed(config, *p, options) for p in request.pages), default=0)
        async with self.budget.reserve(needed):
            try:
                async with aclosing(upscale_pages(request.files, read, upscale)) as events:
                    async for event in events:
                        yield event
            finally:
                if needed >= LARGE:
                    await self._in_thread(give_back_freed_memory)

    async def _read(self, request: UpscaleRequest, page: int) -> tuple[Picture, Options]:
        upscaler, data, options, files = self.upscaler, request.data, request.options, request.files
        return await self._in_thread(read_tagged, upscaler, data, options, files, page=page)

    async def _upscale(
        self, request: UpscaleRequest, picture: Picture, options: Options, start: float
    ) -> Events:
        """Upscale one picture; if an expert runs out of memory, plan again with smaller tiles.

        start: when the work on the picture began, in seconds of `time.perf_counter`.
        """
        for tile in self.upscaler.tile_sizes(picture, options):
            with contextlib.suppress(OutOfMemory):
                state = await self._in_thread(self.upscaler.prepare, picture, options, tile)
                note = uuid.uuid4().hex if request.progress else None
                # Put once, for all attempts, and not held a second time by this process.
                handoff = Handoff(state.denoise_state(), self.upscaler.config, note=note)
                first = await self._in_thread(ray.put, handoff)
                del handoff
                state = replace(state, latents=())
                prepared = 1000 * (time.perf_counter() - start)
                send = partial(self._send, state, first, request, prepared, note)
                try:
                    async with aclosing(with_retries(send, ReplicaDied, WeightsChanged)) as events:
                        async for event in events:
                            yield event
                finally:
                    if note:
                        self.threads.submit(delete_note, note)
                return
        raise OutOfMemory("an expert ran out of memory; try a smaller picture or tile")

    async def _send(
        self,
        state: UpscaleState,
        first: Any,
        request: UpscaleRequest,
        prepared: float,
        note: str | None,
        _attempt: int,
    ) -> Events:
        """Send a planned request through its experts, once.

        first: reference of its Handoff. note: see `Handoff`.

        All calls are made at once: each waits for the previous one by itself. While an expert has
        no replica, Serve keeps its calls until there is one. prepared: milliseconds spent so far.
        """
        start = time.perf_counter()
        responses: deque[DeploymentResponse] = deque()
        for segment in state.segments:
            handoff = responses[-1] if responses else first
            responses.append(self.experts[segment.expert].denoise.remote(handoff, segment))
        last = responses[-1]
        if note:
            async for progress in self._progress(state, responses, note):
                yield progress
        responses.clear()  # what lies between two experts is freed when the second one has ended
        try:
            if self.local is not None:
                result = await self.local.finish(state, await last, request.files)
            else:
                assert self.finisher is not None
                result = await self.finisher.finish.remote(state, last, request.files)
        except (ray.exceptions.RayError, RayServeException) as error:
            raise unwrap(error) from error
        travel = 1000 * (time.perf_counter() - start) - sum(result.timing.values())
        yield replace(result, timing={"prepare": prepared, **result.timing, "travel": travel})

    async def _progress(
        self, state: UpscaleState, responses: deque[DeploymentResponse], note: str
    ) -> Events:
        """Yield progress as each expert begins, between its tiles, and as it ends.

        It stops at a failure, which the last response raises, as it depends on all others.
        responses: one for each segment; they are removed. note: the experts' key.
        """
        for segment in state.segments:
            expert, part = self.upscaler.expert_name(segment.expert), 0.0
            yield Progress(expert, segment.start, state.steps)
            done = asyncio.ensure_future(_finished(responses.popleft()))
            try:
                while not (await asyncio.wait([done], timeout=SECONDS))[0]:
                    share = await self._in_thread(noted_share, note, segment.expert)
                    if share * (segment.stop - segment.start) > part:
                        part = share * (segment.stop - segment.start)
                        yield Progress(expert, segment.start, state.steps, part)
                if not done.result():
                    return
            finally:
                done.cancel()
            yield Progress(expert, segment.stop, state.steps)

    async def _in_thread(self, work: Callable[..., Value], *args: Any, **kwargs: Any) -> Value:
        """Run `work` in a thread, so that the router goes on to answer other requests."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.threads, partial(work, *args, **kwargs))


async def _finished(response: DeploymentResponse) -> bool:
    """Wait for a result without fetching it, as Serve does for a call's arguments.

    Returns whether there is one.
    """
    try:
        await (await response._to_object_ref())._ready()
    except Exception:
        return False
    return True
