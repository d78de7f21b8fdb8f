"""A proxy between an S3 client and its server that injects the faults of real storage.

It answers some requests with 500 InternalError or 503 SlowDown, resets some connections once the
server has handled the request, and cuts some bodies in the middle: that of the request if it has
one, else that of the response. A seed decides which. It counts the faults, so that a test can
assert that there were some.
"""

from __future__ import annotations

import contextlib
import random
import socket
import socketserver
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

HOST = "127.0.0.1"
CHUNK = 1 << 16


@dataclass(frozen=True)
class Answer:
    """An error in S3's own format. `extra` is further XML inside <Error>."""

    status: int
    code: str
    message: str
    extra: str = ""
    headers: tuple[str, ...] = ()

    def encode(self, method: str) -> bytes:
        """Return the response; S3 answers HEAD without a body."""
        body = (
            ""
            if method == "HEAD"
            else (
                '<?xml version="1.0" encoding="UTF-8"?>\n'
                f"<Error><Code>{self.code}</Code><Message>{self.message}</Message>{self.extra}</Error>"
            )
        )
        lines = [
            f"HTTP/1.1 {self.status} {self.code}",
            "Content-Type: application/xml",
            f"Content-Length: {len(body)}",
            "Connection: close",
            *self.headers,
        ]
        return "\r\n".join([*lines, "", body]).encode()


SLOW_DOWN = Answer(503, "SlowDown", "Please reduce your request rate.")
INTERNAL_ERROR = Answer(500, "InternalError", "We encountered an internal error.")


@dataclass(frozen=True)
class Faults:
    """The rates of faults, from 0 to 1. With `always`, every request gets this answer.

    delay: seconds before a request reaches the server.
    """

    slow_down: float = 0.0
    internal_error: float = 0.0
    reset: float = 0.0
    cut: float = 0.0
    always: Answer | None = None
    delay: float = 0.0

    def draw(self, rng: random.Random) -> Answer | str | None:
        """Return the fault of a request: an answer, "reset", "cut", or None."""
        if self.always is not None:
            return self.always
        drawn = rng.random()
        for kind, rate in (
            (SLOW_DOWN, self.slow_down),
            (INTERNAL_ERROR, self.internal_error),
            ("reset", self.reset),
            ("cut", self.cut),
        ):
            if drawn < rate:
                return kind
            drawn -= rate
        return None


class _Head:
    """The first line and headers of a request or response, and the length of its body."""

    def __init__(self, file: BinaryIO) -> None:
        lines = [file.readline()]
        while lines[-1].strip():
            lines.append(file.readline())
        if not lines[-1]:
            raise EOFError
        self.raw = b"".join(lines)
        self.first = lines[0].decode("latin-1").split()
        pairs = (line.decode("latin-1").partition(":") for line in lines[1:-1])
        self.fields = {name.strip().lower(): value.strip() for name, _, value in pairs}
        self.chunked = "chunked" in self.fields.get("transfer-encoding", "").lower()
        self.length = int(self.fields.get("content-length", 0))

    @property
    def closes(self) -> bool:
        return self.fields.get("connection", "").lower() == "close"


class _Cut(Exception):
    """A body was cut, so both connections must be closed."""


class Proxy(socketserver.ThreadingTCPServer):
    """A server on `port` that forwards to `upstream`; `faults` can be changed at any time."""

    daemon_threads, block_on_close, request_queue_size = True, False, 128

    def __init__(self, upstream: int, seed: int) -> None:
        super().__init__((HOST, 0), _Connection)
        self.port: int = self.server_address[1]
        self.upstream, self.faults = upstream, Faults()
        self.injected: Counter[str] = Counter()
        self._rng, self._lock = random.Random(seed), threading.Lock()

    def draw(self) -> Answer | str | None:
        """Return the fault of the next request."""
        with self._lock:
            self.injected["requests"] += 1
            return self.faults.draw(self._rng)

    def count(self, kind: str) -> None:
        """Count an injected fault."""
        with self._lock:
            self.injected[kind] += 1


class _Connection(socketserver.StreamRequestHandler):
    """A connection of a client, and one to the server for it."""

    server: Proxy
    wbufsize = 0

    def handle(self) -> None:
        with (
            contextlib.suppress(OSError, EOFError, _Cut),
            socket.create_connection((HOST, self.server.upstream)) as upstream,
            upstream.makefile("rb") as answers,
        ):
            self.upstream, self.answers = upstream, answers
            while self.exchange():
                pass

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            super().finish()

    def exchange(self) -> bool:
        """Forward a request and its response; return whether the connection stays open."""
        request = _Head(self.rfile)
        fault = self.server.draw()
        time.sleep(self.server.faults.delay)
        if isinstance(fault, Answer):
            self.refuse(request, fault)
            return False
        self.upstream.sendall(request.raw)
        response = self.send(request, cut=fault == "cut")
        if fault == "reset":
            self.server.count("reset")
            self.reset()
            return False
        self.connection.sendall(response.raw)
        if request.first[0] != "HEAD" and response.first[1] not in {"204", "304"}:
            self.copy(response, self.answers, self.connection, cut=fault == "cut")
        return not (request.closes or response.closes)

    def send(self, request: _Head, *, cut: bool) -> _Head:
        """Forward the body of a request; return the head of its response."""
        if "expect" in request.fields:
            response = _Head(self.answers)
            if response.first[1] != "100":
                return response
            self.connection.sendall(response.raw)
        # A server may refuse a request without reading it; then its answer counts.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.copy(request, self.rfile, self.upstream, cut=cut)
        response = _Head(self.answers)
        while response.first[1] == "100":
            self.connection.sendall(response.raw)
            response = _Head(self.answers)
        return response

    def copy(self, head: _Head, source: BinaryIO, target: socket.socket, *, cut: bool) -> None:
        """Forward a body; with `cut`, no more than half of it."""
        if head.chunked:
            self.copy_chunks(source, target)
            return
        cut = cut and head.length > 1
        left = head.length // 2 if cut else head.length
        while left:
            part = source.read(min(left, CHUNK))
            if not part:
                raise EOFError
            target.sendall(part)
            left -= len(part)
        if cut:
            self.server.count("cut")
            raise _Cut

    def copy_chunks(self, source: BinaryIO, target: socket.socket) -> None:
        """Forward a chunked body. It is never cut: the bodies of these clients have a length."""
        size = -1
        while size:
            line = source.readline()
            size = int(line.split(b";")[0], 16)
            target.sendall(line + source.read(size + 2))

    def refuse(self, request: _Head, answer: Answer) -> None:
        """Send the answer after the client has sent all, so that no reset discards it."""
        self.server.count(answer.code)
        if "expect" not in request.fields:
            left = request.length
            while left:
                left -= len(self.rfile.read(min(left, CHUNK))) or left
        self.connection.sendall(answer.encode(request.first[0]))

    def reset(self) -> None:
        """Reset the connection, which discards the data that the client has not read yet."""
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()


@contextlib.contextmanager
def proxy(upstream: int, seed: int = 0) -> Iterator[Proxy]:
    """Yield a proxy to the server at port `upstream`; `faults` is empty until it is set."""
    with Proxy(upstream, seed) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
