"""Uploads that are slow or never end, and honest ones beside them."""

from __future__ import annotations

import contextlib
import socket
import time
from typing import Any

import requests

from tests.helpers.forms import FORM

MEGABYTE = 1_000_000


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def begin(url: str, length: int, sent: int) -> socket.socket:
    """Return a connection with an upload of which only so many bytes have been sent."""
    connection = connect(url)
    head = f"POST /v1/upscale HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n"
    connection.sendall(f"{head}Content-Type: {FORM['Content-Type']}\r\n\r\n".encode())
    with contextlib.suppress(OSError):  # refused already
        connection.sendall(bytes(sent))
    return connection


def begin_many(url: str, stack: contextlib.ExitStack) -> None:
    """Begin 300 uploads that send nine bytes and 100 that send half a megabyte, then nothing."""
    for number in range(400):
        sent = 9 if number % 4 else MEGABYTE // 2
        stack.enter_context(begin(url, 20 * MEGABYTE, sent))


def upload(url: str, picture: bytes, **data: Any) -> requests.Response:
    files = {"image": ("x.png", picture)}
    return requests.post(f"{url}/v1/upscale", files=files, data=data, timeout=60)


def seconds_of(url: str) -> float:
    """Return the time of a GET that succeeds, in seconds."""
    started = time.perf_counter()
    assert requests.get(url, timeout=60).status_code == 200
    return time.perf_counter() - started
