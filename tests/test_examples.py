"""The examples of examples/ run and write the results that they describe."""

from __future__ import annotations

import contextlib
import json
import runpy
import socket
import socketserver
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from linearsr import Upscaler
from linearsr.evaluation.drawing import GAP, LABEL
from tests.helpers.local_service import Local, served

EXAMPLES = Path(__file__).parents[1] / "examples"


def _run(name: str, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the script; return its global names."""
    monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.fixture
def photo(photograph: Image.Image, tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    photograph.save(path)
    return path


def test_upscale_example_draws_versions_side_by_side(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = tmp_path / "compare.png"
    width = _run("upscale.py", photo, result, monkeypatch=monkeypatch)["PANEL"]
    sheet = Image.open(result)
    # Below the labels, four columns show versions of the same picture.
    lefts = [GAP + i * (width + GAP) for i in range(4)]
    columns = [sheet.crop((left, LABEL, left + width, sheet.height)) for left in lefts]
    for left, right in pairwise(columns):
        difference = ImageChops.difference(left, right)
        assert difference.getbbox() is not None
        assert sum(difference.convert("L").histogram()[100:]) < 0.05 * width * sheet.height


def test_client_example_prints_progress_and_saves_the_result(
    photo: Path,
    small_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    upscaler = Upscaler.load(small_bundle, "cpu")
    result = tmp_path / "large.png"
    with served(Local(upscaler)) as url:
        _run("client.py", photo, result, url, monkeypatch=monkeypatch)
        (tmp_path / "text.png").write_text(json.dumps("no picture"))
        with pytest.raises(SystemExit, match=r"^415: "):
            _run("client.py", tmp_path / "text.png", result, url, monkeypatch=monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("  0%  ") and lines[-2].startswith("100%  ")
    assert lines[-1] == f"{result}: 256x192"
    expected = upscaler(Image.open(photo), steps=4)
    assert ImageChops.difference(Image.open(result).convert("RGB"), expected).getbbox() is None


def test_client_example_asks_again_after_a_refusal_and_a_cut(
    photo: Path,
    small_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first answer is 503, and the second one's connection is cut behind its first event."""
    event = b'event: progress\r\ndata: {"percent": 0, "expert": "structure", "step": 0}\r\n\r\n'
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    cut = head + b"%x\r\n%s\r\n" % (len(event), event)
    busy = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"
    service, result = Local(Upscaler.load(small_bundle, "cpu")), tmp_path / "large.png"
    with served(service) as url, failing_first(url, [busy, cut]) as fails:
        _run("client.py", photo, result, fails, monkeypatch=monkeypatch)
    assert Image.open(result).size == (256, 192) and service.requests == 1
    assert capsys.readouterr().out.startswith("  0%  structure: step 0\n  0%  ")


@contextlib.contextmanager
def failing_first(url: str, answers: list[bytes]) -> Iterator[str]:
    """Listen on a free port; give the first requests these answers, and send others on to `url`."""
    host, port = url.removeprefix("http://").split(":")

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            if answers:
                self.request.recv(1 << 20)
                self.request.sendall(answers.pop(0))
                self.request.shutdown(socket.SHUT_WR)
                while self.request.recv(1 << 20):
                    pass
                return
            with socket.create_connection((host, int(port))) as behind:
                threading.Thread(target=copy, args=(self.request, behind), daemon=True).start()
                copy(behind, self.request)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def copy(source: socket.socket, target: socket.socket) -> None:
    """Send on all bytes until one of the two sockets is closed."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
