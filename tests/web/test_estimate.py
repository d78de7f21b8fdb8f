"""Estimates of the time that a picture takes, and whether the limits admit it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from linearsr import Upscaler
from linearsr.config import ModelConfig, Options
from linearsr.pipeline.tiling import plan_work
from linearsr.web.api import create_app
from linearsr.web.estimate import Measured, bytes_needed
from linearsr.web.service import Events, Limits, Progress, Result, UpscaleRequest
from tests.helpers.forms import detail
from tests.helpers.local_service import Local

# Seconds per latent cell and step, and per pixel that the network makes, of `Steady`.
CELL, PIXEL = 1e-5, 1e-7


class Steady:
    """A service whose requests take exactly as long as their work says."""

    def __init__(self, config: ModelConfig, memory: int = 2**40) -> None:
        self.config = config
        self.bytes = memory
        self.requests: list[UpscaleRequest] = []

    def models(self) -> list[ModelConfig]:
        return [self.config]

    async def ready(self) -> None:
        pass

    async def memory(self) -> int:
        return self.bytes

    async def upscale(self, request: UpscaleRequest) -> Events:
        self.requests.append(request)
        steps = request.options.steps or self.config.sampling.steps
        timing = {"prepare": 0.0, "queue": 1e6, "structure": 0.0, "texture": 0.0, "decode": 0.0}
        for width, height in request.pages:
            work = plan_work(self.config, height, width, request.options)
            timing["structure"] += 250 * CELL * work.cells * steps
            timing["texture"] += 750 * CELL * work.cells * steps
            timing["prepare"] += 100 * PIXEL * work.size[0] * work.size[1]
            timing["decode"] += 900 * PIXEL * work.size[0] * work.size[1]
        yield Progress("structure", 0, steps)
        yield Result(b"", "png", 4, 4, "small", 0, steps, 4.0, timing)


def ask(client: TestClient, **query: object) -> dict[str, Any]:
    answer = client.get("/v1/estimate", params={key: str(value) for key, value in query.items()})
    assert answer.status_code == 200, answer.text
    return answer.json()


def client_of(service: Any, **limits: Any) -> TestClient:
    return TestClient(create_app(service, Limits(**limits)), raise_server_exceptions=False)


@pytest.mark.parametrize("query", [{}, {"steps": 1}, {"detail": 0}, {"tile": 64}, {"scale": 2}])
def test_estimate_of_any_size_follows_from_the_speed_of_the_warm_up(
    small_config: ModelConfig, query: dict[str, Any]
) -> None:
    client = client_of(Steady(small_config))
    for width, height in ((100, 50), (4000, 3000)):
        options = Options.parse(**query)
        work = plan_work(small_config, height, width, options)
        steps = 1 if query in ({"steps": 1}, {"detail": 0}) else 4
        expected = CELL * work.cells * steps + PIXEL * work.size[0] * work.size[1]
        answer = ask(client, width=width, height=height, **query)
        assert answer["seconds"] == pytest.approx(expected)


def test_estimate_tells_the_size_of_the_result(small_config: ModelConfig) -> None:
    answer = ask(client_of(Steady(small_config)), width=400, height=300, scale=1.5)
    assert (answer["width"], answer["height"]) == (600, 450)
    assert (answer["fits"], answer["detail"]) == (True, "")


def test_requests_change_the_estimate_and_their_wait_does_not(small_config: ModelConfig) -> None:
    measured = Measured(Steady(small_config))

    async def converse() -> None:
        before = await measured.seconds(1000, 1000, Options())
        slow = UpscaleRequest(b"", Options(), None, pages=((2000, 2000),))  # type: ignore[arg-type]
        measured._service.config = small_config  # type: ignore[attr-defined]
        async for _ in measured.upscale(slow):
            pass
        assert await measured.seconds(1000, 1000, Options()) == pytest.approx(before)
        slowed = Result(b"", "png", 4, 4, "small", 0, 4, 4.0, {"structure": 1e6, "decode": 0.0})
        measured.learn(slow, slowed)
        assert await measured.seconds(1000, 1000, Options()) > 1.5 * before

    asyncio.run(converse())


def test_real_request_is_estimated_within_a_factor_of_four(small: Upscaler) -> None:
    """A busy machine may be slow for a moment; benchmarks measure how good estimates are."""
    client = client_of(Local(small))
    assert 0 < ask(client, width=64, height=64)["seconds"] < 600
    # The warm-up is enough: nothing is upscaled for a second question.
    service = Local(small)
    client = client_of(service)
    ask(client, width=64, height=64)
    requests = service.requests
    ask(client, width=4000, height=3000)
    assert service.requests == requests == 2


@pytest.mark.parametrize(
    ("query", "limits", "message"),
    [
        ({"scale": 4}, {}, "more than the limit of 64000000; use scale 2"),
        ({"scale": 2}, {"output_pixels": 20_000_000}, "limit of 20000000; use scale 1"),
        ({"scale": 1}, {"pixels": 4_000_000}, "limit of 4000000; crop it or make it smaller"),
        ({"scale": 1}, {"output_pixels": 4_000_000}, "crop the picture or make it smaller"),
        ({"scale": 1, "steps": 9}, {"steps": 8}, "steps: 9 is more than the limit of 8"),
        ({"scale": 1, "tile": "off"}, {}, "tile: 4000 is more than the limit of 512; use auto"),
        ({"scale": 1, "bytes": 10**9}, {}, "the picture has 1000000000 bytes, more than"),
        ({"scale": 1}, {"seconds": 60}, "more than the limit of 1; crop it, make it smaller or"),
    ],
)
def test_estimate_says_what_the_limits_do_not_admit_and_what_they_would(
    small_config: ModelConfig, query: dict[str, Any], limits: dict[str, Any], message: str
) -> None:
    client = client_of(Steady(small_config), **limits)
    answer = ask(client, width=4000, height=3000, **query)
    assert not answer["fits"] and message in answer["detail"], answer


@pytest.mark.parametrize("scale", [1, 2])
def test_photograph_of_a_phone_fits_the_default_limits(
    small_config: ModelConfig, scale: int
) -> None:
    for width, height in ((4000, 3000), (3024, 4032)):
        answer = ask(client_of(Steady(small_config)), width=width, height=height, scale=scale)
        assert answer["fits"], answer


def test_estimate_says_when_memory_is_too_small(small_config: ModelConfig) -> None:
    needed = bytes_needed(small_config, 1000, 800, Options())
    for memory, fits in ((needed, True), (needed - 1, False)):
        answer = ask(client_of(Steady(small_config, memory)), width=1000, height=800)
        assert answer["fits"] is fits
    assert "GiB of memory here" in answer["detail"]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"height": 5}, "width: is required"),
        ({"width": 0, "height": 5}, "width: must be at least 1"),
        ({"width": 70_000, "height": 5}, "width: must be at most 65535"),
        ({"width": 5, "height": 5, "scale": 5}, "scale: must be at most 4"),
        ({"width": 5, "height": 5, "step": 1}, "step: is not known; did you mean steps"),
        ({"width": 5, "height": 5, "tags": "cat"}, "tags: small was trained without tags"),
        ({"width": 30_000, "height": 5, "format": "webp"}, None),
    ],
)
def test_wrong_question_is_refused_like_a_wrong_form(
    small_config: ModelConfig, query: dict[str, Any], message: str | None
) -> None:
    answer = client_of(Steady(small_config)).get("/v1/estimate", params=query)
    if message:
        assert message in detail(answer, 422)
    else:  # a limit, and not a mistake
        assert "too large for webp" in answer.json()["detail"]


def test_endpoint_that_cannot_be_tried_has_no_estimate(small: Upscaler) -> None:
    client = client_of(Local(small, slots=0))
    answer = client.get("/v1/estimate", params={"width": 5, "height": 5})
    assert "speed of this endpoint is not known" in detail(answer, 503)


def test_speed_is_measured_at_the_start_if_wanted(small_config: ModelConfig) -> None:
    service = Steady(small_config)
    with TestClient(create_app(service, Limits(), warm_up=True)) as client:
        ask(client, width=5, height=5)
    assert [request.pages for request in service.requests] == [(), ((256, 256),)]
    json.dumps(ask(client_of(Steady(small_config)), width=5, height=5))
