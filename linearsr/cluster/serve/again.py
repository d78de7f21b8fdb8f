"""What may be sent again, and how often: the same seed gives the same pixels."""

from __future__ import annotations

import ray
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


class Again(LinearSRError):
    """A request that failed by no fault of its own."""


class Died(Again):
    """A process or machine died with it in hand."""


class Replaced(Again):
    """It met replicas of two models, of which the older are on their way out."""


def cause(error: BaseException) -> Exception:
    """What was raised in another process, or Died: without Ray's wrappings, some of which cannot
    be sent on.
    """
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, DIED):
            return Died("a machine died with the request in hand")
        wrapped = inner.cause if isinstance(inner, ray.exceptions.RayTaskError) else None
        if wrapped is None and isinstance(inner, LinearSRError):
            return inner
        inner = wrapped or inner.__cause__
    return error if isinstance(error, Exception) else RuntimeError(repr(error))


def resends(attempts: int) -> AsyncRetrying:
    """Up to `attempts` for a request that is died with: it may be what kills.

    One that met two models goes on until there is one, or its time is up.
    """

    def enough(state: RetryCallState) -> bool:
        died = state.outcome is not None and isinstance(state.outcome.exception(), Died)
        return died and state.attempt_number >= attempts

    return AsyncRetrying(
        retry=retry_if_exception_type(Again),
        stop=enough,
        wait=wait_random_exponential(0.1, max=2),
        reraise=True,
    )
