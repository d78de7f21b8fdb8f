"""Pretrain one model on all noise levels and find its knee (ESGF, first stage).

    ray job submit --working-dir . -- python ray_jobs/pretrain.py \\
        --recipe tiny_cpu --data PHOTOS --validation VAL --storage RUNS --name pretrain

Writes RUNS/NAME: checkpoints, knee.json, report.png, samples, tensorboard. Started again with the
same storage and name it goes on from the last checkpoint.
"""

from __future__ import annotations

from linearsr.cli import job


def main() -> None:
    """Parse, train, tell where the knee lies."""
    options = job.parser(__doc__ or "").parse_args()

    job.connect()
    from linearsr.cluster.config import StageConfig
    from linearsr.cluster.knee import summary
    from linearsr.cluster.train import train

    recipe, cluster = job.configs(options)
    stage = StageConfig(recipe=recipe, cluster=cluster, kind="pretrain", start=recipe.start)
    outcome = train(stage)
    print(f"{outcome.run.path}: {summary(outcome.knee)}")


if __name__ == "__main__":
    job.run(main)
