"""All attacks at once on a real endpoint, with its proxy, replicas and guard."""

from __future__ import annotations

import contextlib
import json
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from linearsr.config import Options
from linearsr.imaging.files import encode, read
from linearsr.pipeline.upscaler import Upscaler
from tests.helpers.attacks import MEGABYTE, begin_many, connect, seconds_of, upload
from tests.helpers.command import serving
from tests.helpers.endpoint import answered_by, pixels_of
from tests.helpers.processes import until

pytestmark = [pytest.mark.cluster, pytest.mark.thorough]

UPLOADS = {"count": 8, "total_bytes": 64 * MEGABYTE, "grace_seconds": 2}
# The endpoint promises an answer of the health check and the page within this time, in seconds.
PROMISED = 1.0


@pytest.fixture(scope="module")
def served(small_bundle: Path) -> Iterator[tuple[psutil.Process, str]]:
    """Yield the process of `linearsr serve`, and its address."""
    with tempfile.TemporaryDirectory(prefix="lsr-", ignore_cleanup_errors=True) as name:
        limits = json.dumps(UPLOADS)
        with serving(small_bundle, Path(name), LINEARSR_UPLOADS=limits) as (process, url):
            yield psutil.Process(process.pid), url


def memory(family: list[psutil.Process]) -> int:
    return sum(process.memory_info().rss for process in family if process.is_running())


def http_processes(driver: psutil.Process) -> list[psutil.Process]:
    """Return Serve's proxy and the replicas of the ingress."""
    family = driver.children(recursive=True)
    names = ("ProxyActor", "ServeReplica:linearsr:Ingress")
    return [p for p in family if any(name in " ".join(p.cmdline()) for name in names)]


def test_slow_and_unfinished_uploads_and_floods_of_headers(
    served: tuple[psutil.Process, str], small_bundle: Path
) -> None:
    """300 uploads of nine bytes and 100 of half a megabyte, and 50 requests of 1 MB of headers."""
    driver, url = served
    picture = answered_by(small_bundle)[0].picture
    expected = encode(Upscaler.load(small_bundle, "cpu").upscale(read(picture), Options()), "png")
    assert upload(url, picture).status_code == 200
    family = http_processes(driver)
    assert len(family) == 2
    before = memory(family)
    with contextlib.ExitStack() as stack:
        begin_many(url, stack)
        for _ in range(50):
            flood = stack.enter_context(connect(url))
            with contextlib.suppress(OSError):  # refused while it comes
                flood.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * MEGABYTE)
        assert max(seconds_of(f"{url}/healthz"), seconds_of(f"{url}/")) < PROMISED
    until(lambda: upload(url, picture).status_code == 200, "a real upload", 10)
    assert memory(family) - before < 100 * MEGABYTE
    answer = upload(url, picture, format="png")
    assert (pixels_of(answer.content) == pixels_of(expected)).all()


def test_death_of_the_ingress_under_load_says_try_again(
    served: tuple[psutil.Process, str], small_bundle: Path
) -> None:
    driver, url = served
    picture = answered_by(small_bundle)[0].picture
    statuses: list[int] = []
    ended = threading.Event()

    def load() -> None:
        while not ended.is_set():
            statuses.append(upload(url, picture, steps=1).status_code)

    clients = [threading.Thread(target=load) for _ in range(4)]
    for client in clients:
        client.start()
    until(lambda: 200 in statuses, "a first result")
    (ingress,) = [p for p in http_processes(driver) if "Ingress" in " ".join(p.cmdline())]
    ingress.send_signal(signal.SIGKILL)
    until(lambda: 503 in statuses or 429 in statuses, "a refusal")
    until(lambda: statuses[-1] == 200, "service again", 120)
    ended.set()
    for client in clients:
        client.join()
    assert set(statuses) <= {200, 429, 503}
