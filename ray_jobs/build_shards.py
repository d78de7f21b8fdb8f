"""Build a shard dataset: folders or buckets of pictures in, Parquet files of LR/HR pairs out.

    ray job submit --working-dir . -- python ray_jobs/build_shards.py \\
        --input s3://photos/nature s3://photos/cities --output s3://shards/first --crop 512

The same settings and pictures give the same bytes. Started again, it goes on with what is missing.
OUTPUT/rejects.csv names each picture that was not used and why, OUTPUT/manifest.json the counts.
Exit codes: 0 all done, 1 some pictures could not be read or shards not be built, 2 usage.

More: docs/guides/datasets.md, docs/guides/storage.md.
"""

from __future__ import annotations

import argparse
import sys

from linearsr.cli import job

FLAGS = ("degradation", "scale", "crop", "crops_per_picture", "min_size", "min_sharpness")
FLAGS += ("duplicate_distance", "max_pixels", "seed", "rows_per_shard", "cpus", "most_cpus")


def parser() -> argparse.ArgumentParser:
    """Where pictures come from and go to, and what a ShardConfig has besides."""
    from linearsr.distributed.datasets.shards.plan import ShardConfig

    made = job.new_parser(__doc__)
    made.add_argument("--input", nargs="+", required=True, help="folders of pictures; s3:// too")
    made.add_argument("--output", required=True, help="a folder of its own; s3:// too")
    job.add_fields(made, ShardConfig, FLAGS)
    return made


def main(arguments: list[str] | None = None) -> int:
    """Parse, build, tell how it ended."""
    from linearsr.distributed.datasets.shards.build import build_shards
    from linearsr.distributed.datasets.shards.plan import ShardConfig

    options = vars(parser().parse_args(arguments))
    config = ShardConfig.parse(inputs=options.pop("input"), **options)
    job.connect()
    built = build_shards(config)
    for fault in (*built.unreadable, *built.failed):
        print(f"failed: {fault}", file=sys.stderr)
    print(built)
    return 1 if built.unreadable or built.failed else 0


if __name__ == "__main__":
    job.run(main)
