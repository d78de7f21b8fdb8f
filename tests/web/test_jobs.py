"""Jobs: requests whose clients do not wait. They outlive the store that works on them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from linearsr import Upscaler
from linearsr.config import FileOptions, Options
from linearsr.errors import InputError
from linearsr.web.api import create_app, digest
from linearsr.web.jobs import JobFailed, JobStore, new_id
from linearsr.web.service import (
    Events,
    Full,
    JobLimits,
    Limits,
    NotFinished,
    Progress,
    UnknownJob,
    UpscaleRequest,
)
from tests.helpers.forms import detail
from tests.helpers.local_service import PATIENCE, Local, StoreOfTheServer

PREFER = {"Prefer": "respond-async"}


@contextlib.contextmanager
def client_of(
    service: Local, folder: Path, token: str | None = None, **limits: Any
) -> Iterator[TestClient]:
    jobs: Any = StoreOfTheServer(service, JobLimits(**limits), folder)
    app = create_app(service, Limits(), digest(token), jobs=jobs)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with TestClient(app, raise_server_exceptions=False, headers=headers) as client:
        yield client


def send(client: TestClient, png: bytes, headers: Any = PREFER, **fields: object) -> Any:
    data = {key: str(value) for key, value in {"steps": 1, **fields}.items()}
    files = {"image": ("a photo.png", png)}
    return client.post("/v1/upscale", files=files, data=data, headers=headers)


def ended(client: TestClient, address: str) -> dict[str, Any]:
    """Return the state of a job when it has finished."""
    deadline = time.monotonic() + PATIENCE
    while (answer := client.get(address)).json()["expires"] is None:
        assert answer.headers["Retry-After"] == "2"
        assert time.monotonic() < deadline
    assert answer.status_code == 200 and "Retry-After" not in answer.headers
    return answer.json()


def test_job_has_the_picture_that_waiting_would_have_given(
    small: Upscaler, png: bytes, tmp_path: Path
) -> None:
    with client_of(Local(small), tmp_path) as client:
        waited = send(client, png, headers={}, seed=4, steps=4)
        answer = send(client, png, seed=4, steps=4)
        assert answer.status_code == 202
        assert answer.headers["Preference-Applied"] == "respond-async"
        address = answer.headers["Location"]
        assert address == f"/v1/jobs/{answer.json()['id']}" and len(answer.json()["id"]) == 32
        state = ended(client, address)
        assert state["status"] == "succeeded" and state["error"] is None
        assert state["progress"] == {"expert": "texture", "step": 4, "steps": 4, "percent": 100}
        assert state["created"] <= time.time() <= state["expires"] - 3500
        content = client.get(f"{address}/content")
        assert content.content == waited.content
        for name in ("Content-Type", "Content-Disposition", "X-LinearSR-Seed"):
            assert content.headers[name] == waited.headers[name]
        assert client.get(f"{address}/content").content == waited.content  # again
        assert client.delete(address).status_code == 204
        for path in (address, f"{address}/content"):
            assert "no such job" in detail(client.get(path), 404)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("header", "asynchronous"),
    [
        ("respond-async", True),
        ("Respond-Async", True),
        ("wait=10, respond-async", True),
        ("respond-async; x=y", True),
        ("return=minimal", False),
        ("respond-asynchronously", False),
    ],
)
def test_prefer_header_is_read_as_rfc_7240_says(
    small: Upscaler, png: bytes, tmp_path: Path, header: str, asynchronous: bool
) -> None:
    with client_of(Local(small), tmp_path) as client:
        answer = send(client, png, headers={"Prefer": header})
        assert answer.status_code == (202 if asynchronous else 200)
        assert ("Preference-Applied" in answer.headers) is asynchronous


def test_wrong_upload_is_refused_before_there_is_a_job(
    small: Upscaler, png: bytes, tmp_path: Path
) -> None:
    with client_of(Local(small), tmp_path) as client:
        detail(send(client, png, scale=5), 422)
        detail(send(client, b"no picture"), 415)
        assert list(tmp_path.iterdir()) == []


def test_job_that_fails_has_its_problem(small: Upscaler, png: bytes, tmp_path: Path) -> None:
    with client_of(Local(small), tmp_path) as client:
        address = send(client, png[:-20]).headers["Location"]
        state = ended(client, address)
        assert state["status"] == "failed"
        assert state["error"]["status"] == 400 and "damaged" in state["error"]["detail"]
        assert "damaged" in detail(client.get(f"{address}/content"), 400)


def test_unfinished_job_has_no_content_and_can_be_cancelled(
    small: Upscaler, png: bytes, tmp_path: Path
) -> None:
    service = Local(small, slots=1)
    with client_of(service, tmp_path) as client, service.held():
        address = send(client, png, steps=20).headers["Location"]
        service.wait_for(free=0)
        answer = client.get(f"{address}/content")
        assert "has not finished" in detail(answer, 409) and answer.headers["Retry-After"] == "2"
        assert client.get(address).json()["status"] == "running"
        assert client.delete(address).status_code == 204
        service.wait_for(free=1)
        detail(client.get(address), 404)
        detail(client.delete(address), 404)


def test_jobs_wait_for_each_other(small: Upscaler, png: bytes, tmp_path: Path) -> None:
    service = Local(small)
    with client_of(service, tmp_path, running=1) as client:
        with service.held():
            first, second = (send(client, png).headers["Location"] for _ in range(2))
            service.wait_for(free=3)
            assert client.get(second).json()["status"] == "queued"
            assert service.requests == 1
        assert {ended(client, job)["status"] for job in (first, second)} == {"succeeded"}


def test_job_belongs_to_the_token_that_sent_it(small: Upscaler, png: bytes, tmp_path: Path) -> None:
    with client_of(Local(small), tmp_path, "old") as client:
        address = send(client, png).headers["Location"]
        ended(client, address)
        no_token = {"Authorization": ""}
        for path in (address, f"{address}/content"):
            detail(client.get(path, headers=no_token), 401)
        detail(client.delete(address, headers=no_token), 401)
        detail(send(client, png, headers={**PREFER, **no_token}), 401)
    # The endpoint is deployed with another token, and then without one.
    for token in ("new", None):
        with client_of(Local(small), tmp_path, token) as client:
            detail(client.get(address), 404)
            detail(client.get(f"{address}/content"), 404)
            detail(client.delete(address), 404)
    with client_of(Local(small), tmp_path, "old") as client:
        assert client.get(f"{address}/content").status_code == 200
    text = next(tmp_path.glob("*/job.json")).read_text()
    assert "old" not in text and digest("old") not in text  # type: ignore[operator]


def test_folder_of_jobs_is_for_its_owner_alone(small: Upscaler, png: bytes, tmp_path: Path) -> None:
    with client_of(Local(small), tmp_path / "jobs") as client:
        send(client, png)
        for folder in (tmp_path / "jobs", next((tmp_path / "jobs").iterdir())):
            assert os.stat(folder).st_mode & 0o777 == 0o700


@pytest.mark.parametrize(("limits", "kept"), [({"count": 2}, 2), ({"bytes": 12_000}, 2)])
def test_jobs_beyond_the_bound_are_refused(
    small: Upscaler, png: bytes, tmp_path: Path, limits: dict[str, int], kept: int
) -> None:
    """A job counts its picture, and until it has finished three bytes for each pixel."""
    assert kept * (len(png) + 3 * 48 * 36) <= 12_000 < (kept + 1) * (len(png) + 3 * 48 * 36)
    service = Local(small)
    with client_of(service, tmp_path, **limits) as client:
        with service.held():
            jobs = [send(client, png).headers["Location"] for _ in range(kept)]
            answer = send(client, png)
            assert "busy" in detail(answer, 429)
            assert int(answer.headers["Retry-After"]) > 0
        for job in jobs:
            ended(client, job)
        client.delete(jobs[0])
        assert send(client, png).status_code == 202


def test_endpoint_without_jobs_answers_at_once(small: Upscaler, png: bytes) -> None:
    client = TestClient(create_app(Local(small), Limits()))
    answer = send(client, png)
    assert answer.status_code == 200 and "Preference-Applied" not in answer.headers
    detail(client.get("/v1/jobs/x"), 404)


# The store alone


def request_of(png: bytes, **options: Any) -> UpscaleRequest:
    options = {"steps": 1, **options}
    return UpscaleRequest(png, Options(**options), FileOptions(), pages=((12, 9),))


async def finished(store: JobStore, id: str, owner: str = "") -> str:
    deadline = time.monotonic() + PATIENCE
    while (state := await store.get(id, owner)).expires is None:
        assert time.monotonic() < deadline
        await asyncio.sleep(0)
    return state.status


def test_next_store_goes_on_with_what_the_last_one_left(
    small: Upscaler, png: bytes, tmp_path: Path
) -> None:
    """The first store dies in the middle of one job, with another waiting and a third finished."""
    (tmp_path / "half-written").mkdir()  # killed while it was accepted

    async def first() -> tuple[list[str], bytes]:
        service = Local(small)
        store = JobStore(service, JobLimits(running=1), tmp_path)
        await store.start()
        ids = [new_id() for _ in range(3)]
        await store.submit(ids[0], request_of(png), "first.png", "me")
        assert await finished(store, ids[0], "me") == "succeeded"
        service._gate.clear()
        for seed, id in enumerate(ids[1:]):
            await store.submit(id, request_of(png, seed=seed, steps=4), f"{seed}.png", "me")
        while service.free == 4:
            await asyncio.sleep(0)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        service._gate.set()
        return ids, (await store.content(ids[0], "me"))[0].image

    ids, image = asyncio.run(first())

    async def second() -> None:
        store = JobStore(Local(small), JobLimits(running=1), tmp_path)
        await store.start()
        result, name = await store.content(ids[0], "me")
        assert (result.image, name) == (image, "first.png")
        for seed, id in enumerate(ids[1:]):
            assert await finished(store, id, "me") == "succeeded"
            result, name = await store.content(id, "me")
            assert (result.seed, result.steps, name) == (seed, 4, f"{seed}.png")
            with pytest.raises(UnknownJob):
                await store.content(id, "you")
        assert {folder.name for folder in tmp_path.iterdir()} == set(ids)
        await store.clear()
        assert not tmp_path.exists()

    asyncio.run(second())


def test_job_that_is_sent_twice_is_begun_once(small: Upscaler, png: bytes, tmp_path: Path) -> None:
    async def converse() -> None:
        service = Local(small)
        store = JobStore(service, JobLimits(), tmp_path)
        await store.start()
        for _ in range(2):
            await store.submit("an-id", request_of(png), "x.png", "")
        assert await finished(store, "an-id") == "succeeded"
        assert service.requests == 1

    asyncio.run(converse())


def test_finished_job_expires_also_in_the_next_store(
    small: Upscaler, png: bytes, tmp_path: Path
) -> None:
    async def converse(kept: float) -> None:
        store = JobStore(Local(small), JobLimits(kept_seconds=kept), tmp_path)
        await store.start()
        if not (tmp_path / "an-id").exists():
            await store.submit("an-id", request_of(png), "x.png", "")
            await finished(store, "an-id")
        with contextlib.suppress(UnknownJob):
            while kept < 1:
                await store.get("an-id", "")
                await asyncio.sleep(0)
        assert (tmp_path / "an-id").exists() is (kept > 1)

    asyncio.run(converse(3600))
    asyncio.run(converse(3600))
    asyncio.run(converse(0.01))


class Endless:
    """A service that sends one progress event, and then nothing or an error."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    async def upscale(self, request: UpscaleRequest) -> Events:
        yield Progress("structure", 0, 4)
        if self.error:
            raise self.error
        await asyncio.Event().wait()


