"""Build a shard dataset: Parquet files of degraded pairs, the same bytes on every run.

    scan ─▶ plan ─▶ a task per shard: fetch ▸ crop ▸ degrade ▸ encode (▸ latents) ▸ write whole

A shard's name follows from the plan, so a job that is started again builds only what is missing.
"""

from __future__ import annotations

import csv
import io
import json
import platform
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from itertools import groupby
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from torch import Tensor

from linearsr.distributed.datasets.resume import Errors, Failure, claim, progress
from linearsr.distributed.datasets.shards.config import ShardConfig
from linearsr.distributed.datasets.shards.filters import Box
from linearsr.distributed.datasets.shards.latents import variants, with_digest
from linearsr.distributed.datasets.shards.plan import cut, plan, reject_duplicates
from linearsr.distributed.datasets.shards.scan import (
    UNREADABLE,
    decode,
    digest,
    fetcher,
    list_sources,
    scan,
    use_one_thread,
)
from linearsr.distributed.latents import with_latents
from linearsr.distributed.queue import CRASHED, map_tasks
from linearsr.errors import InputError, one_line
from linearsr.imaging.degradation import PRESETS, degrade
from linearsr.imaging.files import Picture, encode
from linearsr.storage.location import Location, locate
from linearsr.storage.walk import Notes

# Encoded pictures, never tensors: they vary in shape, and HR has scale^2 times the pixels of LR.
# `tags` is null until the row is tagged, and empty if the tagger found nothing. `degradation.seed`
# alone gives LR from HR: degrade(hr, scale, PRESETS[preset], np.random.default_rng(seed)).
SCHEMA: Final = pa.schema(
    [
        ("id", pa.string()),
        ("lr", pa.binary()),
        ("hr", pa.binary()),
        ("lr_width", pa.int32()),
        ("lr_height", pa.int32()),
        ("hr_width", pa.int32()),
        ("hr_height", pa.int32()),
        ("tags", pa.list_(pa.string())),
        ("tag_scores", pa.list_(pa.float32())),
        ("degradation", pa.struct([("preset", pa.string()), ("seed", pa.int64())])),
        ("source", pa.string()),
    ]
)
# Limits of a row group. A reader fetches row groups whole, so they are small.
GROUP_ROWS, GROUP_PIXELS = 32, 1 << 25
# Fields that change nothing in the shards.
_IRRELEVANT: Final[dict[str, Any]] = {
    **dict.fromkeys(("inputs", "output", "cpus", "max_cpus", "gpus"), True),
    "latents": {"latent": {"decoder": True}},
}


@dataclass(frozen=True)
class BuildResult:
    """The manifest of a dataset, and one line for each picture or shard that failed.

    notes: a line for each picture that is used and of whose file a user must know something.
    """

    manifest: dict[str, Any]
    unreadable: list[str]
    failed: list[str]
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = self.manifest["counts"]
        rejected = ", ".join(f"{n} {reason}" for reason, n in counts["rejected"].items())
        return (
            f"{counts['seen']} pictures: {counts['accepted']} used, "
            f"rejected: {rejected or 'none'}; {counts['rows']} rows in {counts['shards']} shards"
        )


def build_shards(config: ShardConfig) -> BuildResult:
    """Build the missing shards on a running Ray cluster, then rejects.csv and manifest.json.

    Errors that can be found in advance are raised before any work starts: InputError, OutputError,
    OptionError or WeightsError. Raises InputError also if no picture passes the filters.
    """
    notes = Notes()
    sources = list_sources(config, notes)
    config = with_digest(config)
    folder = locate(config.output)
    settings = {
        **config.model_dump(mode="json", exclude=_IRRELEVANT),
        "inputs": list(config.roots()),
        "pictures": sha256("\n".join(sources).encode()).hexdigest(),
    }
    claim(folder, settings, new=True, hidden="pictures")
    notes.tell_left_out()
    with progress("scan", len(sources), "pictures") as bar:
        scanned = reject_duplicates(scan(config, sources, bar.update), config.duplicate_distance)
    rejects = scanned.filter(pc.is_valid(scanned["reason"])).select(["source", "reason", "detail"])
    rejected = dict(sorted(Counter(rejects["reason"].to_pylist()).items()))
    text = io.StringIO()
    writer = csv.DictWriter(text, rejects.column_names)
    writer.writeheader()
    writer.writerows(rejects.to_pylist())
    (folder / "rejects.csv").write(text.getvalue().encode())
    # Tagging lists its own errors in the same file where it writes into its input.
    with Errors(folder, keep=lambda row: row["stage"] == "tag") as errors:
        unreadable = [row for row in rejects.to_pylist() if row["reason"] == UNREADABLE]
        for row in unreadable:
            errors.add(row["source"], Failure("scan", row["detail"]))
        for name, reason in notes.failures.items():
            errors.add(name, Failure("list", reason))
        shards = plan(scanned, config)
        if not shards:
            raise InputError(f"{config.output}: no picture passes ({rejected}); see rejects.csv")
        failed = _build_missing(folder, shards, config)
        for name, failure in failed.items():
            errors.add(name, failure)
    manifest = _manifest(config, scanned.num_rows, rejected, shards, failed)
    (folder / "manifest.json").write(f"{json.dumps(manifest, indent=1)}\n".encode())
    return BuildResult(
        manifest,
        [
            *(f"{name}: {reason}" for name, reason in notes.failures.items()),
            *(f"{row['source']}: {row['detail']}" for row in unreadable),
        ],
        [f"{name}: {failure.error}" for name, failure in failed.items()],
        list_notes(scanned),
    )


