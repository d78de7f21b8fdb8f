"""The HTTP API without a cluster: a service in this process, and a real server on a free port.

Use both together: `with served(Local(upscaler)) as url: ...`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn

from linearsr.config import ModelConfig, Options
from linearsr.diffusion.experts import Segment
from linearsr.imaging.files import Picture
from linearsr.pipeline.codec import encode_result, read_tagged
from linearsr.pipeline.memory import free_memory
from linearsr.pipeline.state import UpscaleState
from linearsr.pipeline.upscaler import Upscaler
from linearsr.web.api import create_app, digest
from linearsr.web.guard import Guard, UploadLimits
from linearsr.web.http_parser import LimitedH11
from linearsr.web.jobs import JobStore
from linearsr.web.pages import upscale_pages
from linearsr.web.service import (
    Events,
    Full,
    JobLimits,
    Limits,
    NotReady,
    Progress,
    Result,
    Service,
    UpscaleRequest,
)

# A test that waits longer than this for something to happen fails.
PATIENCE = 60


class Local:
    """A `linearsr.web.service.Service` that runs the stages of an upscaler in threads.

    slots: the number of concurrent requests; more are refused with Full.
    works: whether the service is ready.
    """

    def __init__(self, upscaler: Upscaler, slots: int = 4) -> None:
        self.upscaler = upscaler
        self.slots = self.free = slots
        self._gate = threading.Event()
        self._gate.set()
        self.works = True
        self.requests = 0
        # The largest number of requests at one time.
        self.most = 0
        self.segments = 0
        self._changed = threading.Condition()

    def models(self) -> list[ModelConfig]:
        return [self.upscaler.config]

    async def memory(self) -> int:
        return free_memory()

    async def ready(self) -> None:
        if not self.works:
            raise NotReady("not every expert has loaded; try again soon")

    async def upscale(self, request: UpscaleRequest) -> Events:
        if self.free == 0:
            raise Full(2)
        self.requests += 1
        self._take(1)
        try:
            read, upscale = partial(self._read, request), partial(self._upscale, request)
            async with aclosing(upscale_pages(request.files, read, upscale)) as events:
                async for event in events:
                    yield event
        finally:
            self._take(-1)

    async def _read(self, request: UpscaleRequest, page: int) -> tuple[Picture, Options]:
        upscaler, data, options, files = self.upscaler, request.data, request.options, request.files
        return await asyncio.to_thread(read_tagged, upscaler, data, options, files, page=page)

    async def _upscale(
        self, request: UpscaleRequest, picture: Picture, options: Options, start: float
    ) -> Events:
        tile = next(self.upscaler.tile_sizes(picture, options))
        job = await asyncio.to_thread(self.upscaler.prepare, picture, options, tile)
        timing = {"prepare": 1000 * (time.perf_counter() - start), "queue": 0.0}
        for segment in job.segments:
            expert = self.upscaler.expert_name(segment.expert)
            if request.progress:
                yield Progress(expert, segment.start, job.steps)
            job, timing[expert] = await _timed(self._denoise, job, segment)
            if request.progress:
                yield Progress(expert, segment.stop, job.steps)
        picture, timing["decode"] = await _timed(self.upscaler.finish, job)
        result, timing["encode"] = await _timed(
            encode_result, self.upscaler, picture, job.options, request.files
        )
        model, seed = self.upscaler.config.name, job.options.seed
        yield Result(*result[:4], model, seed, job.steps, job.scale, timing, notes=result.notes)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Make requests wait before their next expert."""
        self._gate.clear()
        try:
            yield
        finally:
            self._gate.set()

    def wait_for(self, free: int) -> None:
        """Return when this number of slots is free."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.free == free, PATIENCE), self.free

    def _take(self, slots: int) -> None:
        with self._changed:
            self.free -= slots
            self.most = max(self.most, self.slots - self.free)
            self._changed.notify_all()

    def _denoise(self, job: UpscaleState, segment: Segment) -> UpscaleState:
        assert self._gate.wait(PATIENCE)
        self.segments += 1
        return self.upscaler.denoise(job, segment)


async def _timed(work: Callable[..., object], *arguments: object) -> tuple:  # type: ignore[type-arg]
    """Run `work` in a thread; return its result and its duration in milliseconds."""
    began = time.perf_counter()
    result = await asyncio.to_thread(work, *arguments)
    return result, 1000 * (time.perf_counter() - began)


class StoreOfTheServer:
    """A store that is made in the event loop of the server that uses it."""

    def __init__(self, service: Service, limits: JobLimits, folder: Path) -> None:
        self.arguments = service, limits, folder
        self.store: JobStore | None = None

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def call(*arguments: Any) -> Any:
            if self.store is None:
                self.store = JobStore(*self.arguments)
                await self.store.start()
            return await getattr(self.store, name)(*arguments)

        return call


class _Server(uvicorn.Server):
    """A server with an event for when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listens = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listens.set()


@contextlib.contextmanager
def served(
    service: Service,
    limits: Limits | None = None,
    token: str | None = None,
    jobs: StoreOfTheServer | None = None,
    learned: tuple[UpscaleRequest, Result] | None = None,
    uploads: UploadLimits | None = None,
) -> Iterator[str]:
    """Run a server in a thread; yield its address, without a slash at the end.

    learned: a request and its result, from which the server knows its speed at the start.
    uploads: limits of the guard, which stands before the application if they are given.
    """
    app = create_app(service, limits or Limits(), digest(token), jobs=jobs)  # type: ignore[arg-type]
    if learned:
        app.state.service.learn(*learned)
    guarded = Guard(app, uploads) if uploads else app
    config = uvicorn.Config(
        guarded,  # type: ignore[arg-type]
        http=LimitedH11 if uploads else "auto",
        log_level="critical",
        timeout_graceful_shutdown=5,
    )
    server = _Server(config)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            assert server.listens.wait(PATIENCE)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(PATIENCE)
