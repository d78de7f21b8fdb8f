"""Build a shard dataset: folders or buckets of pictures in, Parquet files of LR/HR pairs out.

    ray job submit --working-dir . -- python ray_jobs/build_shards.py \\
        --input s3://photos/nature s3://photos/cities --output s3://shards/first --crop 512

The same settings and pictures give the same bytes. Started again, it goes on with what is missing.
OUTPUT/rejects.csv names each picture that was not used and why, OUTPUT/manifest.json the counts.
Exit codes: 0 all done, 1 some pictures could not be read or shards not be built, 2 usage.
"""

from __future__ import annotations

import argparse
import sys

from linearsr.cli import job

# Fields of a ShardConfig that are flags with a default.
FLAGS: dict[str, str] = {
    "degradation": "seesr, real-esrgan, clean, mild or camera",
    "scale": "how many times smaller LR is",
    "crop": "side of square HR crops, 0 for whole pictures",
    "crops-per-picture": "at most",
    "min-size": "shorter side a picture must have, if more than the crop's",
    "min-sharpness": "that a crop must have, 0 for any",
    "duplicate-distance": "near-duplicates' hashes differ by so many bits of 64; -1 keeps them",
    "max-pixels": "larger pictures are refused",
    "seed": "of crops, order and degradations",
    "rows-per-shard": "at most",
    "cpus": "logical CPUs of each task",
}


def main(arguments: list[str] | None = None) -> int:
    """Parse, build, tell how it ended."""
    from linearsr.cluster.shards import ShardConfig, build_shards

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", nargs="+", required=True, help="folders of pictures; s3:// too")
    parser.add_argument("--output", required=True, help="a folder of its own; s3:// too")
    for flag, told in FLAGS.items():
        default = ShardConfig.model_fields[flag.replace("-", "_")].default
        parser.add_argument(f"--{flag}", help=f"{told}; default {default}", default=default)
    options = vars(parser.parse_args(arguments))

    job.connect()
    built = build_shards(ShardConfig.parse(inputs=options.pop("input"), **options))
    for fault in (*built.unreadable, *built.failed):
        print(f"failed: {fault}", file=sys.stderr)
    print(built)
    return 1 if built.unreadable or built.failed else 0


if __name__ == "__main__":
    job.run(main)
