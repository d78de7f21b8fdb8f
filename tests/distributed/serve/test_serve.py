"""The endpoint on a real cluster gives the same pixels under load and when processes die."""

from __future__ import annotations

import asyncio
import io
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import numpy as np
import pytest
import torch
from PIL import Image
from ray import serve
from ray.cluster_utils import Cluster

from linearsr.config import LINEARSR_1_6B, FileOptions, ModelConfig, Options
from linearsr.distributed.serve import ServeConfig, build_app
from linearsr.distributed.serve.config import default_steps, divide_replicas
from linearsr.errors import OptionError
from linearsr.imaging.files import encode
from linearsr.imaging.files import read as read_picture
from linearsr.pipeline.codec import upscale_encoded
from linearsr.pipeline.upscaler import Upscaler
from linearsr.weights import expert_names, read_config, save
from tests.helpers.cluster import living_actors
from tests.helpers.endpoint import (
    AT_ONCE_IN_STARTS,
    Answer,
    Case,
    Endpoint,
    answered_by,
    ask,
    check,
    crowd,
    form_of,
    image_of,
    in_session,
    photograph,
    pixels_of,
)
from tests.helpers.experts import random_experts
from tests.helpers.processes import free_port, until

# A longer run by hand used 300, 100 and 4.
REQUESTS = int(os.environ.get("LINEARSR_TEST_REQUESTS", "60"))
CANCELLED = int(os.environ.get("LINEARSR_TEST_CANCELLED", "20"))
KILLED = int(os.environ.get("LINEARSR_TEST_KILLED", "2"))
SLOTS, QUEUE = 16, 16


# tests/distributed/serve/test_local.py has the layout "together" too.
LAYOUTS = ["split", pytest.param("together", marks=pytest.mark.thorough)]


@pytest.fixture(scope="module", params=LAYOUTS)
def endpoint(
    request: pytest.FixtureRequest,
    cluster: Cluster,
    scaling_bundle: Path,
) -> Iterator[Endpoint]:
    port = free_port()
    config = config_of(scaling_bundle, request.param)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build_app(config))
    yield Endpoint(f"http://127.0.0.1:{port}", config)
    serve.shutdown()


def config_of(model: Path, layout: str) -> ServeConfig:
    return ServeConfig.parse(
        model=str(model),
        device="cpu",
        layout=layout,
        replicas=4 if layout == "split" else 2,
        expert_cpus=0.25,
        router_cpus=0.25,
        max_ongoing_requests=SLOTS,
        max_queued_requests=QUEUE,
        max_surge_percent=100 if layout == "split" else 0,
    )


@pytest.fixture(scope="module")
def cases(scaling_bundle: Path) -> list[Case]:
    return answered_by(scaling_bundle)


def test_single_request_has_the_bits_of_the_command(endpoint: Endpoint, cases: list[Case]) -> None:
    async def in_turn(session: aiohttp.ClientSession) -> list[Answer]:
        return [await ask(session, endpoint, case) for case in cases]

    for case, answer in zip(cases, in_session(in_turn), strict=True):
        assert answer.status == 200, answer.body
        assert np.array_equal(pixels_of(answer.body), case.pixels)
        parts = [part.split(";")[0] for part in answer.headers["server-timing"].split(", ")]
        experts = ["structure", "refinement", "texture"]
        assert parts[:5] == ["prepare", "queue", *experts] and "decode" in parts
        assert answer.headers["x-request-id"]


def test_concurrent_requests_get_their_own_pictures(endpoint: Endpoint, cases: list[Case]) -> None:
    check(in_session(lambda session: crowd(session, endpoint, cases, REQUESTS)), cases)


def test_all_pages_of_a_tiff_have_the_bits_of_the_command(
    endpoint: Endpoint, scaling_bundle: Path
) -> None:
    pages = [Image.open(io.BytesIO(photograph(number, 40, 24))) for number in range(2)]
    file = io.BytesIO()
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:])
    upscaler = Upscaler.load(scaling_bundle, "cpu")
    options = {"steps": 2, "seed": 5}
    expected = upscale_encoded(upscaler, file.getvalue(), Options.parse(**options), FileOptions())
    case = Case(file.getvalue(), {"steps": 2, "seed": 5}, pixels_of(expected.data))
    (answer,) = in_session(lambda session: crowd(session, endpoint, [case], 1))
    assert answer.status == 200 and answer.headers["content-type"] == "image/tiff"
    scan, other = (Image.open(io.BytesIO(data)) for data in (answer.body, expected.data))
    assert (scan.n_frames, other.n_frames) == (2, 2)  # type: ignore[attr-defined]
    for page in range(2):
        scan.seek(page)
        other.seek(page)
        assert np.array_equal(np.asarray(scan), np.asarray(other))


