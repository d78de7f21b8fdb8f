"""The `linearsr` command: parse the arguments, call the package, print each error on one line.

Exit codes: 0 success; 1 some inputs failed (each is named, the others are written); 2 usage error.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

from linearsr import __version__
from linearsr.cli import evaluate, job, models, serve, tag, upscale
from linearsr.cli.flags import Parser
from linearsr.cli.report import exit_code

COMMANDS = (upscale, serve, tag, evaluate, models)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names may be invalid text
            stream.reconfigure(errors="backslashreplace")
    words = sys.argv[1:] if arguments is None else arguments

    def parse_and_run() -> int:
        options = parser(words).parse_args(words)
        code: int = options.run(options)
        return code

    return exit_code(parse_and_run, "finished files are kept")


def parser(words: Sequence[str] = ()) -> Parser:
    """Return the parser of the command line `words`; see `linearsr.cli.job.add`."""
    parser = Parser(
        prog="linearsr", description="Make photographs larger and sharper, with linear attention."
    )
    parser.add_argument("--version", action="version", version=f"linearsr {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    job.add(commands, words)
    return parser
