"""Tag a shard dataset: names of what the LR pictures show, in the columns tags and tag_scores.

    linearsr job tag-dataset --submit \\
        --input s3://shards/first --output s3://shards/first --actors 4

OUTPUT may be INPUT: each shard is replaced whole. A job that is started again with the same tagger
goes on with the shards that it has not seen. Rows that cannot be read are listed in OUTPUT/errors.
Exit codes: 0 all done, 1 some failed, 2 wrong usage.

More: docs/guides/tags.md, docs/guides/datasets.md, docs/guides/storage.md.
"""

from __future__ import annotations

import argparse

from linearsr.cli.flags import add_fields
from linearsr.cli.jobs import shared
from linearsr.cli.tag import TAGGER_FILES, absolute_paths, add_tagger_options, tagger_config

FLAGS = ("input", "output", "column", "actors", "actor_cpus", "gpu")
PLACES = ("input", "output")
SENT = TAGGER_FILES


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the fields of a TagConfig and of its tagger."""
    from linearsr.distributed.datasets.tag import TagConfig

    add_fields(parser, TagConfig, FLAGS)
    add_tagger_options(parser)


def run(options: argparse.Namespace) -> int:
    """Tag the dataset, and print how it ended."""
    absolute_paths(options)
    from linearsr.distributed.datasets.tag import TagConfig, tag_dataset

    fields = {name: getattr(options, name) for name in FLAGS}
    config = shared.validated(TagConfig, {**fields, "tagger": tagger_config(options)})
    shared.connect(data=False)
    summary = tag_dataset(config)
    print(summary)
    return 1 if summary.failed else 0
