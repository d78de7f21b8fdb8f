"""`linearsr serve` as a user starts and stops it."""

from __future__ import annotations

import asyncio
import base64
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
import pytest
import requests
from openai import OpenAI

from linearsr.config import Options
from linearsr.distributed.serve.guard import CALLBACK, guard_proxies
from linearsr.errors import OptionError
from linearsr.imaging.files import encode, read
from linearsr.pipeline.upscaler import Upscaler
from linearsr.web.service import Limits
from tests.helpers.command import serving
from tests.helpers.endpoint import LINE, Case, answered_by, form_of, image_of, pixels_of
from tests.helpers.processes import until

# `linearsr serve` starts a Ray cluster of its own.
pytestmark = pytest.mark.cluster


TOKEN = "a-word-that-no-log-may-have"
SENT = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Yield an empty folder for Ray's files, whose path is short, for it holds sockets."""
    with tempfile.TemporaryDirectory(prefix="lsr-", ignore_cleanup_errors=True) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def command(small_bundle: Path, folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Yield a process that serves, and its address. Its RAY_AUTH_MODE is "disabled"."""
    with serving(small_bundle, folder, LINEARSR_TOKEN=TOKEN) as process_and_url:
        yield process_and_url


def test_local_cluster_listens_on_loopback_and_has_a_token_of_its_user(
    command: tuple[subprocess.Popen[str], str], folder: Path
) -> None:
    """A replica of Serve has one port that Ray binds to all addresses; it asks for the token."""
    driver = psutil.Process(command[0].pid)
    family = {process.pid: " ".join(process.cmdline()) for process in driver.children(True)}
    found = [c for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.pid in family]
    sockets = [(family[c.pid], c.laddr.ip.removeprefix("::ffff:")) for c in found if c.pid]
    assert len(sockets) > 10
    for name, address in sockets:
        open_to_all = name.startswith("ray::ServeReplica") and address == "::"
        assert address in ("127.0.0.1", "::1") or open_to_all, name
    token = folder / "home" / ".ray" / "auth_token"
    assert len(token.read_text()) == 64 and token.stat().st_mode & 0o777 == 0o600


def test_proxy_has_the_guard(command: tuple[subprocess.Popen[str], str]) -> None:
    url = f"{command[1]}/healthz"
    assert requests.get(url, headers={"X-Long": "a" * 70_000}, timeout=60).status_code == 431
    assert requests.get(url, headers={"Host": "evil.example"}, timeout=60).status_code == 400
    answer = requests.get(url, headers={"X-Request-Id": "a" * 200}, timeout=60)
    assert answer.status_code == 200 and len(answer.headers["X-Request-Id"]) < 129


def expected_of(case: Case, bundle: Path, **options: Any) -> np.ndarray:
    picture = Upscaler.load(bundle, "cpu").upscale(read(case.picture), Options(**options))
    return pixels_of(encode(picture, "png"))


def test_openai_client_gets_the_pixels_of_the_command(
    command: tuple[subprocess.Popen[str], str], small_bundle: Path
) -> None:
    case = answered_by(small_bundle)[0]
    options: dict[str, Any] = {"steps": 4, "seed": 5, "scale": 1.5}
    client = OpenAI(base_url=f"{command[1]}/v1", api_key=TOKEN, max_retries=0)
    answer = client.images.edit(image=("x.png", case.picture), prompt="", extra_body=options)
    (image,) = answer.data or []
    pixels = pixels_of(base64.b64decode(image.b64_json or ""))
    assert np.array_equal(pixels, expected_of(case, small_bundle, **options))


def test_job_gets_the_pixels_of_the_command(
    command: tuple[subprocess.Popen[str], str], small_bundle: Path
) -> None:
    case = answered_by(small_bundle)[0]
    url = command[1]
    begun = requests.post(
        f"{url}/v1/upscale",
        files={"image": ("a.png", case.picture)},
        data={"steps": 4, "seed": 3},
        headers={**SENT, "Prefer": "respond-async"},
        timeout=60,
    )
    assert begun.status_code == 202 and begun.headers["Preference-Applied"] == "respond-async"
    address = url + begun.headers["Location"]
    state = partial(requests.get, address, headers=SENT, timeout=60)
    until(lambda: state().json()["expires"] is not None, "the job has finished")
    assert state().json()["status"] == "succeeded"
    content = requests.get(f"{address}/content", headers=SENT, timeout=60).content
    assert np.array_equal(pixels_of(content), expected_of(case, small_bundle, steps=4, seed=3))
    assert requests.get(address, timeout=60).status_code == 401
    assert requests.delete(address, headers=SENT, timeout=60).status_code == 204
    assert state().status_code == 404


def test_sigterm_finishes_requests_in_flight_and_refuses_new_ones(
    command: tuple[subprocess.Popen[str], str], small_bundle: Path
) -> None:
    process, url = command
    case = answered_by(small_bundle)[0]
    expected = expected_of(case, small_bundle, steps=50, seed=1)

    async def ask() -> tuple[bytes, int]:
        form = form_of(case.picture, steps=50, seed=1)
        headers = {"Accept": "text/event-stream", **SENT}
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
            form = form_of(case.picture)
            async with session.post(f"{url}/v1/upscale", data=form, headers=SENT) as response:
                return response.status
        except aiohttp.ClientConnectionError:
            return 503

    events, status = asyncio.run(ask())
    assert status in (404, 503)
    (result,) = [line for line in events.splitlines() if b'"image"' in line]
    assert np.array_equal(pixels_of(image_of(result)), expected)
    assert process.wait(60) == 0


def test_no_file_of_ray_has_the_token(folder: Path) -> None:
    """This is the last test, after the endpoint has ended."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len([path for path in files if path.suffix in (".log", ".out", ".err")]) > 10
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []


def test_guard_refuses_to_take_the_place_of_another_callback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(CALLBACK, "mine.middlewares")
    with pytest.raises(OptionError, match=r"mine\.middlewares, but the endpoint needs linearsr"):
        guard_proxies(Limits())
