"""What is sent again, and how often. No cluster is needed."""

from __future__ import annotations

import asyncio

import pytest
import ray

from linearsr.cluster.serve.again import Died, Replaced, cause, resends
from linearsr.errors import LinearSRError, WeightsError


def tries(errors: list[Exception], attempts: int) -> int:
    """How often is tried what fails with these in turn, and then does not."""
    count = 0

    async def at_once(_: float) -> None:
        return

    async def run() -> None:
        nonlocal count
        async for attempt in resends(attempts).copy(sleep=at_once):
            with attempt:
                count += 1
                if count <= len(errors):
                    raise errors[count - 1]

    asyncio.run(run())
    return count


def test_who_died_with_it_is_counted() -> None:
    assert tries([], 2) == 1
    assert tries([Died()], 2) == 2
    with pytest.raises(Died):
        tries([Died(), Died()], 2)


def test_who_was_replaced_is_waited_for() -> None:
    assert tries([Replaced()] * 20, 2) == 21


def test_what_is_wrong_with_a_request_stays_wrong() -> None:
    with pytest.raises(WeightsError):
        tries([WeightsError("no")], 5)


def test_causes_are_found_below_ray() -> None:
    died = ray.exceptions.ActorDiedError()
    assert isinstance(cause(died), Died)
    upstream = RuntimeError("an argument could not be had")
    upstream.__cause__ = died
    assert isinstance(cause(upstream), Died)
    own = LinearSRError("too large")
    task = ray.exceptions.RayTaskError("upscale", "traceback", own)
    assert cause(task) is own
    other = ValueError("a bug")
    assert cause(other) is other
