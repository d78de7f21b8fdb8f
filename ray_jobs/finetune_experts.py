"""Fine-tune four experts from the knee of a pretraining run (ESGF, second to fourth stage).

    ray job submit --working-dir . -- python ray_jobs/finetune_experts.py --from RUNS/pretrain \\
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

from linearsr.cli import job


def parser() -> argparse.ArgumentParser:
    """Return the parser of a training job's flags, with the run and the stages to start from."""
    parser = job.parser(__doc__)
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
        "finetune (each again, from its knee), perceptual (all but the first, for sharp results "
        "in few steps)",
    )
    parser.add_argument(
        "--i-know-this-is-not-the-knee",
        action="store_true",
        dest="anyway",
        help="if a run has no confirmed knee, start from its candidate knee or, without one, from "
        "its last checkpoint; otherwise, such a run is refused",
    )
    return parser


def main() -> None:
    """Parse the flags, train the stages in order, and export the weights."""
    options = parser().parse_args()

    recipe, cluster = job.configs(options)
    job.connect()
    from linearsr.distributed.train.esgf import check_stages, export_outcomes, run_stage
    from linearsr.storage.location import locate, url

    check_stages(options.stages, recipe)
    before = [locate(options.before)]
    target = locate(cluster.storage) / cluster.name / "weights"
    for kind in options.stages:
        outcomes = run_stage(kind, recipe, cluster, before, anyway=options.anyway)
        export_outcomes(outcomes, recipe, target)
        print(f"wrote {url(target)}")
        before = [outcome.run for outcome in outcomes]


if __name__ == "__main__":
    job.run(main)
