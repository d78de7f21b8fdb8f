"""Upscale a dataset: a folder or bucket of pictures, or Parquet shards.

    ray job submit --working-dir . -- python ray_jobs/upscale_dataset.py \\
        --input s3://photos/holiday --output s3://photos/large --steps 4 --actors 4 --gpu

Every option of `linearsr upscale` works here. Started again, it goes on with what has no result;
pictures that fail are listed in OUTPUT/errors. Exit codes: 0 all done, 1 some failed, 2 usage.

More: docs/guides/datasets.md, docs/guides/storage.md, docs/guides/sizing.md.
"""

from __future__ import annotations

import argparse

from linearsr.cli import job, upscale

FLAGS = ("input", "output", "kind", "column", "model", "device", "compile")
FLAGS += ("actors", "actor_cpus", "gpu", "batch", "hands")


def parser() -> argparse.ArgumentParser:
    """The options of one picture, and those of a job."""
    made = job.new_parser(__doc__)
    made.add_argument("--input", required=True, help="pictures or Parquet shards; s3:// too")
    made.add_argument("--output", required=True, help="a folder of its own; s3:// too")
    made.add_argument(
        "--kind", choices=("images", "parquet"), default="images", help="what is written"
    )
    made.add_argument("--column", default="lr", help="the column of shards to upscale")
    made.add_argument("--actors", type=int, default=1, help="models at work; fixed")
    made.add_argument("--actor-cpus", type=float, default=1, help="logical CPUs of each")
    made.add_argument("--gpu", action="store_true", help="a GPU for each actor")
    made.add_argument("--batch", type=int, default=8, help="pictures a call, rows a Parquet file")
    made.add_argument("--hands", type=int, default=2, help="calls an actor overlaps; GPUs like 8")
    upscale.add_options(made)
    return made


def main() -> int:
    """Parse, upscale, tell how it ended."""
    arguments = parser().parse_args()

    from linearsr.distributed.datasets.upscale import UpscaleConfig, upscale_dataset

    options, files = upscale.parse(arguments)
    fields = {name: getattr(arguments, name) for name in FLAGS}
    config = UpscaleConfig.parse(**fields, options=options, files=files)
    job.connect()
    summary = upscale_dataset(config)
    print(summary)
    return 1 if summary.failed else 0


if __name__ == "__main__":
    job.run(main)
