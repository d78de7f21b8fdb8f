"""Send requests to the routers, and send them again when a router dies."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from contextlib import aclosing
from functools import partial
from statistics import median

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
from linearsr.web.service import Events, Full, Result, UpscaleRequest

# A refused request is told to wait as long as recent requests took; until there was one, this long.
RETRY_AFTER_SECONDS = 2


class Sender:
    """The way to the routers.

    waits: whether a request waits when all slots are taken, and is not refused with Full.
    """

    def __init__(self, router: DeploymentHandle, *, waits: bool = False) -> None:
        self.router = router
        self.waits = waits
        self.durations: deque[float] = deque(maxlen=32)

    async def upscale(self, request: UpscaleRequest) -> Events:
        """Yield progress, then the result; start again with another router if the first one died.

        Raises Full if all slots are taken.
        """
        start = time.perf_counter()
        attempts = with_retries(partial(self._send, request), ReplicaDied, StaleModel, NoCapacity)
        async with aclosing(attempts) as events:
            async for event in events:
                if isinstance(event, Result):
                    self.durations.append(time.perf_counter() - start)
                yield event

    async def _send(self, request: UpscaleRequest, attempt: int) -> Events:
        """Send the request to a router, and cancel it there if this generator is closed."""
        events = self.router.upscale.options(stream=True).remote(request)
        try:
            async for event in events:
                yield event
        except BackPressureError as error:
            if attempt > 1 or self.waits:
                raise NoCapacity("all slots are taken") from error
            wait = median(self.durations) if self.durations else RETRY_AFTER_SECONDS
            raise Full(math.ceil(wait)) from None
        except (ray.exceptions.RayError, RayServeException) as error:
            raise unwrap(error) from error
        except (GeneratorExit, asyncio.CancelledError):
            events.cancel()
            raise