def test_job_ends_at_its_time_limit_and_hides_internal_errors(tmp_path: Path, png: bytes) -> None:
    async def error_of(service: Any, **limits: float) -> tuple[int, str]:
        store = JobStore(service, JobLimits(**limits), tmp_path)
        await store.start()
        id = new_id()
        await store.submit(id, request_of(png), "x.png", "")
        with pytest.raises(NotFinished):
            await store.content(id, "")
        assert await finished(store, id) == "failed"
        with pytest.raises(JobFailed) as caught:
            await store.content(id, "")
        return caught.value.problem.status, str(caught.value)

    assert asyncio.run(error_of(Endless(), seconds=0.05))[0] == 504
    assert asyncio.run(error_of(Endless(InputError("broken")))) == (400, "broken")
    status, text = asyncio.run(error_of(Endless(RuntimeError("/secret"))))
    assert status == 500 and "secret" not in text


def test_room_for_the_result_is_kept_free(small: Upscaler, png: bytes, tmp_path: Path) -> None:
    async def converse() -> None:
        store = JobStore(Local(small), JobLimits(bytes=6_000), tmp_path)
        await store.start()
        await store.submit("an-id", request_of(png), "x.png", "")
        with pytest.raises(Full):
            await store.submit("another", request_of(png), "x.png", "")
        assert await finished(store, "an-id") == "succeeded"

    asyncio.run(converse())


def test_method_that_a_job_does_not_have_is_refused_with_those_that_it_has(
    small: Upscaler, tmp_path: Path
) -> None:
    with client_of(Local(small), tmp_path) as client:
        for method in ("OPTIONS", "POST", "PUT", "PATCH"):
            answer = client.request(method, "/v1/jobs/x")
            detail(answer, 405)
            assert answer.headers["Allow"] == "DELETE, GET"
