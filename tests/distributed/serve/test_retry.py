"""Retries of the ingress and of experts, without a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from PIL import Image
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from linearsr.config import FileOptions, Options
from linearsr.distributed.serve import ServeConfig
from linearsr.distributed.serve.expert import Experts, Handoff
from linearsr.distributed.serve.ingress import Ingress
from linearsr.distributed.serve.retry import (
    ReplicaDied,
    RetryableError,
    StaleModel,
    WeightsChanged,
    retry_policy,
    unwrap,
)
from linearsr.errors import LinearSRError, WeightsError
from linearsr.imaging.files import from_pil
from linearsr.web.service import (
    Full,
    Limits,
    NotReady,
    Progress,
    Result,
    UpscaleRequest,
)
from linearsr.weights import read_config


def tries(errors: list[Exception], max_deaths: int) -> int:
    """Return the number of attempts if they raise these errors in turn, and then succeed."""
    count = 0

    async def at_once(_: float) -> None:
        return

    async def run() -> None:
        nonlocal count
        async for attempt in retry_policy((RetryableError,), max_deaths).copy(sleep=at_once):
            with attempt:
                count += 1
                if count <= len(errors):
                    raise errors[count - 1]

    asyncio.run(run())
    return count


def test_retry_stops_after_the_last_allowed_death() -> None:
    assert tries([], 2) == 1
    assert tries([ReplicaDied()], 2) == 2
    with pytest.raises(ReplicaDied):
        tries([ReplicaDied(), ReplicaDied()], 2)


def test_retry_goes_on_while_weights_change() -> None:
    assert tries([WeightsChanged()] * 20, 2) == 21


def test_retry_counts_only_replica_deaths() -> None:
    assert tries([WeightsChanged()] * 20 + [ReplicaDied()], 2) == 22
    with pytest.raises(ReplicaDied):
        tries([ReplicaDied(), WeightsChanged(), ReplicaDied()], 2)


def test_error_of_the_request_is_not_retried() -> None:
    with pytest.raises(WeightsError):
        tries([WeightsError("no")], 5)


def test_unwrap_finds_the_cause_below_ray() -> None:
    died = ray.exceptions.ActorDiedError()
    assert isinstance(unwrap(died), ReplicaDied)
    upstream = RuntimeError("an argument could not be had")
    upstream.__cause__ = died
    assert isinstance(unwrap(upstream), ReplicaDied)
    own = LinearSRError("too large")
    task = ray.exceptions.RayTaskError("upscale", "traceback", own)
    assert unwrap(task) is own
    gone = unwrap(DeploymentUnavailableError.__new__(DeploymentUnavailableError))
    assert isinstance(gone, StaleModel)
    other = ValueError("a bug")
    assert unwrap(other) is other


def test_experts_refuse_requests_of_another_model(small_bundle: Path) -> None:
    experts = Experts(ServeConfig(model=str(small_bundle), device="cpu"), (0,))
    picture = from_pil(Image.fromarray(np.zeros((8, 8, 3), np.uint8)))
    state = experts.upscaler.prepare(picture, Options(steps=4))
    planned = Handoff(state.denoise_state(), experts.upscaler.config)
    segment = state.segments[0]

    async def at_once(item: Any) -> None:
        experts._denoise_batch([item])

    experts.queues[0] = at_once  # Serve's queue works in a replica only

    async def denoise(passed: Handoff) -> Handoff:
        return await experts.denoise(passed, segment)

    after = asyncio.run(denoise(planned))
    assert after.weights == str(small_bundle)
    with pytest.raises(WeightsChanged):
        asyncio.run(denoise(replace(planned, weights="other")))
    other = planned.config.model_copy(update={"name": "other"})
    with pytest.raises(StaleModel):
        asyncio.run(denoise(replace(planned, config=other)))


class FakeRouter:
    """A handle whose calls yield these events in turn, or raise them."""

    def __init__(self, *calls: list[Any]) -> None:
        self.calls = list(calls)
        self.cancelled = 0

    @property
    def upscale(self) -> FakeRouter:
        return self

    def options(self, **_: object) -> FakeRouter:
        return self

    def remote(self, _: UpscaleRequest) -> FakeCall:
        return FakeCall(self, self.calls.pop(0))


class FakeCall:
    def __init__(self, router: FakeRouter, events: list[Any]) -> None:
        self.router, self.events = router, events

    async def __aiter__(self) -> AsyncIterator[Any]:
        for event in self.events:
            if isinstance(event, Exception):
                raise event
            yield event

    def cancel(self) -> None:
        self.router.cancelled += 1


RESULT = Result(b"", "png", 1, 1, "small", 0, 4, 4.0)
BEGUN = Progress("structure", 0, 4)


def ingress_over(small_bundle: Path, *calls: list[Any]) -> tuple[Ingress, FakeRouter]:
    router = FakeRouter(*calls)
    model = read_config(small_bundle)
    ingress = Ingress(
        Limits(), model, router, [], jobs=None, token=None, cors_origins=(), allowed_hosts=()
    )
    return ingress, router


async def first_result(ingress: Ingress) -> list[Any]:
    """Return the events up to the result, after which the HTTP API stops too."""
    requests: list[Any] = []
    async with aclosing(ingress.upscale(UpscaleRequest(b"", Options(), FileOptions()))) as events:
        async for event in events:
            requests.append(event)
            if isinstance(event, Result):
                break
    return requests


def test_finished_request_is_timed_and_not_cancelled(small_bundle: Path) -> None:
    ingress, router = ingress_over(small_bundle, [BEGUN, RESULT])
    assert asyncio.run(first_result(ingress)) == [BEGUN, RESULT]
    assert len(ingress.sender.durations) == 1 and router.cancelled == 0


def test_retry_waits_for_a_slot_but_new_request_is_refused(small_bundle: Path) -> None:
    full = BackPressureError(num_queued_requests=1, max_queued_requests=1)
    died = ray.exceptions.ActorDiedError()
    ingress, _ = ingress_over(small_bundle, [BEGUN, died], [full], [BEGUN, RESULT], [full])

    async def run() -> None:
        assert await first_result(ingress) == [BEGUN, BEGUN, RESULT]
        with pytest.raises(Full):
            await first_result(ingress)

    asyncio.run(run())


def test_drain_waits_for_requests_and_refuses_new_ones(small_bundle: Path) -> None:
    ingress, _ = ingress_over(small_bundle, [BEGUN, RESULT])

    async def run() -> None:
        events = ingress.upscale(UpscaleRequest(b"", Options(), FileOptions()))
        assert await anext(events) == BEGUN
        draining = asyncio.create_task(ingress.drain())
        await asyncio.sleep(0)
        assert not draining.done()
        with pytest.raises(NotReady):
            await first_result(ingress)
        with pytest.raises(NotReady):
            await ingress.ready()
        assert await anext(events) == RESULT
        await events.aclose()
        await draining

    asyncio.run(run())
