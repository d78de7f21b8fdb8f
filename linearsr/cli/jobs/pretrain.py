"""Pretrain one model on all noise levels and find its knee (ESGF, first stage).

    linearsr job pretrain \\
        --recipe tiny_cpu --data PHOTOS --validation VAL --storage RUNS --name pretrain

Writes RUNS/NAME: checkpoints, knee.json, report.png, samples, tensorboard. Started again with the
same storage and name, it continues from the last checkpoint.
Exit codes: 0 all done, 1 failed, 2 usage.

More: docs/guides/training.md, docs/design/knee.md, docs/guides/sizing.md.
"""

from __future__ import annotations

import argparse

from linearsr.cli.jobs import shared

PLACES = shared.TRAINING_PLACES
SENT = ()
add_flags = shared.add_training_flags


def run(options: argparse.Namespace) -> None:
    """Train, and print where the knee is."""
    recipe, cluster = shared.configs(options)
    shared.connect()
    from linearsr.distributed.train.config import StageConfig
    from linearsr.distributed.train.knee import summary
    from linearsr.distributed.train.trainer import train

    stage = StageConfig(recipe=recipe, cluster=cluster, kind="pretrain", start=recipe.start)
    outcome = train(stage)
    print(f"{outcome.run.path}: {summary(outcome.knee)}")
