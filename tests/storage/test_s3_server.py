"""The server and the proxy that other tests rely on."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from linearsr.storage.location import locate
from tests.helpers.s3 import Server
from tests.helpers.s3_faults import INTERNAL_ERROR, SLOW_DOWN, Faults
from tools import s3_server as swift


def _store(folder: Path, patch: pytest.MonkeyPatch, *, new: bool) -> bytes:
    port = swift.free_port()
    for name, value in swift.environment(port).items():
        patch.setenv(name, value)
    with swift.running(folder, port):
        if not new:
            return locate("s3://test-0/x").read()
        (locate(Server(port).bucket()) / "x").write(b"stored")
        return b""


def test_objects_outlive_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _store(tmp_path, monkeypatch, new=True)
    assert _store(tmp_path, monkeypatch, new=False) == b"stored"


def test_servers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    """A process that is killed cannot stop its servers itself."""
    port = swift.free_port()
    command = [sys.executable, "-m", "tools.s3_server", f"--folder={tmp_path}", f"--port={port}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        assert "another terminal" in started.stdout.readline()
        servers = psutil.Process(started.pid).children()
        assert len(servers) == 4
        started.kill()
    assert psutil.wait_procs(servers, timeout=60)[1] == []


def test_a_server_that_is_not_installed_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINEARSR_SWIFT_BIN", str(tmp_path))
    with (
        pytest.raises(swift.SwiftError, match="make s3-server"),
        swift.running(tmp_path, swift.free_port()),
    ):
        pass


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server((swift.HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(swift.SwiftError, match=f"port {port}"), swift.running(tmp_path, port):
            pass


def test_faults_have_their_rates_and_repeat_with_the_same_seed() -> None:
    faults = Faults(slow_down=0.1, internal_error=0.1, reset=0.2, cut=0.1)

    def draws(seed: int) -> list[object]:
        rng = random.Random(seed)
        return [faults.draw(rng) for _ in range(10_000)]

    drawn = draws(3)
    assert drawn == draws(3) != draws(4)
    for kind, rate in [(SLOW_DOWN, 0.1), (INTERNAL_ERROR, 0.1), ("reset", 0.2), ("cut", 0.1)]:
        assert abs(drawn.count(kind) / 10_000 - rate) < 0.02
    assert Faults(always=SLOW_DOWN).draw(random.Random(0)) is SLOW_DOWN
    assert set(drawn) > {None} and Faults().draw(random.Random(0)) is None
