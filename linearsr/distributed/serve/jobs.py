"""Jobs on a cluster: one deployment keeps them, and every ingress asks it.

The deployment's only replica may die: what it keeps lies in files. They are in a folder of Ray's
session on the head node, which lives as long as the cluster, or in a folder that all nodes share.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from linearsr.distributed.compat import application_ends, session_folder
from linearsr.distributed.serve.retry import (
    MAX_DEATHS,
    ReplicaDied,
    StaleModel,
    retry_policy,
    unwrap,
)
from linearsr.distributed.serve.sender import Sender
from linearsr.web.jobs import JobState, JobStore
from linearsr.web.service import JobLimits, NotReady, Result, UpscaleRequest

FOLDER = "linearsr-jobs"


class JobKeeper:
    """The replica that keeps all jobs and works on them through the routers.

    folder: a folder that all nodes share; None for one of Ray's session on this node.
    """

    async def __init__(  # type: ignore[misc]
        self, limits: JobLimits, folder: str | None, router: DeploymentHandle
    ) -> None:
        self.application = serve.get_replica_context().app_name
        base = Path(folder) if folder else session_folder() / FOLDER
        self.store = JobStore(Sender(router, waits=True), limits, base / self.application)
        await self.store.start()

    async def submit(self, id: str, request: UpscaleRequest, name: str, owner: str) -> JobState:
        """See `linearsr.web.jobs.Jobs`."""
        return await self.store.submit(id, request, name, owner)

    async def get(self, id: str, owner: str) -> JobState:
        """See `linearsr.web.jobs.Jobs`."""
        return await self.store.get(id, owner)

    async def content(self, id: str, owner: str) -> tuple[Result, str]:
        """See `linearsr.web.jobs.Jobs`."""
        return await self.store.content(id, owner)

    async def delete(self, id: str, owner: str) -> None:
        """See `linearsr.web.jobs.Jobs`."""
        await self.store.delete(id, owner)

    async def clear(self) -> None:
        """Cancel and forget all jobs."""
        await self.store.clear()

    async def __del__(self) -> None:
        # Serve awaits this when it stops the replica. In a roll-out the next one goes on with the
        # jobs; when the whole application ends, nobody could fetch them.
        if application_ends(self.application):
            await self.store.clear()


class RemoteJobs:
    """The `linearsr.web.jobs.Jobs` of an ingress. A call whose replica dies is made again.

    check_open: raises NotReady if no new job may be begun.
    """

    def __init__(self, keeper: DeploymentHandle, check_open: Callable[[], None]) -> None:
        self.keeper = keeper
        self.check_open = check_open

    async def submit(self, id: str, request: UpscaleRequest, name: str, owner: str) -> JobState:
        """See `linearsr.web.jobs.Jobs`. Raises NotReady while the endpoint shuts down."""
        self.check_open()
        return await self._call("submit", id, request, name, owner)

    async def get(self, id: str, owner: str) -> JobState:
        """See `linearsr.web.jobs.Jobs`."""
        return await self._call("get", id, owner)

    async def content(self, id: str, owner: str) -> tuple[Result, str]:
        """See `linearsr.web.jobs.Jobs`."""
        return await self._call("content", id, owner)

    async def delete(self, id: str, owner: str) -> None:
        """See `linearsr.web.jobs.Jobs`."""
        await self._call("delete", id, owner)

    async def clear(self) -> None:
        """Cancel and forget all jobs."""
        await self._call("clear")

    async def _call(self, method: str, *arguments: Any) -> Any:
        try:
            async for attempt in retry_policy((ReplicaDied, StaleModel), MAX_DEATHS):
                with attempt:
                    try:
                        return await getattr(self.keeper, method).remote(*arguments)
                    except (ray.exceptions.RayError, RayServeException) as error:
                        raise unwrap(error) from error
        except ReplicaDied as error:
            raise NotReady("the jobs cannot be reached; try again later") from error
        raise AssertionError("unreachable")
