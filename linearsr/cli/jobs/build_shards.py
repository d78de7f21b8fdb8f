"""Build a shard dataset: folders or buckets of pictures in, Parquet files of LR/HR pairs out.

    linearsr job build-shards --submit \\
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

from linearsr.cli.flags import add_fields
from linearsr.cli.jobs import shared

FLAGS = (
    *("output", "degradation", "scale", "crop", "crops_per_picture", "min_size", "min_sharpness"),
    *("duplicate_distance", "max_pixels", "seed", "rows_per_shard", "cpus", "max_cpus"),
)
PLACES = ("input", "output")
SENT = ()


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the fields of a ShardConfig."""
    from linearsr.distributed.datasets.shards.config import ShardConfig

    parser.add_argument(
        "--input", nargs="+", required=True, help="folders of pictures, local or s3://"
    )
    add_fields(parser, ShardConfig, FLAGS)


def run(options: argparse.Namespace) -> int:
    """Build the dataset, and print how it ended."""
    from linearsr.distributed.datasets.shards.build import build_shards
    from linearsr.distributed.datasets.shards.config import ShardConfig

    fields = {name: getattr(options, name) for name in FLAGS}
    config = shared.validated(ShardConfig, {"inputs": options.input, **fields})
    shared.connect(data=False)
    result = build_shards(config)
    for note in result.notes:
        print(note, file=sys.stderr)
    for failure in (*result.unreadable, *result.failed):
        print(f"failed: {failure}", file=sys.stderr)
    print(result)
    return 1 if result.unreadable or result.failed else 0