def list_notes(scanned: pa.Table) -> list[str]:
    """Return a line for each scanned picture that is used and has notes."""
    used = scanned.filter(pc.and_(pc.is_null(scanned["reason"]), pc.is_valid(scanned["detail"])))
    return [f"{row['source']}: {row['detail']}" for row in used.to_pylist()]


def shard_name(number: int) -> str:
    """Return a shard's file name; names sort as numbers do."""
    return f"shard-{number:05d}.parquet"


def _build_missing(
    folder: Location, shards: list[pa.Table], config: ShardConfig
) -> dict[str, Failure]:
    """Build what is missing, twice if it fails; return the failures of shards still missing."""
    existing = {file.name for file in folder.files(Notes())}
    left = [n for n in range(len(shards)) if shard_name(n) not in existing]
    failed: dict[int, Failure] = {}
    rows = [shard.num_rows for shard in shards]
    earlier = sum(rows) - sum(rows[n] for n in left)
    with progress("build", sum(rows), "rows", initial=earlier) as bar:
        for _ in range(2):
            todo, failed = [(n, shards[n].to_pylist()) for n in left], {}
            build = partial(_build, config=config)
            results = map_tasks(todo, build, config.cpus, config.max_cpus, config.gpus)
            for (number, _), error in results:
                if error is None:
                    failed[number] = Failure("build", CRASHED)
                elif error:
                    failed[number] = Failure("build", error)
                else:
                    bar.update(rows[number])
            left = sorted(failed)
    return {shard_name(number): failed[number] for number in left}


def _build(shard: tuple[int, list[dict[str, Any]]], config: ShardConfig) -> str:
    """Write one shard; return what was wrong, or "".

    Raises OutputError or WeightsError: all would fail.
    """
    number, rows = shard
    try:
        data = shard_bytes(rows, config)
    except InputError as error:
        return one_line(error)
    (locate(config.output) / shard_name(number)).write(data)
    return ""


def shard_bytes(rows: list[dict[str, Any]], config: ShardConfig) -> bytes:
    """Return a Parquet file of the planned rows: the same bytes whenever and wherever it is made.

    Raises InputError for a picture that is gone or has changed since it was planned.
    """
    use_one_thread()
    pairs = _pairs(rows, config)
    sink, schema = io.BytesIO(), with_latents(SCHEMA, config.latents)
    # Pictures are compressed already; neither statistics nor dictionaries of them are of use.
    plain: dict[str, Any] = {"use_dictionary": False, "write_statistics": False}
    with pq.ParquetWriter(sink, schema, compression="none", **plain) as writer:
        for first, last in cut([r["width"] * r["height"] for r in rows], GROUP_ROWS, GROUP_PIXELS):
            group = [next(pairs) for _ in range(first, last)]
            writer.write_table(pa.Table.from_pylist(group, schema))
    return sink.getvalue()


def _pairs(rows: list[dict[str, Any]], config: ShardConfig) -> Iterator[dict[str, Any]]:
    """Yield a shard's rows; a picture is fetched and decoded once for all its crops in a shard."""
    fetch = fetcher(config)
    for source, crops in groupby(rows, key=lambda row: row["source"]):
        data = fetch(source)
        pixels, picture = decode(data, source, config)
        for crop in crops:
            if crop["digest"] != digest(data):
                raise InputError(
                    f"{source}: has changed since this job scanned it; choose another --output to "
                    "start again"
                )
            yield _pair(crop, pixels, picture, config)


def _pair(
    row: dict[str, Any], pixels: Tensor, picture: Picture, config: ShardConfig
) -> dict[str, Any]:
    """Return a shard's row from pixels (3, H, W) uint8; the pair gets the picture's profile."""
    # Texts of a whole picture would outweigh the pixels of a crop.
    picture = replace(picture, xmp=None, iptc=None, texts=())
    box = Box(*(row[side] for side in Box._fields))
    hr = box.cut(pixels).float() / 255
    seed = config.seed_of(row["id"])
    rng = np.random.default_rng(seed)
    lr = degrade(hr, config.scale, PRESETS[config.degradation], rng)
    return {
        "id": row["id"],
        # Noise may be coloured where the picture is grey.
        "lr": encode(replace(picture, pixels=lr, grey=False), "png"),
        "hr": encode(replace(picture, pixels=hr), "png"),
        "lr_width": lr.shape[2],
        "lr_height": lr.shape[1],
        "hr_width": hr.shape[2],
        "hr_height": hr.shape[1],
        "degradation": {"preset": config.degradation, "seed": seed},
        "source": row["source"],
        **variants(row["id"], box.cut(pixels), config),
    }


def _manifest(
    config: ShardConfig,
    pictures: int,
    rejected: dict[str, int],
    shards: list[pa.Table],
    failed: dict[str, Failure],
) -> dict[str, Any]:
    rows = {shard_name(n): shard.num_rows for n, shard in enumerate(shards)}
    rows = {name: count for name, count in rows.items() if name not in failed}
    # The versions of all packages that decide the bytes.
    packages = ["linearsr", "torch", "numpy", "pyarrow", "pyvips-binary", "pillow", "imagehash"]
    if config.latents is not None and config.latents.latent.kind == "dc-ae":
        packages.append("diffusers")
    return {
        "settings": config.model_dump(mode="json", exclude=_IRRELEVANT),
        "inputs": config.roots(),
        "counts": {
            "seen": pictures,
            "accepted": pictures - sum(rejected.values()),
            "rejected": rejected,
            "rows": sum(rows.values()),
            "shards": len(rows),
        },
        "shards": rows,
        "failed": {name: failure.error for name, failure in failed.items()},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
    }
