"""Tag a shard dataset: names of what the LR pictures show, in the columns tags and tag_scores.

    ray job submit --working-dir . -- python ray_jobs/tag_dataset.py \\
        --input s3://shards/first --output s3://shards/first --actors 4

OUTPUT may be INPUT: each shard is replaced whole. Started again with the same tagger, it goes on
with the shards that have not been seen. Rows that cannot be read are listed in
OUTPUT/tag_errors.csv. Exit codes: 0 all done, 1 some failed, 2 usage.

More: docs/guides/tags.md, docs/guides/datasets.md, docs/guides/storage.md.
"""

from __future__ import annotations

import argparse
import os

from linearsr.cli import job
from linearsr.cli.tag import add_tagger_options, tagger_config

FLAGS = ("input", "output", "column", "actors", "actor_cpus", "gpu")
FILES = ("tagger_model", "tagger_adapter", "vocabulary")


def parser() -> argparse.ArgumentParser:
    """The options of a tagger, and those of a job."""
    made = job.new_parser(__doc__)
    made.add_argument("--input", required=True, help="a folder of Parquet shards; s3:// too")
    made.add_argument("--output", required=True, help="a folder; s3:// too; may be the input")
    made.add_argument("--column", choices=("lr", "hr"), default="lr", help="the picture looked at")
    made.add_argument("--actors", type=int, default=1, help="taggers at work; fixed")
    made.add_argument("--actor-cpus", type=float, default=1, help="logical CPUs of each")
    made.add_argument("--gpu", action="store_true", help="a GPU for each actor")
    add_tagger_options(made)
    return made


def main(arguments: list[str] | None = None) -> int:
    """Parse, tag, tell how it ended."""
    options = parser().parse_args(arguments)
    for name in FILES:  # workers have working folders of their own; a hub id stays as it is
        path = getattr(options, name)
        if path is not None and os.path.exists(path):
            setattr(options, name, os.path.abspath(path))

    from linearsr.distributed.datasets.tag import TagConfig, tag_dataset

    fields = {name: getattr(options, name) for name in FLAGS}
    config = TagConfig.parse(**fields, tagger=tagger_config(options))
    job.connect()
    tagged = tag_dataset(config)
    print(tagged)
    return 1 if tagged.errors else 0


if __name__ == "__main__":
    job.run(main)
