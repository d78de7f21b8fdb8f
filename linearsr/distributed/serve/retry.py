"""Retries: which failures are retried, how often, and the loop that does it.

A retry changes nothing in the result: the same seed gives the same pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing

import ray
from ray.serve.exceptions import DeploymentUnavailableError
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    wait_random_exponential,
)

from linearsr.errors import LinearSRError
from linearsr.web.service import Events, NotReady, Result

# Give a request up when this many replicas have died with it: it may be what kills them.
MAX_DEATHS = 5
# Ray's errors for a process or a node that died.
DEATHS = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.NodeDiedError,
)


class RetryableError(LinearSRError):
    """The request failed through no fault of its own; a retry may succeed."""


class ReplicaDied(RetryableError):
    """A replica, or its node, died while it worked on the request."""


class WeightsChanged(RetryableError):
    """The request met experts with the weights of two models: a roll-out is going on."""


class StaleModel(RetryableError):
    """The request was planned for a model that is no longer served: a new router must plan it."""


class NoCapacity(RetryableError):
    """All slots were taken when a request was sent again; it waits, while a new one is refused."""


def unwrap(error: BaseException) -> Exception:
    """Return what was raised in another process, without Ray's wrappers (not all can be pickled).

    The death of a process or node becomes ReplicaDied, a deployment that is gone StaleModel.
    """
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, DEATHS):
            return ReplicaDied("a replica died while it worked on the request")
        if isinstance(inner, DeploymentUnavailableError):
            return StaleModel("a part of the endpoint is being replaced; send the request again")
        wrapped = inner.cause if isinstance(inner, ray.exceptions.RayTaskError) else None
        if wrapped is None and isinstance(inner, LinearSRError):
            return inner
        inner = wrapped or inner.__cause__
    return error if isinstance(error, Exception) else RuntimeError(repr(error))


def retry_policy(kinds: tuple[type[RetryableError], ...], max_deaths: int) -> AsyncRetrying:
    """Return a policy that retries errors of these kinds, until replicas died `max_deaths` times.

    Only deaths are counted: the other kinds are retried until the request's time is up.
    """
    deaths = 0

    def died_too_often(state: RetryCallState) -> bool:
        nonlocal deaths
        deaths += state.outcome is not None and isinstance(state.outcome.exception(), ReplicaDied)
        return deaths >= max_deaths

    return AsyncRetrying(
        retry=retry_if_exception_type(kinds),
        stop=died_too_often,
        wait=wait_random_exponential(0.1, max=2),
        reraise=True,
    )


async def with_retries(attempt: Callable[[int], Events], *kinds: type[RetryableError]) -> Events:
    """Yield the events of `attempt(number)`, from the start again after an error of these kinds.

    attempt: starts attempt `number`, counted from 1. Its result is yielded when its generator has
        ended, so that a caller who stops at the result does not cancel an attempt that is over.
    Raises NotReady when replicas died too often, and any other error of an attempt as it is.
    """
    try:
        async for retry in retry_policy(kinds, MAX_DEATHS):
            with retry:
                async with aclosing(attempt(retry.retry_state.attempt_number)) as events:
                    async for event in events:
                        if isinstance(event, Result):
                            result = event
                        else:
                            yield event
    except ReplicaDied as error:
        raise NotReady(f"{error}, {MAX_DEATHS} times; try again later") from error
    yield result
