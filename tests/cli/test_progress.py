"""Progress of the command: a bar on a terminal, lines where stderr is none."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import termios
import threading
from pathlib import Path

import pytest
from PIL import Image

from linearsr import cli
from linearsr.cli import progress
from linearsr.cli.progress import Display


class _Lines(io.StringIO):
    """A stream that is no terminal, and that lets a test wait for its lines."""

    def __init__(self) -> None:
        super().__init__()
        self.changed = threading.Condition()

    def write(self, text: str) -> int:
        with self.changed:
            count = super().write(text)
            self.changed.notify_all()
        return count

    def wait_for(self, lines: int) -> list[str]:
        with self.changed:
            assert self.changed.wait_for(lambda: self.getvalue().count("\n") >= lines, 60)
        return self.getvalue().splitlines()


def _command(bundle: Path, *words: object) -> list[str]:
    flags = ("upscale", "--model", bundle, "--steps", 2, "--device", "cpu")
    return [str(word) for word in (*flags, *words)]


def test_redirected_progress_is_a_line_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = _Lines()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(progress, "LINE_EVERY", 0.05)
    with Display("loading it"):
        waiting = stream.wait_for(2)
    assert all(line.startswith("linearsr: loading it, 00:0") for line in waiting)
    with Display("loading it") as display:
        display.show("a.png: tile 1/4", 0)
        display.show("a.png: tile 2/4", 0.25)
        lines = stream.wait_for(len(waiting) + 2)
    assert any(line.startswith("linearsr: 25%, a.png: tile 2/4, 00:0") for line in lines)
    assert "about 00:0" in lines[-1] and lines[-1].endswith(" left")


def test_redirected_command_prints_its_first_step(
    small_bundle: Path, photograph: Image.Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photograph.save(tmp_path / "a.png")
    photograph.save(tmp_path / "b.png")
    inputs = (tmp_path / "a.png", tmp_path / "b.png")
    assert cli.main(_command(small_bundle, *inputs, "--tile", 32, "-o", tmp_path / "out")) == 0
    out, err = capsys.readouterr()
    first = err.splitlines()[0]
    assert first.startswith("linearsr: 0%, 0 of 2 done, a.png: structure, tile 1/")
    assert "step 1/2" in first and "\r" not in err
    assert [line.partition(" -> ")[0] for line in out.splitlines()] == [
        "[1/2] a.png",
        "[2/2] b.png",
    ]


def test_terminal_shows_a_bar_of_tiles_pictures_and_errors_above_it(
    small_bundle: Path, photograph: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.png", "b.png"):
        photograph.save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 150, 0, 0))
    seen = bytearray()
    done = threading.Thread(target=_read_all, args=(reader, seen))
    done.start()
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        names = [tmp_path / name for name in ("a.png", "broken.png", "b.png")]
        code = cli.main(_command(small_bundle, *names, "--tile", 32, "-o", tmp_path / "out"))
    done.join(60)
    os.close(reader)
    text = seen.decode()
    assert code == 1
    assert text.index("loading ") < text.index("a.png: structure, tile 1/")
    assert "a.png: structure, tile 2/" in text and "step 2/2" in text
    assert "2 of 3 done, b.png: writing the result 100%" in text
    # The error has a line of its own: the bar before it was removed.
    (error,) = (line for line in text.splitlines() if "broken.png: not a picture" in line)
    assert error.rpartition("\r")[2].lstrip().startswith("linearsr: ")
    assert " left" in text


def _read_all(reader: int, seen: bytearray) -> None:
    while True:
        try:
            part = os.read(reader, 65536)
        except OSError:  # the other end is closed
            return
        if not part:
            return
        seen.extend(part)
