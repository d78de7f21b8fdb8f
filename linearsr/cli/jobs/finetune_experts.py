"""Fine-tune four experts from the knee of a pretraining run (ESGF, second to fourth stage).

    linearsr job finetune-experts --submit --from RUNS/pretrain \\
        --recipe tiny_cpu --data PHOTOS --validation VAL --storage RUNS --name experts

Writes one run per expert and stage, RUNS/NAME/experts-*, finetune-* and perceptual-*, and
RUNS/NAME/weights, ready for `linearsr upscale --model`. `--stages experts finetune perceptual`
trains all stages; the last one needs LPIPS and leaves the first expert as it is. Started again, it
continues where it stopped.
Exit codes: 0 all done, 1 failed, 2 usage.

More: docs/guides/training.md, docs/design/knee.md, docs/guides/sizing.md.
"""

from __future__ import annotations

import argparse

from linearsr.cli.jobs import shared

PLACES = (*shared.TRAINING_PLACES, "before")
SENT = ()


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add a training job's flags, and those for the run and the stages to start from."""
    shared.add_training_flags(parser)
    parser.add_argument(
        "--from",
        dest="before",
        metavar="RUN",
        required=True,
        help="folder of the pretraining run to start from; its checkpoint at the knee is used",
    )
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=("experts", "finetune", "perceptual"),
        default=["experts"],
        help="stages to train, in the order given: experts (each expert on its own noise range), "
        "finetune (each expert again, from its own knee), perceptual (all experts but the first, "
        "for sharp results in few steps)",
    )
    parser.add_argument(
        "--i-know-this-is-not-the-knee",
        action="store_true",
        dest="anyway",
        help="if a run has no confirmed knee, start from its candidate knee or, without one, from "
        "its last checkpoint; otherwise, such a run is refused",
    )


def run(options: argparse.Namespace) -> None:
    """Train the stages in order, and export the weights."""
    recipe, cluster = shared.configs(options)
    shared.connect()
    from linearsr.distributed.train.esgf import check_stages, export_outcomes, run_stage
    from linearsr.storage.location import locate, url

    check_stages(options.stages, recipe, cluster.workers, cluster.data)
    before = [locate(options.before)]
    target = locate(cluster.storage) / cluster.name / "weights"
    for kind in options.stages:
        outcomes = run_stage(kind, recipe, cluster, before, anyway=options.anyway)
        export_outcomes(outcomes, recipe, target)
        print(f"wrote {url(target)}")
        before = [outcome.run for outcome in outcomes]
