"""Fine-tune four experts from the knee of a pretraining run (ESGF, second and third stage).

    ray job submit --working-dir . -- python ray_jobs/finetune_experts.py --from RUNS/pretrain \\
        --recipe tiny_cpu --data PHOTOS --validation VAL --storage RUNS --name experts

Writes RUNS/NAME/experts-* and finetune-*, a run each, and RUNS/NAME/weights, ready for
`linearsr upscale --model`. Started again it goes on where it stopped.
"""

from __future__ import annotations

from linearsr.cli import job


def main() -> None:
    """Parse, train the stages in order, export the result."""
    parser = job.parser(__doc__ or "")
    parser.add_argument("--from", dest="before", required=True, help="the pretraining run's folder")
    parser.add_argument("--stages", nargs="+", choices=("experts", "finetune"), default=["experts"])
    parser.add_argument("--i-know-this-is-not-the-knee", action="store_true", dest="anyway")
    options = parser.parse_args()

    job.connect()
    from linearsr.cluster.stages import export_outcomes, run_stage
    from linearsr.cluster.storage import locate

    recipe, cluster = job.configs(options)
    before = [locate(options.before)]
    target = locate(cluster.storage) / cluster.name / "weights"
    for kind in options.stages:
        outcomes = run_stage(kind, recipe, cluster, before, anyway=options.anyway)
        export_outcomes(outcomes, recipe, target)
        print(f"wrote {target.path}: linearsr upscale --model {target.path}")
        before = [outcome.run for outcome in outcomes]


if __name__ == "__main__":
    job.run(main)
