"""The flags of `linearsr serve` that are made from the limits."""

from __future__ import annotations

import argparse

import pytest

from linearsr.cli import serve
from linearsr.cli.flags import read_fields
from linearsr.errors import OptionError
from linearsr.web.service import JobLimits, Limits


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add(parser.add_subparsers())
    return parser.parse_args(["serve", *words])


def test_every_limit_has_a_flag_with_its_default() -> None:
    arguments = parse()
    assert read_fields(arguments, Limits, serve.LIMITS) == Limits()
    assert read_fields(arguments, JobLimits, serve.JOBS) == JobLimits()


def test_flags_set_limits() -> None:
    words = ("--max-pixels=24000000", "--max-output-pixels=96000000", "--jobs-kept-seconds=60")
    arguments = parse(*words)
    limits = read_fields(arguments, Limits, serve.LIMITS)
    assert limits == Limits(pixels=24_000_000, output_pixels=96_000_000)
    assert read_fields(arguments, JobLimits, serve.JOBS) == JobLimits(kept_seconds=60)


def test_wrong_limit_is_refused_by_its_name() -> None:
    with pytest.raises(OptionError, match="pixels"):
        read_fields(parse("--max-pixels=none"), Limits, serve.LIMITS)