def replicas(name: str) -> list[int]:
    """Return the process ids of the replicas of a deployment."""
    return living_actors(f"ServeReplica:default:{name}")


def test_requests_survive_the_death_of_replicas(endpoint: Endpoint, cases: list[Case]) -> None:
    """Replicas of as many experts as KILLED, and the router, are killed in turn under load."""
    split = endpoint.config.layout == "split"
    experts = expert_names_of(endpoint)[:KILLED] if split else ["experts"]
    deployments = [*experts, "Router"]

    async def kill(done: asyncio.Event) -> None:
        for name in deployments:
            victim = (await asyncio.to_thread(replicas, name))[0]
            os.kill(victim, signal.SIGKILL)
            # Wait until it is back: to kill all four at once would be another test.
            back = lambda name=name, victim=victim: set(replicas(name)) - {victim}  # noqa: E731
            await asyncio.to_thread(until, lambda back=back: bool(back()), f"{name} again")
        done.set()

    async def work(session: aiohttp.ClientSession) -> list[Answer]:
        done = asyncio.Event()
        killer = asyncio.create_task(kill(done))
        answers: list[Answer] = []
        while not done.is_set() or len(answers) < REQUESTS:
            answers += await crowd(session, endpoint, cases, len(cases), AT_ONCE_IN_STARTS)
        await killer
        return answers

    check(in_session(work), cases)


def expert_names_of(endpoint: Endpoint) -> list[str]:
    return expert_names(read_config(endpoint.config.model))


@pytest.mark.thorough
def test_request_survives_the_death_of_its_expert_in_mid_step(
    endpoint: Endpoint, scaling_bundle: Path
) -> None:
    """Every replica of an expert is killed as soon as it has begun."""
    options = Options(steps=50, seed=3)
    upscaler = Upscaler.load(scaling_bundle, "cpu")
    picture = photograph(0, 96, 96)
    expected = pixels_of(encode(upscaler.upscale(read_picture(picture), options), "png"))
    split = endpoint.config.layout == "split"

    async def without(session: aiohttp.ClientSession, expert: str) -> Answer:
        form = form_of(picture, steps=50, seed=3)
        url, headers = f"{endpoint.url}/v1/upscale", {"Accept": "text/event-stream"}
        victims = await asyncio.to_thread(replicas, expert if split else "experts")
        killed = False
        async with session.post(url, data=form, headers=headers) as response:
            async for line in response.content:
                if b'"image"' in line:
                    assert killed
                    return Answer(response.status, image_of(line), {})
                if expert.encode() in line and not killed:
                    killed = True
                    for victim in victims:
                        os.kill(victim, signal.SIGKILL)
        raise AssertionError("the answer ended without a result")

    async def in_turn(session: aiohttp.ClientSession) -> list[Answer]:
        names = ("texture", "structure", "refinement", "polish")
        # In the layout "together", all experts live in the same replicas.
        return [await without(session, expert) for expert in names[: KILLED if split else 1]]

    for answer in in_session(in_turn):
        assert answer.status == 200
        assert np.array_equal(pixels_of(answer.body), expected)


def test_requests_beyond_slots_and_queue_are_refused_with_429(
    endpoint: Endpoint, cases: list[Case]
) -> None:
    long = [case._replace(options={**case.options, "steps": 40}) for case in cases]

    async def at_once(session: aiohttp.ClientSession) -> list[Answer]:
        return await asyncio.gather(*(ask(session, endpoint, long[n % 12]) for n in range(200)))

    answers = in_session(at_once)
    refused = [answer for answer in answers if answer.status == 429]
    assert refused and len(answers) - len(refused) >= SLOTS + QUEUE
    assert {answer.status for answer in answers} == {200, 429}
    for answer in refused:
        assert int(answer.headers["retry-after"]) > 0
        assert answer.headers["content-type"] == "application/problem+json"
    check(in_session(lambda session: crowd(session, endpoint, cases, 32)), cases)


