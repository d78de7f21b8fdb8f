"""Upscale a dataset: a folder or bucket of pictures, or Parquet shards.

    linearsr job upscale-dataset --submit \\
        --input s3://photos/holiday --output s3://photos/large --steps 4 --actors 4 --gpu

Every option of `linearsr upscale` works here. A job that is started again goes on with the pictures
that have no result; those that fail are listed in OUTPUT/errors. Exit codes: 0 all done, 1 some
failed, 2 wrong usage.

More: docs/guides/datasets.md, docs/guides/storage.md, docs/guides/sizing.md.
"""

from __future__ import annotations

import argparse

from linearsr.cli import upscale
from linearsr.cli.flags import add_fields, read_fields
from linearsr.cli.jobs import shared
from linearsr.cli.tag import TAGGER_FILES, absolute_paths
from linearsr.config import Acceleration

FLAGS = ("input", "output", "kind", "column", "actors", "actor_cpus", "gpu", "batch", "concurrency")
PLACES = ("input", "output")
SENT = ("model", *TAGGER_FILES)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the fields of an UpscaleConfig and the options of one picture."""
    from linearsr.distributed.datasets.upscale import UpscaleConfig

    add_fields(parser, UpscaleConfig, FLAGS)
    upscale.add_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Upscale the dataset, and print how it ended."""
    from linearsr.distributed.datasets.upscale import UpscaleConfig, upscale_dataset

    absolute_paths(arguments)
    options, files = upscale.parse(arguments)
    fields = {name: getattr(arguments, name) for name in (*FLAGS, "model", "device")}
    fields["acceleration"] = read_fields(arguments, Acceleration)
    fields |= {"options": options, "files": files, "tagger": upscale.tagger(arguments)}
    config = shared.validated(UpscaleConfig, fields)
    shared.connect(data=False)
    summary = upscale_dataset(config)
    print(summary)
    return 1 if summary.failed else 0
