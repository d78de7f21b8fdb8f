"""`linearsr serve` as a user starts and stops it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import numpy as np
import pytest

from linearsr.config import Options
from linearsr.imaging.files import encode, read
from linearsr.pipeline.upscaler import Upscaler
from tests.helpers.endpoint import LINE, answered_by, form_of, image_of, pixels_of
from tests.helpers.processes import free_port

# `linearsr serve` starts a Ray cluster of its own.
pytestmark = pytest.mark.cluster


@pytest.fixture
def command(small_bundle: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Yield a process that serves, and its address."""
    port = str(free_port())
    arguments = ["serve", "--model", str(small_bundle), "--device", "cpu", "--port", port]
    process = subprocess.Popen(
        [sys.executable, "-m", "linearsr.cli", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline().startswith("Loading ")
        assert f"http://127.0.0.1:{port}/" in process.stdout.readline()
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def test_sigterm_finishes_requests_in_flight_and_refuses_new_ones(
    command: tuple[subprocess.Popen[str], str], small_bundle: Path
) -> None:
    process, url = command
    case = answered_by(small_bundle)[0]
    options = Options(steps=50, seed=1)
    picture = Upscaler.load(small_bundle, "cpu").upscale(read(case.picture), options)
    expected = pixels_of(encode(picture, "png"))

    async def ask() -> tuple[bytes, int]:
        form = form_of(case.picture, steps=50, seed=1)
        headers = {"Accept": "text/event-stream"}
        async with (
            aiohttp.ClientSession(read_bufsize=LINE) as session,
            session.post(f"{url}/v1/upscale", data=form, headers=headers) as response,
        ):
            first = await response.content.readline()  # the request is in flight
            process.send_signal(signal.SIGTERM)
            while await health(session) == 200:  # until the signal has arrived
                pass
            refused = await later(session)
            return first + await response.content.read(), refused

    async def health(session: aiohttp.ClientSession) -> int:
        try:
            async with session.get(f"{url}/healthz") as response:
                return response.status
        except aiohttp.ClientConnectionError:
            return 503

    async def later(session: aiohttp.ClientSession) -> int:
        try:
            async with session.post(f"{url}/v1/upscale", data=form_of(case.picture)) as response:
                return response.status
        except aiohttp.ClientConnectionError:
            return 503

    events, status = asyncio.run(ask())
    assert status in (404, 503)
    (result,) = [line for line in events.splitlines() if b'"image"' in line]
    assert np.array_equal(pixels_of(image_of(result)), expected)
    assert process.wait(60) == 0
