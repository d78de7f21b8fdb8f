"""The parts of a submission: the command line, the files that travel, the token."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from linearsr.cli import job, submit
from linearsr.errors import LinearSRError

TOKEN = "0123456789abcdef"
EVERY_KIND = {
    "build-shards": ["--input", "a", "s3://b/c", "--output", "out", "--crop", "64"],
    "upscale-dataset": ["--input=a", "--output=out", "--tags=cat, dog", "--gpu", "--steps=3"],
    "tag-dataset": ["--input=a", "--output=out", "--vocabulary", "names.txt"],
    "pretrain": [
        *("--data=a", "--validation", "gone", "--storage", "out"),
        *("--set", "pretrain.steps=100", "--set", 'validation.metrics=["psnr@1"]'),
    ],
    "evaluate": ["a", "-o", "out", "--models", "x=a", "linearsr-tiny", "--lr", "clean"],
    "deploy": ["--set", "replicas=2", "model=s3://m", "--on-head", "--wait", "5"],
}


def _changed(name: str, words: list[str], staged: Path) -> list[str]:
    import importlib

    module = importlib.import_module(f"linearsr.cli.jobs.{name.replace('-', '_')}")
    parser = job.parser(name)
    here = {flag: submit._absolute(flag) for flag in module.PLACES}
    here |= {flag: submit._sender(staged, flag) for flag in module.SENT}
    return submit.arguments(parser, parser.parse_args([*words, "--submit"]), here)


@pytest.mark.parametrize("name", EVERY_KIND)
def test_command_line_of_the_cluster_gives_the_same_options(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where nothing exists, so that only outputs become absolute
    words = _changed(name, EVERY_KIND[name], tmp_path)
    parser = job.parser(name)
    expected, options = (vars(parser.parse_args(w)) for w in (EVERY_KIND[name], words))
    for flag in ("output", "storage"):
        if flag in expected:
            expected[flag] = str(tmp_path / "out")
    assert options == expected


def test_local_places_become_absolute_and_small_files_travel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    staged = tmp_path / "staged"
    (tmp_path / "a" / "__pycache__").mkdir(parents=True)
    (tmp_path / "a" / "__pycache__" / "b.pyc").touch()
    (tmp_path / "a" / "x.safetensors").write_bytes(b"x" * 2000)
    (tmp_path / "names.txt").write_text("cat\n")
    words = _changed("tag-dataset", EVERY_KIND["tag-dataset"], staged)
    assert f"--input={tmp_path}/a" in words
    assert "--vocabulary=files/vocabulary/names.txt" in words
    assert (staged / "files/vocabulary/names.txt").read_text() == "cat\n"
    words = _changed("evaluate", EVERY_KIND["evaluate"], staged)
    assert "x=files/models/a" in words and words[0] == f"{tmp_path}/a"
    assert [file.name for file in (staged / "files/models/a").iterdir()] == ["x.safetensors"]
    monkeypatch.setattr(submit, "LARGEST", 1000)
    words = _changed("upscale-dataset", [*EVERY_KIND["upscale-dataset"], "--model=a"], staged)
    assert f"--model={tmp_path}/a" in words and not (staged / "files/model").exists()
    assert "--model: a is not sent, as it has 0 MB" in capsys.readouterr().err


def test_large_file_in_the_package_is_left_out_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "package"
    (package / "runs").mkdir(parents=True)
    (package / "code.py").write_text("1\n")
    (package / "runs" / "checkpoint.pt").write_bytes(b"x" * 2000)
    monkeypatch.setattr(submit, "LARGEST", 1000)
    assert submit._copy(package, tmp_path / "copy") == 2
    assert [f.name for f in (tmp_path / "copy").rglob("*") if f.is_file()] == ["code.py"]
    assert "checkpoint.pt is not sent, as it is larger" in capsys.readouterr().err


class _Guarded(BaseHTTPRequestHandler):
    """A job server that answers its version to those who know the token."""

    def do_GET(self) -> None:
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        sent = "Authorization" in self.headers
        self.send_response(200 if known else 403 if sent else 401)
        body = b'{"ray_version": "2.60.0"}' if known else b"Unauthorized"
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.setenv(name, "")  # so that what the client sets is undone
    monkeypatch.setenv("HOME", str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), _Guarded) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_token_of_this_machine_is_sent_to_a_cluster_that_asks_for_one(
    guarded: str, tmp_path: Path
) -> None:
    with pytest.raises(LinearSRError, match="asks for its token, and there is none here: copy ~"):
        submit._connect(guarded)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("another\n")
    with pytest.raises(LinearSRError, match=r"the token of this machine: copy ~/\.ray"):
        submit._connect(guarded)
    (tmp_path / ".ray" / "auth_token").write_text(f"{TOKEN}\n")
    submit._connect(guarded)


def test_unreachable_cluster_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    with pytest.raises(
        LinearSRError, match=r"no cluster takes jobs at http://127.0.0.1:1: .*ray st"
    ):
        submit._connect("http://127.0.0.1:1")
