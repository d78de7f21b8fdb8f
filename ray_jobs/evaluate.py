"""Evaluate models and results of others: folders or buckets of pictures, or Parquet shards.

    ray job submit --working-dir . -- python ray_jobs/evaluate.py \\
        --hr s3://data/DIV2K --models linearsr-tiny mine=s3://runs/experts/weights \\
        --output s3://reports/div2k --actors 4 --gpu

Every option of `linearsr evaluate` works here, and gives the same numbers. Started again, it goes
on with the pictures that are left or failed. Exit codes: 0 all done, 1 some failed, 2 usage.

More: docs/guides/evaluation.md, docs/guides/storage.md.
"""

from __future__ import annotations

import argparse

from linearsr.cli import evaluate as options
from linearsr.cli import job


def parser() -> argparse.ArgumentParser:
    """The options of an evaluation, and those of a job."""
    made = job.new_parser(__doc__)
    options.add_options(made)
    made.add_argument("--actors", type=int, default=1, help="models at work; fixed")
    made.add_argument("--actor-cpus", type=float, default=1, help="logical CPUs of each")
    made.add_argument("--gpu", action="store_true", help="a GPU for each actor's models")
    return made


def main() -> int:
    """Parse, evaluate, print the table."""
    arguments = parser().parse_args()

    from linearsr.distributed.datasets.evaluate import EvaluationConfig, evaluate

    fields = {
        name: getattr(arguments, name)
        for name in ("output", "actors", "actor_cpus", "gpu", "device")
    }
    config = EvaluationConfig.parse(request=options.parse(arguments), **fields)
    job.connect()
    return options.tell(evaluate(config), arguments.output)


if __name__ == "__main__":
    job.run(main)
