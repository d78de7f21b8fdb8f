"""The pictures that a command takes, their results' files, and what is refused before any work."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from linearsr import cli
from linearsr.cli.inputs import Pair, pair_files
from linearsr.errors import OptionError, OutputError
from linearsr.pipeline.upscaler import Upscaler
from tests.helpers.permissions import permissions_hold

NO_PICTURE = "reading it fails, but nothing here reads it"


def _touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(NO_PICTURE)


def _pairs(
    inputs: list[Path], output: Path, format: str | None = None, *, skip: bool = False
) -> tuple[list[Pair], int]:
    return pair_files(inputs, output, format, skip_existing=skip)


@pytest.fixture
def run(small_bundle: Path, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Calls `linearsr upscale` with the small model; returns exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        common = ["upscale", "--model", small_bundle, "--steps", 1, "--device", "cpu"]
        code = cli.main([str(a) for a in [*common, *arguments]])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model must not begin."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the model has begun")

    monkeypatch.setattr(Upscaler, "upscale_tagged", fail)


def test_pictures_of_all_names_are_upscaled_and_the_rest_is_told(  # type: ignore[no-untyped-def]
    run, tmp_path: Path
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    _touch(folder, "._a.jpg", ".DS_Store", "__MACOSX/._a.jpg", "notes.txt", "notes")
    picture = Image.new("RGB", (8, 8), "red")
    for name in ("a.jfif", "Mt. Everest", "scan.001"):
        picture.save(folder / name, "JPEG")
    (folder / "b.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "loop").symlink_to(".")
    code, _, err = run(folder, "-o", out)
    assert code == 0
    assert sorted(p.name for p in out.iterdir()) == ["Mt. Everest.png", "a.jpg", "scan.001.png"]
    assert err.splitlines()[:-1] == [  # the last line is the progress
        "linearsr: left out: 1 link that leads in a circle (loop)",
        "linearsr: left out: 3 files that macOS made",
        "linearsr: left out: 1 HEIC picture (b.heic): convert to PNG or JPEG",
    ]


def test_a_folder_that_cannot_be_listed_is_named_and_the_rest_done(  # type: ignore[no-untyped-def]
    run, tmp_path: Path
) -> None:
    (tmp_path / "in" / "lost+found").mkdir(parents=True, mode=0)
    Image.new("RGB", (8, 8)).save(tmp_path / "in" / "a.png")
    with permissions_hold():
        code, _, err = run(tmp_path / "in", "-o", tmp_path / "out")
    assert code == 1 and "in/lost+found: cannot be listed (Permission denied)" in err
    assert (tmp_path / "out" / "a.png").exists()


def test_a_second_run_in_place_skips_the_results_of_the_first(  # type: ignore[no-untyped-def]
    run, tmp_path: Path
) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    arguments = (tmp_path, "-o", tmp_path, "--format", "webp", "--skip-existing")
    assert run(*arguments)[0] == 0
    before = (tmp_path / "a.webp").stat()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "b.gif")
    code, out, err = run(*arguments)
    assert (code, err.count("\n")) == (0, 1) and "b.gif" in out and "a.png" not in out
    assert sorted(path.name for path in tmp_path.glob("*.*")) == [
        "a.png",
        "a.webp",
        "b.gif",
        "b.webp",
    ]
    assert (tmp_path / "a.webp").stat() == before


def test_an_own_picture_with_the_name_of_a_result_is_not_taken_for_one(tmp_path: Path) -> None:
    for name in ("a.png", "b.webp"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    with pytest.raises(OptionError, match=r"b\.webp would be overwritten"):
        _pairs([tmp_path], tmp_path, "webp")


@pytest.mark.parametrize("inputs", [("a.png", "b.png"), (".",)])
def test_a_pictures_name_for_several_results_is_refused(
    tmp_path: Path, inputs: tuple[str, ...]
) -> None:
    _touch(tmp_path, "a.png", "b.png")
    with pytest.raises(OptionError, match=r"big\.png has the name of a picture; give a folder"):
        _pairs([tmp_path / name for name in inputs], tmp_path / "big.png")
    assert not (tmp_path / "big.png").exists()
    (tmp_path / "big.png").mkdir()
    assert len(_pairs([tmp_path / "a.png", tmp_path / "b.png"], tmp_path / "big.png")[0]) == 2


def test_the_hint_for_two_results_of_one_name_works(tmp_path: Path) -> None:
    _touch(tmp_path / "in", "p.jpg", "p.png")
    with pytest.raises(OptionError, match=r"p\.jpg and .*p\.png would both .*; leave out --format"):
        _pairs([tmp_path / "in"], tmp_path / "out", "webp")
    assert len(_pairs([tmp_path / "in"], tmp_path / "out")[0]) == 2
    _touch(tmp_path / "in", "p.gif")
    with pytest.raises(OptionError, match=r"p\.png; rename one, or upscale them into different"):
        _pairs([tmp_path / "in"], tmp_path / "out")
    for name in ("p.gif", "p.png"):
        _pairs([tmp_path / "in" / name], tmp_path / name.removeprefix("p."))
    assert not (tmp_path / "out").exists()


def test_a_result_with_the_name_of_another_ones_folder_is_refused(tmp_path: Path) -> None:
    _touch(tmp_path / "in", "a.bmp", "a.png/x/b.png")
    with pytest.raises(OptionError, match=r"a\.bmp would become .*a\.png, which is the folder of"):
        _pairs([tmp_path / "in"], tmp_path / "out")
    _touch(tmp_path / "in2", "a.gif", "a.webp/b.png")
    with pytest.raises(OptionError, match="; leave out --format, rename one"):
        _pairs([tmp_path / "in2"], tmp_path / "out", "webp")
    assert len(_pairs([tmp_path / "in2"], tmp_path / "out")[0]) == 2


def test_results_that_cannot_be_written_fail_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = f"{'x' * 251}.gif"
    _touch(tmp_path / "in", long, f"{'y' * 250}.png", "sub/a.png")
    (tmp_path / "out" / "sub").mkdir(parents=True, mode=0o555)
    with permissions_hold():
        pairs, failed = _pairs([tmp_path / "in"], tmp_path / "out", "webp")
    assert [pair.source.name for pair in pairs] == [f"{'y' * 250}.png"] and failed == 2
    err = capsys.readouterr().err
    assert "the name has 256 bytes, and the file system allows 255" in err
    assert "sub cannot be written to (Permission denied)" in err


def test_an_output_that_cannot_be_written_takes_one_line(tmp_path: Path) -> None:
    _touch(tmp_path / "in", "a.png", "b.png")
    (tmp_path / "out").mkdir(mode=0o555)
    with permissions_hold(), pytest.raises(OutputError, match="out cannot be written to"):
        _pairs([tmp_path / "in"], tmp_path / "out")


@pytest.mark.parametrize(("suffix", "width"), [("webp", 4200), ("jpg", 16400)])
@pytest.mark.usefixtures("no_work")
def test_results_too_wide_for_their_format_are_refused_before_the_first_step(  # type: ignore[no-untyped-def]
    run, tmp_path: Path, suffix: str, width: int
) -> None:
    Image.new("RGB", (width, 2)).save(tmp_path / "pano.png")
    code, _, err = run(tmp_path / "pano.png", "-o", tmp_path / f"out.{suffix}")
    assert code == 1 and f"{4 * width}x8 is too large for" in err and "write PNG or TIFF" in err


@pytest.mark.parametrize(
    ("error", "words"),
    [(KeyError(16), "KeyError: 16"), (RecursionError("deep"), "RecursionError: deep")],
)
def test_an_unexpected_error_costs_one_picture(  # type: ignore[no-untyped-def]
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "in" / name)
    upscale = Upscaler.upscale_tagged
    failures = iter([error])

    def fail_once(*arguments: Any) -> Any:
        for failure in failures:
            raise failure
        return upscale(*arguments)

    monkeypatch.setattr(Upscaler, "upscale_tagged", fail_once)
    code, _, err = run(tmp_path / "in", "-o", tmp_path / "out")
    assert code == 1 and [line for line in err.splitlines() if "step" not in line] == [
        f"linearsr: {tmp_path / 'in' / 'a.png'}: {words}",
        "linearsr: 1 failed; the others are written",
    ]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.png"]


def test_names_that_are_not_utf8_are_printed_readably(small_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in (b"caf\xe9.png", b"bad\xe9.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "in" / os.fsdecode(name))
    (tmp_path / "in" / os.fsdecode(b"bad\xe9.png")).write_bytes(b"no picture")
    (tmp_path / "in" / os.fsdecode(b"text\xe9.txt")).write_bytes(b"no picture")
    flags = ["--model", str(small_bundle), "--steps", "1", "--device", "cpu"]
    command = [sys.executable, "-m", "linearsr.cli", "upscale", str(tmp_path / "in"), *flags]
    result = subprocess.run(
        [*command, "-o", str(tmp_path / "out")],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
    )
    assert result.returncode == 1
    assert rb"caf\xe9.png -> " in result.stdout and rb"bad\xe9.png: " in result.stderr
    assert rb"left out: 1 file whose name is not UTF-8 (text\xe9.txt)" in result.stderr
    assert [os.fsencode(path.name) for path in (tmp_path / "out").iterdir()] == [b"caf\xe9.png"]


def test_tags_of_a_picture_say_what_was_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Image.new("RGB", (8, 8))
    page.save(tmp_path / "a.tif", save_all=True, append_images=[page])
    monkeypatch.setattr("linearsr.tags.load_tagger", lambda *_: lambda _: [])
    assert cli.main(["tag", str(tmp_path / "a.tif")]) == 0
    assert capsys.readouterr().err == f"linearsr: {tmp_path}/a.tif: only the first of 2 pages\n"


def test_tags_of_a_folder_name_what_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    (tmp_path / os.fsdecode(b"caf\xe9")).write_bytes(buffer.getvalue())
    _touch(tmp_path, "._x.jpg")
    (tmp_path / "locked").mkdir(mode=0)
    monkeypatch.setattr("linearsr.tags.load_tagger", lambda *_: lambda _: [])
    with permissions_hold():
        assert cli.main(["tag", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == f"{tmp_path}/caf\\xe9: no tags\n"
    assert "1 file that macOS made" in err and "locked: cannot be listed" in err
