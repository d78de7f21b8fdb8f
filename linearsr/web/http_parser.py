"""The parser of HTTP requests, with limits for what comes before a request is whole."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from linearsr.web.guard import MAX_HEADER_BYTES

# Time in which the first line and headers of a request must come, in seconds.
HEADER_SECONDS = 30


class LimitedH11(H11Protocol):
    """uvicorn's protocol over h11, which answers long headers with 431 and a long URL with 414.

    uvicorn's other parser, httptools, holds headers of any length in memory.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = h11.Connection(h11.SERVER, MAX_HEADER_BYTES)
        self.deadline: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        """Take bytes; a request's first line and headers must be whole within HEADER_SECONDS."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE or not self.conn.trailing_data[0]:
            self._forget_deadline()
        elif self.deadline is None:
            self.deadline = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin a connection, which must send something within HEADER_SECONDS."""
        super().connection_made(transport)
        self.deadline = self.loop.call_later(HEADER_SECONDS, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """End a connection."""
        self._forget_deadline()
        super().connection_lost(exc)

    def _forget_deadline(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None

    def send_400_response(self, msg: str) -> None:
        """Answer what h11 refuses. uvicorn calls this where it has caught h11's error."""
        error = sys.exc_info()[1]
        if getattr(error, "error_status_hint", 400) != 431:
            super().send_400_response(msg)
            return
        begun, _ = self.conn.trailing_data
        long_url = b"\n" not in begun[:MAX_HEADER_BYTES]
        status, text = (414, "URI Too Long") if long_url else (431, "Header Fields Too Large")
        answer = f"HTTP/1.1 {status} {text}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
        self.transport.write(answer.encode())
        self.transport.close()
