"""Evaluate models and results of other programs: folders or buckets of pictures, or Parquet shards.

    linearsr job evaluate --submit \\
        --hr s3://data/DIV2K --models linearsr-tiny mine=s3://runs/experts/weights \\
        --output s3://reports/div2k --actors 4 --gpu

Every option of `linearsr evaluate` works here, and gives the same numbers. A job that is started
again goes on with the pictures that are left or failed. Exit codes: 0 all done, 1 some failed,
2 wrong usage.

More: docs/guides/evaluation.md, docs/guides/storage.md.
"""

from __future__ import annotations

import argparse

from linearsr.cli import evaluate as options
from linearsr.cli.flags import add_fields
from linearsr.cli.jobs import shared

PLACES = ("folder", "output", "hr", "lr", "results")
SENT = ("models",)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the options of an evaluation and the fields of a Pool."""
    from linearsr.distributed.queue import Pool

    options.add_options(parser)
    add_fields(parser, Pool, Pool.model_fields)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, and print the table."""
    from linearsr.distributed.datasets.evaluate import EvaluationConfig, evaluate

    names = ("output", "actors", "actor_cpus", "gpu", "device")
    fields = {name: getattr(arguments, name) for name in names}
    config = shared.validated(EvaluationConfig, {**fields, "request": options.parse(arguments)})
    shared.connect(data=False)
    return options.print_report(evaluate(config), arguments.output)
