"""What may be sent again, and how often: the same seed gives the same pixels."""

from __future__ import annotations

import ray
from ray.serve.exceptions import DeploymentUnavailableError
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    wait_random_exponential,
)

from linearsr.errors import LinearSRError

# What a process or a machine that died looks like from here.
DIED = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.NodeDiedError,
)


class RetryableError(LinearSRError):
    """A request that failed by no fault of its own."""


class ReplicaDied(RetryableError):
    """A process or machine died with it in hand."""


class WeightsChanged(RetryableError):
    """It met experts with two models' weights, of which the older are on their way out."""


class StaleModel(RetryableError):
    """It was planned for a model that is served no more: a newer router must plan it anew."""


class NoCapacity(RetryableError):
    """The places were taken while it was sent again: unlike a new one, it waits for one."""


def cause(error: BaseException) -> Exception:
    """What was raised in another process, or ReplicaDied: without Ray's wrappings, some of which cannot
    be sent on.
    """
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, DIED):
            return ReplicaDied("a machine died with the request in hand")
        if isinstance(inner, DeploymentUnavailableError):
            return StaleModel("the deployment it was sent to is gone")
        wrapped = inner.cause if isinstance(inner, ray.exceptions.RayTaskError) else None
        if wrapped is None and isinstance(inner, LinearSRError):
            return inner
        inner = wrapped or inner.__cause__
    return error if isinstance(error, Exception) else RuntimeError(repr(error))


def retry_policy(
    attempts: int, *, kinds: tuple[type[RetryableError], ...] = (RetryableError,)
) -> AsyncRetrying:
    """Attempts at what fails in one of these ways, until it has died `attempts` times.

    It may be what kills; for other reasons it goes on until its time is up.
    """
    deaths = 0

    def enough(state: RetryCallState) -> bool:
        nonlocal deaths
        deaths += state.outcome is not None and isinstance(state.outcome.exception(), ReplicaDied)
        return deaths >= attempts

    return AsyncRetrying(
        retry=retry_if_exception_type(kinds),
        stop=enough,
        wait=wait_random_exponential(0.1, max=2),
        reraise=True,
    )
