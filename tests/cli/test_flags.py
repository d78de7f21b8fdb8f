"""Typing errors are answered on one line with the word that was meant; no default is None."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest

from linearsr import cli
from linearsr.cli import job
from linearsr.errors import MissingExtra, require

PHOTO = ("upscale", "photo.jpg")


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["upscal", "photo.jpg"], "unknown command 'upscal'; did you mean upscale?"),
        (["xyz"], "unknown command 'xyz'; known are upscale, serve, tag, evaluate, models, job"),
        (["--versoin"], "unknown option --versoin; did you mean --version?"),
        ([*PHOTO, "-o", "x.png", "--sclae", "2"], "unknown option --sclae; did you mean --scale?"),
        # The required option is not reported as missing.
        ([*PHOTO, "--otuput=x.png"], "unknown option --otuput; did you mean --output?"),
        (
            [*PHOTO, "-o", "x.png", "--zzzz"],
            "unknown option --zzzz (help: linearsr upscale --help)",
        ),
        ([*PHOTO], "the following arguments are required: -o/--output"),
        ([*PHOTO, "-o", "x.png", "--model", "linearsr-tyni"], "did you mean linearsr-tiny?"),
        (["serve", "--layout", "splitt"], "unknown choice 'splitt'; did you mean split?"),
        (["serve", "--port", "http"], "argument --port: invalid int value: 'http'"),
        (["models", "linearsr-tiny"], "unrecognized arguments: linearsr-tiny"),
        (["job", "upscale_dataset"], "unknown command 'upscale_dataset'; did you mean upscale-"),
        (["job", "deploy", "--sett", "replicas=2"], "unknown option --sett; did you mean --set?"),
        (["job", "pretrain", "--recipe", "tiny-cpu"], "did you mean tiny_cpu?"),
        (["job", "deploy", "--address", "http://127.0.0.1:1"], "--address is for --submit"),
    ],
)
def test_typing_error_takes_one_line_and_exit_code_2(
    words: list[str],
    advice: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo.jpg").touch()
    try:
        code: object = cli.main(words)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("linearsr: ") and err.count("\n") == 1
    assert advice in err


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from _parsers(child)


def test_abbreviated_options_and_negative_numbers_are_accepted() -> None:
    parser = cli.parser()
    options = parser.parse_args(["upscale", "a.png", "--out", "b.png", "--sca=2"])
    assert (str(options.output), options.scale) == ("b.png", "2")
    with pytest.raises(SystemExit):
        parser.parse_args(["serve", "--rep"])  # replicas needs a value
    assert parser.parse_args(["serve", "--port", "-1"]).port == -1


@pytest.mark.parametrize("name", [None, *job.JOBS])
def test_help_shows_no_default_of_none(name: str | None) -> None:
    parsers = list(_parsers(cli.parser() if name is None else job.parser(name)))
    for parser in parsers:
        text = " ".join(parser.format_help().split())
        assert "None)" not in text and "==SUPPRESS==" not in text
    assert len(parsers) == (1 if name else 1 + 6 + len(job.JOBS))


def test_missing_extra_is_advised_in_the_form_for_a_clone_or_a_wheel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clone = Path(cli.__file__).parents[2]
    monkeypatch.chdir(clone)
    with pytest.raises(MissingExtra, match=r"; pip install -e '\.\[serve\]'$"):
        require("serve", "nowhere_at_all")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingExtra) as elsewhere:
        require("serve", "nowhere_at_all")
    assert str(elsewhere.value).endswith(f"pip install -e '{clone}[serve]'")
    installed = tmp_path / "site-packages" / "linearsr" / "errors.py"
    monkeypatch.setattr("linearsr.errors.__file__", str(installed))
    with pytest.raises(MissingExtra, match=r"; pip install 'linearsr\[serve\]'$"):
        require("serve", "nowhere_at_all")
