"""Evaluate models and results of other programs: folders or buckets of pictures, or Parquet shards.

    ray job submit --working-dir . -- python ray_jobs/evaluate.py \\
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
from linearsr.cli import job


def parser() -> argparse.ArgumentParser:
    """Return a parser with the options of an evaluation and the fields of a Pool."""
    from linearsr.distributed.queue import Pool

    parser = job.new_parser(__doc__)
    options.add_options(parser)
    job.add_fields(parser, Pool, Pool.model_fields)
    return parser


def main() -> int:
    """Parse the flags, evaluate, print the table."""
    arguments = parser().parse_args()

    from linearsr.distributed.datasets.evaluate import EvaluationConfig, evaluate

    names = ("output", "actors", "actor_cpus", "gpu", "device")
    fields = {name: getattr(arguments, name) for name in names}
    config = job.validated(EvaluationConfig, {**fields, "request": options.parse(arguments)})
    job.connect(data=False)
    return options.print_report(evaluate(config), arguments.output)


if __name__ == "__main__":
    job.run(main)
