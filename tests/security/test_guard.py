"""The guard before the endpoint: slow and unfinished uploads, long headers, odd request ids."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Iterator

import psutil
import pytest
import requests
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from linearsr.web import http_parser
from linearsr.web.guard import REQUEST_ID, Guard, UploadLimits
from tests.helpers.attacks import MEGABYTE, begin, begin_many, connect, seconds_of, upload
from tests.helpers.forms import FORM
from tests.helpers.local_service import Local, served
from tests.helpers.processes import until

# A short time of grace keeps the tests short.
LIMITS = UploadLimits(count=8, total_bytes=64 * MEGABYTE, grace_seconds=2)


@pytest.fixture
def url(service: Local) -> Iterator[str]:
    with served(service, uploads=LIMITS) as address:
        yield address


def test_slow_and_unfinished_uploads_take_neither_health_nor_memory(url: str, png: bytes) -> None:
    """300 uploads send nine bytes and 100 half a megabyte, then nothing."""
    process = psutil.Process()
    assert upload(url, png, steps=1).status_code == 200
    gc.collect()
    before = process.memory_info().rss
    with contextlib.ExitStack() as stack:
        begin_many(url, stack)
        # The time is a promise of the endpoint, not a measure of its speed.
        assert max(seconds_of(f"{url}/healthz"), seconds_of(f"{url}/")) < 1
        assert process.memory_info().rss - before < 100 * MEGABYTE
    until(lambda: upload(url, png, steps=1).status_code == 200, "a real upload", 10)
    gc.collect()
    assert process.memory_info().rss - before < 100 * MEGABYTE


class Client:
    """A client of a guard, without a socket, that sends parts of its body when told to."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.parts: asyncio.Queue[Message] = asyncio.Queue()
        self.answers: list[Message] = []
        scope = {"type": "http", "method": "POST", "path": "/", "query_string": b""}
        headers = [(b"transfer-encoding", b"chunked"), (b"expect", b"100-continue")]
        request = guard({**scope, "headers": headers}, self.parts.get, self.note)
        self.task = asyncio.create_task(request)

    async def note(self, message: Message) -> None:
        self.answers.append(message)

    async def send(self, size: int, *, more: bool = True) -> None:
        """Send a part, and return once the guard has seen it."""
        self.parts.put_nowait({"type": "http.request", "body": bytes(size), "more_body": more})
        while not self.parts.empty():
            await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def status(self) -> int:
        await self.task
        return int(self.answers[0]["status"])


@pytest.mark.parametrize("limit", [{"count": 1}, {"total_bytes": 100}])
def test_upload_beyond_the_places_or_the_room_is_refused_until_another_ends(
    limit: dict[str, int],
) -> None:
    async def attack() -> None:
        guard = Guard(Response(), LIMITS.model_copy(update=limit))
        slow, refused = Client(guard), Client(guard)
        await slow.send(90)
        refused.parts.put_nowait({"type": "http.request", "body": bytes(20), "more_body": False})
        assert await refused.status() == 429
        headers = dict(refused.answers[0]["headers"])
        assert int(headers[b"retry-after"]) > 0 and headers[b"connection"] == b"close"
        slow.parts.put_nowait({"type": "http.disconnect"})
        await slow.task
        assert not slow.answers and not guard.held_bytes and not guard.receiving
        last = Client(guard)
        await last.send(90, more=False)
        assert await last.status() == 200

    asyncio.run(attack())


@pytest.mark.parametrize("sends", ["length", "chunks"])
def test_body_beyond_the_limit_is_refused_with_413(url: str, sends: str) -> None:
    body = bytes(LIMITS.body_bytes + 1) if sends == "length" else iter([bytes(1 << 20)] * 48)
    answer = requests.post(f"{url}/v1/images/upscale", data=body, headers=FORM, timeout=60)
    assert answer.status_code == 413
    assert "more than 50100000 bytes" in answer.json()["error"]["message"]


def test_slower_upload_than_the_rate_is_ended(service: Local) -> None:
    limits = LIMITS.model_copy(update={"grace_seconds": 0.5, "bytes_per_second": 1e5})
    with served(service, uploads=limits) as url, begin(url, MEGABYTE, 20_000) as connection:
        assert b"slower than 100 kB a second" in connection.recv(4096)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 70_000, b"431"),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"X-Many: a\r\n" * 7_000, b"431"),
        (b"GET /healthz?" + b"a" * 70_000, b"414"),
    ],
    ids=["one long header", "many headers", "a long URL"],
)
def test_long_headers_are_refused_while_they_come(url: str, request_: bytes, status: bytes) -> None:
    with connect(url) as connection:
        connection.sendall(request_)
        assert connection.recv(12) == b"HTTP/1.1 " + status
    assert requests.get(f"{url}/healthz", timeout=60).status_code == 200


@pytest.mark.parametrize("before", [b"", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"])
def test_connection_that_does_not_finish_its_headers_is_closed(
    service: Local, monkeypatch: pytest.MonkeyPatch, before: bytes
) -> None:
    monkeypatch.setattr(http_parser, "HEADER_SECONDS", 0.5)
    with served(service, uploads=LIMITS) as url, connect(url) as connection:
        if before:
            connection.sendall(before)
            assert connection.recv(12) == b"HTTP/1.1 200"
        connection.sendall(b"GET /heal")
        until(lambda: not connection.recv(4096), "the end of the connection")


def test_room_is_given_back_when_the_answer_begins() -> None:
    """Clients that do not read their answers would keep it otherwise."""
    held: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        held.append(guard.held_bytes)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        held.append(guard.held_bytes)
        await send({"type": "http.response.body", "body": b""})

    guard = Guard(app, LIMITS)
    assert TestClient(guard).post("/", content=b"12345").status_code == 200
    assert held == [5, 0]


@pytest.mark.parametrize(
    "id",
    [b"a" * 129, b"", b"x y", b"caf\xe9", b'x"', b"fine-1.2_3"],
    ids=["long", "empty", "space", "latin", "quote", "fine"],
)
def test_odd_request_id_does_not_reach_the_endpoint(id: bytes) -> None:
    seen: list[str | None] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(Headers(scope=scope).get("x-request-id"))
        await Response()(scope, receive, send)

    answer = TestClient(Guard(app, LIMITS)).get("/", headers={"X-Request-Id": id})
    assert answer.status_code == 200
    (name,) = seen
    assert name and REQUEST_ID.fullmatch(name.encode())
    assert (name == id.decode("latin-1")) == id.startswith(b"fine")


def test_refusal_carries_the_id_of_its_request(url: str) -> None:
    headers = {**FORM, "X-Request-Id": "mine"}
    body = bytes(LIMITS.body_bytes + 1)
    mine = requests.post(f"{url}/v1/upscale", data=body, headers=headers, timeout=60)
    other = requests.post(f"{url}/v1/upscale", data=body, headers=FORM, timeout=60)
    assert mine.status_code == other.status_code == 413
    assert mine.headers["X-Request-Id"] == "mine"
    assert other.headers["X-Request-Id"] not in ("", "mine")


def test_death_of_a_process_behind_the_guard_says_try_again() -> None:
    """Serve's proxy then returns without an answer."""

    async def dead(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()

    answer = TestClient(Guard(dead, LIMITS)).post("/v1/upscale", content=b"x")
    assert answer.status_code == 503 and int(answer.headers["Retry-After"]) > 0
    assert "try again" in answer.json()["detail"]
