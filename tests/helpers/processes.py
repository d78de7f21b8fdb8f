"""Waiting for other processes, and ports for them."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(done: Callable[[], bool], what: str, seconds: float = 300, pause: float = 0.1) -> None:
    """Wait until a condition holds; fail with the text `what` after `seconds`.

    pause: the longest time between two looks, which cost the processes that are waited for.
    """
    began = time.monotonic()
    while not done():
        waited = time.monotonic() - began
        assert waited < seconds, f"{what}: not within {seconds:g} s"
        time.sleep(min(pause, 0.02 + waited / 20))
