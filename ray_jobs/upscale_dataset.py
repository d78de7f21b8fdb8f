"""Upscale a dataset: a folder or bucket of pictures, or Parquet shards.

    ray job submit --working-dir . -- python ray_jobs/upscale_dataset.py \\
        --input s3://photos/holiday --output s3://photos/large --steps 4 --actors 4 --gpu

Every option of `linearsr upscale` works here. A job that is started again goes on with the pictures
that have no result; those that fail are listed in OUTPUT/errors. Exit codes: 0 all done, 1 some
failed, 2 wrong usage.

More: docs/guides/datasets.md, docs/guides/storage.md, docs/guides/sizing.md.
"""

from __future__ import annotations

import argparse

from linearsr.cli import job, upscale

FLAGS = ("input", "output", "kind", "column", "actors", "actor_cpus", "gpu", "batch", "concurrency")


def parser() -> argparse.ArgumentParser:
    """Return a parser with the fields of an UpscaleConfig and the options of one picture."""
    from linearsr.distributed.datasets.upscale import UpscaleConfig

    parser = job.new_parser(__doc__)
    job.add_fields(parser, UpscaleConfig, FLAGS)
    upscale.add_options(parser)
    return parser


def main() -> int:
    """Parse the flags, upscale the dataset, print how it ended."""
    arguments = parser().parse_args()

    from linearsr.distributed.datasets.upscale import UpscaleConfig, upscale_dataset

    options, files = upscale.parse(arguments)
    names = (*FLAGS, "model", "device", "compile")
    fields = {name: getattr(arguments, name) for name in names}
    config = job.validated(UpscaleConfig, {**fields, "options": options, "files": files})
    job.connect(data=False)
    summary = upscale_dataset(config)
    print(summary)
    return 1 if summary.failed else 0


if __name__ == "__main__":
    job.run(main)
