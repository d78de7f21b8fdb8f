"""Pretrain one model on all noise levels and find its knee (ESGF, first stage).

    ray job submit --working-dir . -- python ray_jobs/pretrain.py \\
        --recipe tiny_cpu --data PHOTOS --validation VAL --storage RUNS --name pretrain

Writes RUNS/NAME: checkpoints, knee.json, report.png, samples, tensorboard. Started again with the
same storage and name, it continues from the last checkpoint.
Exit codes: 0 all done, 1 failed, 2 usage.

More: docs/guides/training.md, docs/design/knee.md, docs/guides/sizing.md.
"""

from __future__ import annotations

import argparse

from linearsr.cli import job


def parser() -> argparse.ArgumentParser:
    """Return the parser of a training job's flags."""
    return job.parser(__doc__)


def main() -> None:
    """Parse the flags, train, and print where the knee is."""
    options = parser().parse_args()

    recipe, cluster = job.configs(options)
    job.connect()
    from linearsr.distributed.train.config import StageConfig
    from linearsr.distributed.train.knee import summary
    from linearsr.distributed.train.trainer import train

    stage = StageConfig(recipe=recipe, cluster=cluster, kind="pretrain", start=recipe.start)
    outcome = train(stage)
    print(f"{outcome.run.path}: {summary(outcome.knee)}")


if __name__ == "__main__":
    job.run(main)
