"""The `linearsr` command: parse the arguments, call the package, print each error on one line.

Exit codes: 0 success; 1 some inputs failed (each is named, the others are written); 2 usage error.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence

from linearsr import __version__
from linearsr.cli import evaluate, models, serve, tag, upscale
from linearsr.cli.flags import HelpFormatter
from linearsr.cli.report import exit_code

COMMANDS = (upscale, serve, tag, evaluate, models)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names may be invalid text
            stream.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(arguments)
    return exit_code(lambda: options.run(options), "finished files are kept")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="linearsr",
        description="Make photographs larger and sharper, with linear attention.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"linearsr {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser
