"""The `linearsr` command: words into calls, errors into one line each; decides nothing else.

Exit codes: 0 all done; 1 some inputs failed (each named, the rest written); 2 usage.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence

from linearsr import __version__
from linearsr.cli import evaluate, models, serve, tag, upscale
from linearsr.cli.report import exit_code

COMMANDS = (upscale, serve, tag, evaluate, models)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names need not be valid text
            stream.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(arguments)
    return exit_code(lambda: options.run(options), "finished files are kept")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="linearsr", description="Photographs made larger and sharper, by linear attention."
    )
    parser.add_argument("--version", action="version", version=f"linearsr {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser
