"""`linearsr serve` in a process of its own, with a Ray cluster of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.helpers.processes import free_port


def serve(bundle: Path, *more: str) -> list[str]:
    """Return the command that serves a bundle."""
    command = [sys.executable, "-m", "linearsr.cli", "serve"]
    return [*command, "--model", str(bundle), "--device", "cpu", *more]


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Return the environment of `linearsr serve` with Ray's and the user's files in a folder."""
    places = {"RAY_TMPDIR": str(folder), "HOME": str(folder / "home")}
    return {**os.environ, **places, "OMP_NUM_THREADS": "1", **more}


@contextlib.contextmanager
def serving(bundle: Path, folder: Path, **more: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Yield a process that serves, and its address.

    folder: an empty folder with a short path, for Ray's sockets lie below it. more: variables of
    the environment.
    """
    port = str(free_port())
    (folder / "home").mkdir()
    process = subprocess.Popen(
        serve(bundle, "--port", port),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment(folder, **more),
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline().startswith("Loading ")
        assert f"http://127.0.0.1:{port}/" in process.stdout.readline()
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()
