"""A guard before the endpoint, in the process that accepts connections.

It refuses requests with long headers, and it holds each upload back until the whole body has come.
So slow and unfinished uploads take neither memory nor places of the endpoint behind it, and the
health check and the page answer whatever else arrives.
"""

from __future__ import annotations

import re
import uuid
from tempfile import SpooledTemporaryFile

import anyio
from pydantic import Field, model_validator
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from linearsr.config import Config
from linearsr.web.problems import error_response

# The most bytes of a request's first line and headers together.
MAX_HEADER_BYTES = 65_536
# A body up to this size is held in memory, a larger one on disk.
SPOOL_BYTES = 1 << 18
# How much of a held body the endpoint gets at a time.
CHUNK_BYTES = 1 << 18
SLOW = 408
RETRY = {"Retry-After": "5"}
# Ids that clients may choose for their requests; others are replaced, since ids go into all logs.
ID_HEADER = "X-Request-Id"
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


class UploadLimits(Config):
    """The limits of all uploads together, before the endpoint sees them."""

    count: int = Field(default=500, ge=1)
    """Maximum number of bodies that are being received at the same time."""
    total_bytes: int = Field(default=1_000_000_000, ge=1)
    """Maximum number of bytes of all bodies that are being received or worked on."""
    body_bytes: int = Field(default=50_100_000, ge=1)
    """Maximum number of bytes of one body, which has the upload and the other fields."""
    grace_seconds: float = Field(default=10.0, gt=0)
    """Time that every body may take in seconds; a longer one must keep the rate."""
    bytes_per_second: float = Field(default=8_000.0, gt=0)
    """Minimum rate of a body, in bytes a second on average since its headers."""

    @model_validator(mode="after")
    def _check_room(self) -> UploadLimits:
        if self.total_bytes < self.body_bytes:
            raise ValueError("total_bytes must be at least body_bytes, or no such body fits")
        return self


def guard(limits: UploadLimits) -> Middleware:
    """Return the guard as a Starlette middleware."""
    return Middleware(Guard, limits=limits)


