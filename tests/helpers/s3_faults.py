"""A proxy between an S3 client and its server that does what real storage does on a bad day.

It answers some requests with 500 InternalError or 503 SlowDown, resets some connections once the
server has done what was asked, and cuts some bodies in the middle: of the request if it has one,
else of the response. Which ones is drawn from a seed. It counts what it has done, so that a test
can tell that something was tested.
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
    """An error in S3's own format. `extra` is further XML, as S3 has it inside <Error>."""

    status: int
    code: str
    message: str
    extra: str = ""
    headers: tuple[str, ...] = ()

    def encode(self, method: str) -> bytes:
        """The response; S3 answers HEAD without a body."""
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
    """How often what happens, as parts of 1; `always`: every request gets this answer.

    delay: seconds before a request reaches the server.
    """

    slow_down: float = 0.0
    internal_error: float = 0.0
    reset: float = 0.0
    cut: float = 0.0
    always: Answer | None = None
    delay: float = 0.0

    def draw(self, rng: random.Random) -> Answer | str | None:
        """What happens to a request: an answer, "reset", "cut", or nothing."""
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
    """First line and headers of a request or response, and how long the body after them is."""

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
    """A body was cut here: what is still open has to be closed."""


class Proxy(socketserver.ThreadingTCPServer):
    """`port` leads to the server at `upstream`; `faults` can be changed at any time."""

    daemon_threads, block_on_close, request_queue_size = True, False, 128

    def __init__(self, upstream: int, seed: int) -> None:
        super().__init__((HOST, 0), _Connection)
        self.port: int = self.server_address[1]
        self.upstream, self.faults = upstream, Faults()
        self.injected: Counter[str] = Counter()
        self._rng, self._lock = random.Random(seed), threading.Lock()

    def draw(self) -> Answer | str | None:
        """The next request's fault."""
        with self._lock:
            self.injected["requests"] += 1
            return self.faults.draw(self._rng)

    def count(self, kind: str) -> None:
        """One more of what was injected."""
        with self._lock:
            self.injected[kind] += 1


class _Connection(socketserver.StreamRequestHandler):
    """One connection of a client, with one of its own to the server."""

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
        """One request and its response. Whether the connection takes another."""
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
        """The request's body to the server, and the head of the response to it."""
        if "expect" in request.fields:
            response = _Head(self.answers)
            if response.first[1] != "100":
                return response
            self.connection.sendall(response.raw)
        # A server that refuses the request need not read it: its answer counts.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.copy(request, self.rfile, self.upstream, cut=cut)
        response = _Head(self.answers)
        while response.first[1] == "100":
            self.connection.sendall(response.raw)
            response = _Head(self.answers)
        return response

    def copy(self, head: _Head, source: BinaryIO, target: socket.socket, *, cut: bool) -> None:
        """A body from one side to the other; to be cut, no more than half of it."""
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
        """Never cut: what the clients here send and get has a length."""
        size = -1
        while size:
            line = source.readline()
            size = int(line.split(b";")[0], 16)
            target.sendall(line + source.read(size + 2))

    def refuse(self, request: _Head, answer: Answer) -> None:
        """The answer, once the client has sent all, so that it is not lost to a reset."""
        self.server.count(answer.code)
        if "expect" not in request.fields:
            left = request.length
            while left:
                left -= len(self.rfile.read(min(left, CHUNK))) or left
        self.connection.sendall(answer.encode(request.first[0]))

    def reset(self) -> None:
        """Close without a goodbye: what the client has not read yet is lost to it."""
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()


@contextlib.contextmanager
def proxy(upstream: int, seed: int = 0) -> Iterator[Proxy]:
    """A proxy to the server at port `upstream`, without faults until it is told some."""
    with Proxy(upstream, seed) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
