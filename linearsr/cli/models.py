"""`linearsr models`: list the bundled models."""

from __future__ import annotations

import argparse

from linearsr.cli.flags import Commands
from linearsr.cli.report import OK


def add(commands: Commands) -> None:
    """Add the subcommand."""
    text = "list the bundled models with their size, experts, steps and licence"
    parser = commands.add_parser("models", help=text, description=f"{text.capitalize()}.")
    parser.set_defaults(run=_run)


def _run(_: argparse.Namespace) -> int:
    from linearsr import weights

    for name in weights.available():
        bundle = weights.load(name)
        count = sum(p.numel() for p in bundle.experts[0].parameters())
        print(
            f"{name}: x{bundle.config.scale}, {len(bundle.experts)} experts of {count / 1e6:.2f} M "
            f"parameters, {bundle.config.sampling.steps} steps, "
            f"{bundle.provenance.get('licence', 'licence unknown')}"
        )
    return OK
