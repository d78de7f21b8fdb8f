"""The parser of HTTP requests, with limits for what comes before a request is whole."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from linearsr.web.guard import MAX_HEADER_BYTES

# Time in which a new connection must send its first line and headers, in seconds.
HEADER_SECONDS = 30


class LimitedH11(H11Protocol):
    """uvicorn's protocol over h11, which answers long headers with 431 and a long URL with 414.

    uvicorn's other parser, httptools, holds headers of any length in memory.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = h11.Connection(h11.SERVER, MAX_HEADER_BYTES)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin a connection, and close it if no request comes."""
        super().connection_made(transport)
        self.loop.call_later(HEADER_SECONDS, self._close_if_silent)

    def _close_if_silent(self) -> None:
        is_websocket = self.transport.get_protocol() is not self
        if self.cycle is None and not is_websocket and not self.transport.is_closing():
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Answer what h11 refuses. uvicorn calls this where it has caught h11's error."""
        error = sys.exc_info()[1]
        if getattr(error, "error_status_hint", 400) != 431:
            super().send_400_response(msg)
            return
        begun, _ = self.conn.trailing_data
        long_url = b"\r\n" not in begun[:MAX_HEADER_BYTES]
        status, text = (414, "URI Too Long") if long_url else (431, "Header Fields Too Large")
        answer = f"HTTP/1.1 {status} {text}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
        self.transport.write(answer.encode())
        self.transport.close()
