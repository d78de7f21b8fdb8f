"""The ingress: it answers HTTP, and sends each request to a router."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

from ray.serve.handle import DeploymentHandle

from linearsr.config import ModelConfig
from linearsr.distributed.serve.jobs import RemoteJobs
from linearsr.distributed.serve.sender import Sender
from linearsr.web.api import create_app, digest
from linearsr.web.service import Events, Limits, NotReady, UpscaleRequest

# The environment variable with the bearer token that uploads need.
TOKEN = "LINEARSR_TOKEN"
# A replica that has not answered a health check by then counts as gone.
READY_SECONDS = 5


class Ingress:
    """A `linearsr.web.service.Service` over the handles of the other deployments.

    workers: the experts, and the finisher where there is one. jobs: the deployment that keeps jobs;
    None if there are none. token: digest of the bearer token; None for that of this process's
    environment.
    """

    def __init__(
        self,
        limits: Limits,
        model: ModelConfig,
        router: DeploymentHandle,
        workers: Sequence[DeploymentHandle],
        jobs: DeploymentHandle | None,
        token: str | None,
        cors_origins: Sequence[str],
        allowed_hosts: Sequence[str],
    ) -> None:
        self.limits = limits
        self.model = model
        self.router = router
        self.workers = workers
        self.jobs = RemoteJobs(jobs, self._check_open) if jobs else None
        self.token = token or digest(os.environ.get(TOKEN))
        self.cors_origins = cors_origins
        self.allowed_hosts = allowed_hosts
        self.sender = Sender(router)
        self.budget: int | None = None
        self.draining = False
        self.in_flight = 0
        self.idle = asyncio.Event()
        self.idle.set()

    def __serve_build_asgi_app__(self) -> Any:
        """Return the application that Serve puts behind its proxy."""
        return create_app(
            self,
            self.limits,
            self.token,
            jobs=self.jobs,
            cors_origins=self.cors_origins,
            allowed_hosts=self.allowed_hosts,
            warm_up=True,
        )

    def models(self) -> list[ModelConfig]:
        """Return the config of the one model that is served."""
        return [self.model]

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

    async def memory(self) -> int:
        """Return the memory that a router has for its requests, in bytes. Raises NotReady."""
        if self.budget is None:
            try:
                self.budget = await asyncio.wait_for(self._budget(), READY_SECONDS)
            except Exception as error:
                raise NotReady("no router answers yet; try again soon") from error
        return self.budget

    async def upscale(self, request: UpscaleRequest) -> Events:
        """Yield progress, then the result; start again with another router if the first one died.

        Raises Full if all slots are taken, and NotReady while the endpoint shuts down.
        """
        self._check_open()
        self.in_flight += 1
        self.idle.clear()
        try:
            async with aclosing(self.sender.upscale(request)) as events:
                async for event in events:
                    yield event
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self.idle.set()

    async def drain(self) -> None:
        """Refuse new requests, return when those in flight have finished, and end all jobs."""
        self.draining = True
        await self.idle.wait()
        if self.jobs:
            await self.jobs.clear()

    def _check_open(self) -> None:
        if self.draining:
            raise NotReady("the endpoint is shutting down; try again later")

    async def _budget(self) -> int:
        return await self.router.memory.remote()
