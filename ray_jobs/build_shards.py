"""Build a shard dataset: folders or buckets of pictures in, Parquet files of LR/HR pairs out.

    ray job submit --working-dir . -- python ray_jobs/build_shards.py \\
        --input s3://photos/nature s3://photos/cities --output s3://shards/first --crop 512

The same settings and pictures give the same bytes. A job that is started again builds only the
missing shards. OUTPUT/rejects.csv names each picture that was not used and why, OUTPUT/errors the
pictures that cannot be read and the shards that failed, OUTPUT/manifest.json all counts.
Exit codes: 0 all done, 1 some pictures or shards failed, 2 wrong usage.

More: docs/guides/datasets.md, docs/guides/storage.md.
"""

from __future__ import annotations

import argparse
import sys

from linearsr.cli import job

FLAGS = ("output", "degradation", "scale", "crop", "crops_per_picture", "min_size", "min_sharpness")
FLAGS += ("duplicate_distance", "max_pixels", "seed", "rows_per_shard", "cpus", "max_cpus")


def parser() -> argparse.ArgumentParser:
    """Return a parser with the fields of a ShardConfig."""
    from linearsr.distributed.datasets.shards.config import ShardConfig

    parser = job.new_parser(__doc__)
    parser.add_argument(
        "--input", nargs="+", required=True, help="folders of pictures, local or s3://"
    )
    job.add_fields(parser, ShardConfig, FLAGS)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Parse the flags, build the dataset, print how it ended."""
    from linearsr.distributed.datasets.shards.build import build_shards
    from linearsr.distributed.datasets.shards.config import ShardConfig

    options = vars(parser().parse_args(arguments))
    config = job.validated(ShardConfig, {"inputs": options.pop("input"), **options})
    job.connect(data=False)
    result = build_shards(config)
    for note in result.notes:
        print(note, file=sys.stderr)
    for failure in (*result.unreadable, *result.failed):
        print(f"failed: {failure}", file=sys.stderr)
    print(result)
    return 1 if result.unreadable or result.failed else 0


if __name__ == "__main__":
    job.run(main)