def test_disconnect_frees_the_slot(endpoint: Endpoint, cases: list[Case]) -> None:
    """Clients disconnect in mid-request; then as many others use all slots."""
    long = cases[0]._replace(options={"steps": 50, "seed": 1})

    async def leave(session: aiohttp.ClientSession) -> list[Answer]:
        form = form_of(long.picture, steps=50)
        headers = {"Accept": "text/event-stream"}
        url = f"{endpoint.url}/v1/upscale"
        async with session.post(url, data=form, headers=headers) as response:
            assert response.status == 200
            await response.content.readline()  # the request is in flight
            response.close()
        return []

    async def work(session: aiohttp.ClientSession) -> list[Answer]:
        for _ in range(0, CANCELLED, 10):
            await asyncio.gather(*(leave(session) for _ in range(10)))
        return await crowd(session, endpoint, cases, CANCELLED)

    check(in_session(work), cases)


def test_health_needs_every_expert(endpoint: Endpoint) -> None:
    async def health(session: aiohttp.ClientSession) -> list[Answer]:
        async with session.get(f"{endpoint.url}/healthz") as response:
            return [Answer(response.status, await response.read(), {})]

    (answer,) = in_session(health)
    assert (answer.status, answer.body) == (200, b'{"status":"ready"}')
    name, count = ("polish", 1) if endpoint.config.layout == "split" else ("experts", 2)
    until(lambda: len(replicas(name)) == count, "all replicas after the tests before")
    stopped = replicas(name)
    for replica in stopped:
        os.kill(replica, signal.SIGSTOP)
    try:
        (answer,) = in_session(health)
        assert answer.status == 503
    finally:
        for replica in stopped:
            os.kill(replica, signal.SIGCONT)
    until(lambda: in_session(health)[0].status == 200, "healthy again")


@pytest.mark.thorough
def test_rollout_fails_no_request_and_mixes_no_models(
    endpoint: Endpoint, cases: list[Case], tmp_path: Path
) -> None:
    """New weights are deployed under load: each answer comes from one model only.

    This is the last test of a layout, as its endpoint has the new weights from now on.
    """
    config = read_config(endpoint.config.model)
    experts = [model.state_dict() for model in random_experts(config, 8)[4:]]
    if endpoint.config.layout == "together":  # this layout gets another config too
        config = config.model_copy(update={"name": "other"})
    save(tmp_path, config, experts, {}, torch.float32)
    new = answered_by(tmp_path)
    app = build_app(config_of(tmp_path, endpoint.config.layout))

    async def rollout(session: aiohttp.ClientSession) -> list[Answer]:
        answers = await crowd(session, endpoint, cases, len(cases))
        deploying = asyncio.create_task(asyncio.to_thread(serve.run, app))
        while not deploying.done():
            answers += await crowd(session, endpoint, cases, len(cases), AT_ONCE_IN_STARTS)
        await deploying
        return answers

    answers = in_session(rollout)
    models = [of_which(answer, cases[n % 12], new[n % 12]) for n, answer in enumerate(answers)]
    assert models[:12] == ["before"] * 12
    check(in_session(lambda session: crowd(session, endpoint, new, 12)), new)


def of_which(answer: Answer, before: Case, after: Case) -> str:
    assert answer.status == 200, answer.body
    pixels = pixels_of(answer.body)
    for name, case in {"before": before, "after": after}.items():
        if np.abs(pixels - case.pixels).max() <= 1:
            return name
    raise AssertionError("a picture of neither model")


def test_replicas_are_divided_in_proportion_to_steps() -> None:
    """20 steps are 4/2/13/1: of 20 replicas each takes a step; of 4, each expert has one."""
    assert default_steps(LINEARSR_1_6B) == [4, 2, 13, 1]
    assert divide_replicas(20, [4, 2, 13, 1]) == (4, 2, 13, 1)
    assert divide_replicas(4, [4, 2, 13, 1]) == (1, 1, 1, 1)
    assert divide_replicas(7, [4, 2, 13, 1]) == (1, 1, 4, 1)
    assert divide_replicas(6, [1, 1, 2, 0]) == (2, 1, 2, 1)


def test_replica_counts_must_fit_the_experts(small_config: ModelConfig) -> None:
    with pytest.raises(OptionError, match="4 experts, but there are 3 numbers"):
        ServeConfig(replicas=(1, 1, 1)).deployments(small_config)
    with pytest.raises(OptionError, match="replicas"):
        ServeConfig.parse(replicas=0)
    with pytest.raises(OptionError, match="one number"):
        ServeConfig.parse(layout="together", replicas=(1, 1, 1, 1))
    with pytest.raises(OptionError, match="texture starts with 2"):
        build_app(ServeConfig(replicas=(1, 1, 2, 1), max_replicas=1))
    assert ServeConfig(layout="together", replicas=3).deployments(small_config) == [
        ((0, 1, 2, 3), 3)
    ]