class Guard:
    """An ASGI middleware that passes on a request once all of its body has come."""

    def __init__(self, app: ASGIApp, limits: UploadLimits) -> None:
        self.app = app
        self.limits = limits
        self.receiving = 0
        self.held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection or request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = MutableHeaders(scope=scope)
        _name_request(headers)
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if _header_bytes(scope) > MAX_HEADER_BYTES:
            await _Refusal(431, "the headers are longer than 64 kB").send(scope, receive, send)
        elif "transfer-encoding" in headers or headers.get("content-length", "0") != "0":
            await self._hold(scope, receive, send)
        else:
            await self._pass_on(scope, receive, send)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the endpoint answer. If a process of it has died, there is no answer: say try again.

        Serve's proxy then returns without one, for which the server would send 500.
        """
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        await self.app(scope, receive, noted)
        if not begun:
            refusal = _Refusal(503, "a part of the server has ended; try again", **RETRY)
            await refusal.send(scope, receive, send)

    async def _hold(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = _Body(self)
        try:
            await body.receive_all(Headers(scope=scope), receive)
            await self._pass_on(scope, body.replay(receive), body.until_answered(send))
        except _Refusal as refusal:
            waits = "expect" in Headers(scope=scope) and not body.asked
            if refusal.status != SLOW and body.more and not waits:
                await self._discard(receive)
            await refusal.send(scope, receive, send)
        except _Disconnected:
            pass
        finally:
            body.close()

    async def _discard(self, receive: Receive) -> None:
        """Drop what a client still sends: most clients read no answer before they have sent all."""
        with anyio.move_on_after(self.limits.grace_seconds):
            message = await receive()
            while message["type"] == "http.request" and message.get("more_body"):
                message = await receive()


class _Refusal(Exception):
    """The answer to a request that the endpoint does not see."""

    def __init__(self, status: int, detail: str, **headers: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail
        self.headers = {"Connection": "close", **headers}

    async def send(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {**self.headers, ID_HEADER: Headers(scope=scope)[ID_HEADER]}
        response = error_response(scope["path"], self.status, self.detail, headers)
        await response(scope, receive, send)


class _Disconnected(Exception):
    """The client is gone, so nobody waits for an answer."""


class _Body:
    """A body that is held back; `guard` counts its bytes until it is closed.

    asked: whether the client has been asked for the body. more: whether some of it is to come.
    """

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.size = 0
        self.asked, self.more = False, True
        self.file = SpooledTemporaryFile(SPOOL_BYTES)  # noqa: SIM115

    async def receive_all(self, headers: Headers, receive: Receive) -> None:
        """Receive the body. Raises _Refusal or _Disconnected."""
        limits = self.guard.limits
        if self.guard.receiving >= limits.count:
            raise _busy(f"{limits.count} other uploads are being received")
        length = headers.get("content-length", "")
        if length.isdecimal() and float(length) > limits.body_bytes:
            raise _too_long(limits)
        self.guard.receiving += 1
        started = anyio.current_time()
        try:
            self.asked = True
            while self.more:
                slowest = limits.grace_seconds + self.size / limits.bytes_per_second
                with anyio.CancelScope(deadline=started + slowest) as in_time:
                    message = await receive()
                if in_time.cancelled_caught:
                    rate = f"{limits.bytes_per_second / 1000:g} kB a second"
                    raise _Refusal(SLOW, f"the upload is slower than {rate}")
                self._keep(message)
        finally:
            self.guard.receiving -= 1

    def _keep(self, message: Message) -> None:
        """Keep a part of the body. Raises _Refusal or _Disconnected."""
        if message["type"] != "http.request":
            raise _Disconnected
        self.more = bool(message.get("more_body"))
        limits, part = self.guard.limits, message.get("body", b"")
        if self.size + len(part) > limits.body_bytes:
            raise _too_long(limits)
        if self.guard.held_bytes + len(part) > limits.total_bytes:
            raise _busy("the uploads that are under way take all the room")
        self.size += len(part)
        self.guard.held_bytes += len(part)
        try:
            self.file.write(part)
        except OSError as error:
            raise _Refusal(503, "the server has no room on its disk") from error

    def until_answered(self, send: Send) -> Send:
        """Return an ASGI `send` that gives the room back when the answer begins.

        Otherwise clients that do not read their answers would keep it.
        """

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.close()
            await send(message)

        return sent

    def replay(self, receive: Receive) -> Receive:
        """Return an ASGI `receive` that yields the body, then waits for the end of the client."""
        self.file.seek(0)
        left = self.size
        ended = False

        async def replayed() -> Message:
            nonlocal left, ended
            if ended or self.file.closed:
                return await receive()
            part = self.file.read(CHUNK_BYTES)
            left -= len(part)
            ended = not left
            return {"type": "http.request", "body": part, "more_body": not ended}

        return replayed

    def close(self) -> None:
        """Give the room back."""
        self.guard.held_bytes -= self.size
        self.size = 0
        self.file.close()


def _busy(reason: str) -> _Refusal:
    return _Refusal(429, f"{reason}; try again soon", **RETRY)


def _too_long(limits: UploadLimits) -> _Refusal:
    return _Refusal(413, f"the upload has more than {limits.body_bytes} bytes; send a smaller one")


def _header_bytes(scope: Scope) -> int:
    line = len(scope.get("raw_path") or scope["path"]) + len(scope["query_string"])
    return line + sum(len(name) + len(value) for name, value in scope["headers"])


def _name_request(headers: MutableHeaders) -> None:
    """Give a request an id of our own, unless its client chose one that may be kept."""
    ids = headers.getlist(ID_HEADER)
    if not (len(ids) == 1 and REQUEST_ID.fullmatch(ids[0].encode("latin-1"))):
        headers[ID_HEADER] = uuid.uuid4().hex
