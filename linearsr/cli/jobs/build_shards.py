"""Build a shard dataset: folders or buckets of pictures in, Parquet files of LR/HR pairs out.

    linearsr job build-shards --submit \\
        --input s3://photos/nature s3://photos/cities --output s3://shards/first --crop 512

With --latents RECIPE the shards also hold the pairs that this recipe trains on, degraded and
encoded in advance.

The same settings and pictures give the same bytes. A job that is started again builds only the
missing shards. OUTPUT/rejects.csv names each picture that was not used and why, OUTPUT/errors the
pictures that cannot be read and the shards that failed, OUTPUT/manifest.json all counts.
Exit codes: 0 all done, 1 some pictures or shards failed, 2 wrong usage.

More: docs/guides/datasets.md, docs/guides/storage.md.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from linearsr.cli.flags import add_fields
from linearsr.cli.jobs import shared
from linearsr.errors import OptionError

if TYPE_CHECKING:
    from linearsr.training.latents import LatentsConfig

FLAGS = (
    *("output", "degradation", "scale", "crop", "crops_per_picture", "min_size", "min_sharpness"),
    *("duplicate_distance", "max_pixels", "seed", "rows_per_shard", "cpus", "max_cpus", "gpus"),
)
# Flags of the latents.
LATENTS = ("variants", "precision")
PLACES = ("input", "output")
SENT = ()


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the fields of a ShardConfig and of its latents."""
    from linearsr.distributed.datasets.shards.config import ShardConfig
    from linearsr.training.latents import LatentsConfig
    from linearsr.training.recipes import RECIPES

    parser.add_argument(
        "--input", nargs="+", required=True, help="folders of pictures, local or s3://"
    )
    add_fields(parser, ShardConfig, FLAGS)
    parser.add_argument(
        "--latents",
        choices=RECIPES,
        metavar="RECIPE",
        help="recipe whose training pairs are stored with their latents, so that training with it "
        "neither degrades nor encodes pictures (docs/guides/datasets.md)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change a field of that recipe, as in data.patch=512 or model.latent.source=FOLDER; "
        "give training the same",
    )
    add_fields(parser, LatentsConfig, LATENTS)


def run(options: argparse.Namespace) -> int:
    """Build the dataset, and print how it ended."""
    from linearsr.distributed.datasets.shards.build import build_shards
    from linearsr.distributed.datasets.shards.config import ShardConfig

    fields = {name: getattr(options, name) for name in FLAGS}
    fields |= {"inputs": options.input, "latents": _latents(options)}
    config = shared.validated(ShardConfig, fields)
    shared.connect(data=False)
    result = build_shards(config)
    for note in result.notes:
        print(note, file=sys.stderr)
    for failure in (*result.unreadable, *result.failed):
        print(f"failed: {failure}", file=sys.stderr)
    print(result)
    return 1 if result.unreadable or result.failed else 0


def _latents(options: argparse.Namespace) -> LatentsConfig | None:
    from linearsr.training.latents import LatentsConfig
    from linearsr.training.recipes import RECIPES, override

    if options.latents is None:
        if options.set:
            raise OptionError("--set changes a field of the recipe of --latents; give it as well")
        return None
    recipe = override(RECIPES[options.latents](), options.set)
    changes = {name: getattr(options, name) for name in LATENTS}
    return LatentsConfig.of(recipe.model, recipe.data, **changes)
