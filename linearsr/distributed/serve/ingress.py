"""The ingress: it answers HTTP, and sends each request to a router."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections import deque
from collections.abc import Sequence
from contextlib import aclosing
from functools import partial
from statistics import median
from typing import Any

import ray
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from linearsr.distributed.serve.retry import (
    NoCapacity,
    ReplicaDied,
    StaleModel,
    unwrap,
    with_retries,
)
from linearsr.web.api import create_app
from linearsr.web.service import (
    Events,
    Full,
    Limits,
    ModelInfo,
    NotReady,
    Result,
    UpscaleRequest,
)

# The environment variable with the bearer token that uploads need.
TOKEN = "LINEARSR_TOKEN"
# A refused request is told to wait as long as recent requests took; until there was one, this long.
RETRY_AFTER_SECONDS = 2
# A replica that has not answered a health check by then counts as gone.
READY_SECONDS = 5


class Ingress:
    """A `linearsr.web.service.Service` over the handles of the other deployments.

    workers: the experts, and the finisher where there is one.
    """

    def __init__(
        self,
        limits: Limits,
        info: ModelInfo,
        router: DeploymentHandle,
        workers: Sequence[DeploymentHandle],
    ) -> None:
        self.limits = limits
        self.info = info
        self.router = router
        self.workers = workers
        self.draining = False
        self.in_flight = 0
        self.idle = asyncio.Event()
        self.idle.set()
        self.durations: deque[float] = deque(maxlen=32)

    def __serve_build_asgi_app__(self) -> Any:
        """Return the application that Serve puts behind its proxy."""
        return create_app(self, self.limits, os.environ.get(TOKEN) or None)

    def models(self) -> list[ModelInfo]:
        """Return the one model that is served."""
        return [self.info]

    async def ready(self) -> None:
        """Raise NotReady unless a replica of every expert, and of the finisher, answers.

        They are asked directly: through the router, the health check would wait for a slot.
        """
        self._check_open()
        calls = (worker.ready.remote() for worker in self.workers)
        try:
            await asyncio.wait_for(asyncio.gather(*calls), READY_SECONDS)
        except Exception as error:
            raise NotReady("some experts have not loaded yet; try again soon") from error

    async def upscale(self, request: UpscaleRequest) -> Events:
        """Yield progress, then the result; start again with another router if the first one died.

        Raises Full if all slots are taken, and NotReady while the endpoint shuts down.
        """
        self._check_open()
        self.in_flight += 1
        self.idle.clear()
        start = time.perf_counter()
        attempts = with_retries(partial(self._send, request), ReplicaDied, StaleModel, NoCapacity)
        try:
            async with aclosing(attempts) as events:
                async for event in events:
                    if isinstance(event, Result):
                        self.durations.append(time.perf_counter() - start)
                    yield event
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self.idle.set()

    async def drain(self) -> None:
        """Refuse new requests, and return when those in flight have finished."""
        self.draining = True
        await self.idle.wait()

    def _check_open(self) -> None:
        if self.draining:
            raise NotReady("the endpoint is shutting down; try again later")

    async def _send(self, request: UpscaleRequest, attempt: int) -> Events:
        """Send the request to a router, and cancel it there if this generator is closed."""
        events = self.router.upscale.options(stream=True).remote(request)
        try:
            async for event in events:
                yield event
        except BackPressureError as error:
            if attempt > 1:
                raise NoCapacity("all slots are taken") from error
            wait = median(self.durations) if self.durations else RETRY_AFTER_SECONDS
            raise Full(math.ceil(wait)) from None
        except (ray.exceptions.RayError, RayServeException) as error:
            raise unwrap(error) from error
        except (GeneratorExit, asyncio.CancelledError):
            events.cancel()
            raise
