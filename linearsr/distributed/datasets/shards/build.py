"""Folders of pictures -> a shard dataset: Parquet files of degraded pairs, the same on every run.

    plan ─▶ a task per shard: fetch ▸ crop ▸ degrade ▸ encode ▸ write whole

The output is the job's checkpoint: a shard appears complete, under a name that the plan decides, so
what is there is done, and a killed job goes on when it is started again.
"""

from __future__ import annotations

import csv
import io
import json
import platform
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
from tqdm import tqdm

from linearsr.distributed.datasets.shards.filters import Box
from linearsr.distributed.datasets.shards.plan import (
    UNREADABLE,
    ShardConfig,
    cut,
    decode,
    digest,
    fetcher,
    list_sources,
    one_thread,
    plan,
    reject_duplicates,
    survey,
)
from linearsr.distributed.tasks import each
from linearsr.errors import InputError, OptionError, one_line
from linearsr.imaging.degradation import PRESETS, degrade
from linearsr.imaging.files import Picture, encode
from linearsr.storage.location import Location, check_writable, locate

# Encoded pictures, never tensors: they vary in shape, and HR has scale^2 times the pixels of LR.
# `tags` is null until a tagger has looked; (), when it found none. `degradation.seed` alone gives
# LR from HR: degrade(hr, scale, PRESETS[preset], np.random.default_rng(seed)).
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
# A reader fetches row groups whole, so they are small: so many rows, or HR pixels.
GROUP_ROWS, GROUP_PIXELS = 32, 1 << 25
# What changes nothing in the shards.
_OUTSIDE: Final = {"inputs", "output", "cpus", "most_cpus"}
_LOST: Final = "its worker died, repeatedly"


@dataclass(frozen=True)
class Built:
    """What became of a dataset: the manifest, the faulty pictures, and the shards that lack."""

    manifest: dict[str, Any]
    unreadable: list[str]
    failed: list[str]

    def __str__(self) -> str:
        counts = self.manifest["counts"]
        rejected = ", ".join(f"{n} {reason}" for reason, n in counts["rejected"].items())
        return (
            f"{counts['seen']} pictures: {counts['accepted']} used, "
            f"rejected: {rejected or 'none'}; {counts['rows']} rows in {counts['shards']} shards"
        )


def build_shards(config: ShardConfig) -> Built:
    """Build the shards that are not there yet, on a running Ray; then rejects.csv, manifest.json.

    Raises InputError, OutputError or OptionError before any work for what can be known by then;
    InputError when no picture passes.
    """
    sources = list_sources(config)
    folder = locate(config.output)
    _claim(folder, config, sources)
    with _bar("looking", len(sources), "picture") as bar:
        looks = reject_duplicates(survey(config, sources, bar.update), config.duplicate_distance)
    _write_rejects(folder, looks)
    shards = plan(looks, config)
    if not shards:
        raise InputError(
            f"{config.output}: no picture passes ({_rejected(looks)}); see rejects.csv"
        )
    failed = _build_missing(folder, shards, config)
    manifest = _manifest(config, looks, shards, failed)
    (folder / "manifest.json").write(_json(manifest))
    unreadable = [row for row in _rejects(looks) if row["reason"] == UNREADABLE]
    named = [f"{row['source']}: {row['detail']}" for row in unreadable]
    return Built(manifest, named, [f"{shard_name(n)}: {error}" for n, error in failed.items()])


def shard_name(number: int) -> str:
    """A shard's file; names sort as numbers do."""
    return f"shard-{number:05d}.parquet"


def _bar(told: str, total: int, unit: str) -> Any:
    return tqdm(desc=told, total=total, unit=f" {unit}s", mininterval=1)


def _claim(folder: Location, config: ShardConfig, sources: list[str]) -> None:
    """Write down what the folder is to hold, or check that it is the same."""
    fingerprint = {
        **config.model_dump(mode="json", exclude=_OUTSIDE),
        "inputs": list(config.roots()),
        "pictures": sha256("\n".join(sources).encode()).hexdigest(),
    }
    note = folder / "plan.json"
    check_writable(folder)
    if note.exists():
        _check_same(folder, json.loads(note.read()), fingerprint)
        return
    if folder.files():
        raise OptionError(f"{folder.path}: not empty, and not of this job; give another --output")
    note.write(_json(fingerprint))


def _check_same(folder: Location, before: dict[str, Any], now: dict[str, Any]) -> None:
    other = [
        name if name == "pictures" else f"{name} ({before.get(name)}, now {now[name]})"
        for name in now
        if before.get(name) != now[name]
    ]
    if other:
        raise OptionError(
            f"{folder.path}: holds shards of other {', '.join(other)}; give another --output, or "
            "delete that one"
        )


def _json(value: object) -> bytes:
    return f"{json.dumps(value, indent=1)}\n".encode()


# Shards


def _build_missing(folder: Location, shards: list[pa.Table], config: ShardConfig) -> dict[int, str]:
    """Build what is not there, twice where it fails; which shards lack after that, and why."""
    there = {file.name for file in folder.files()}
    errors = {n: _LOST for n in range(len(shards)) if shard_name(n) not in there}
    with _bar("building", sum(shard.num_rows for shard in shards), "row") as bar:
        bar.update(sum(s.num_rows for n, s in enumerate(shards) if n not in errors))
        for _ in range(2):
            missing = [(n, shards[n].to_pylist()) for n in errors]
            for number, error in each(
                missing, partial(_build, config=config), config.cpus, config.most_cpus
            ):
                if error is not None:
                    errors[number] = error
                    continue
                del errors[number]
                bar.update(shards[number].num_rows)
    return errors


def _build(shard: tuple[int, list[dict[str, Any]]], config: ShardConfig) -> tuple[int, str | None]:
    """One shard, written whole, or why it could not be. Raises OutputError: all would fail."""
    number, rows = shard
    try:
        data = shard_bytes(rows, config)
    except InputError as error:
        return number, one_line(error)
    (locate(config.output) / shard_name(number)).write(data)
    return number, None


def shard_bytes(rows: list[dict[str, Any]], config: ShardConfig) -> bytes:
    """A Parquet file of the planned rows: the same bytes whenever and wherever it is made.

    Raises InputError for a picture that is gone or is not what it was.
    """
    one_thread()
    pairs = _pairs(rows, config)
    sink = io.BytesIO()
    # Pictures are compressed already; neither statistics nor dictionaries of them are of use.
    plain: dict[str, Any] = {"use_dictionary": False, "write_statistics": False}
    with pq.ParquetWriter(sink, SCHEMA, compression="none", **plain) as writer:
        for first, last in cut([r["width"] * r["height"] for r in rows], GROUP_ROWS, GROUP_PIXELS):
            group = [next(pairs) for _ in range(first, last)]
            writer.write_table(pa.Table.from_pylist(group, SCHEMA))
    return sink.getvalue()


def _pairs(rows: list[dict[str, Any]], config: ShardConfig) -> Iterator[dict[str, Any]]:
    """Rows of SCHEMA; a picture is fetched and decoded once for all its crops in the shard."""
    fetch = fetcher(config)
    for source, crops in groupby(rows, key=lambda row: row["source"]):
        data = fetch(source)
        pixels, picture = decode(data, source, config)
        for crop in crops:
            if crop["digest"] != digest(data):
                raise InputError(f"{source}: not the picture that was planned; give a new --output")
            yield _pair(crop, pixels, picture, config)


def _pair(
    row: dict[str, Any], pixels: Tensor, picture: Picture, config: ShardConfig
) -> dict[str, Any]:
    """One row of SCHEMA, of (3, H, W) uint8 and the Picture whose profile its pair gets."""
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
    }


# What is told


def _rejects(looks: pa.Table) -> list[dict[str, str]]:
    rejected = looks.filter(pc.is_valid(looks["reason"]))
    return rejected.select(["source", "reason", "detail"]).to_pylist()


def _write_rejects(folder: Location, looks: pa.Table) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["source", "reason", "detail"])
    writer.writeheader()
    writer.writerows(_rejects(looks))
    (folder / "rejects.csv").write(text.getvalue().encode())


def _rejected(looks: pa.Table) -> dict[str, int]:
    """How many pictures were rejected for each reason."""
    return dict(sorted(Counter(looks["reason"].drop_null().to_pylist()).items()))


def _manifest(
    config: ShardConfig, looks: pa.Table, shards: list[pa.Table], failed: dict[int, str]
) -> dict[str, Any]:
    rejected = _rejected(looks)
    rows = {shard_name(n): s.num_rows for n, s in enumerate(shards) if n not in failed}
    return {
        "settings": config.model_dump(mode="json", exclude=_OUTSIDE),
        "inputs": config.roots(),
        "counts": {
            "seen": looks.num_rows,
            "accepted": looks.num_rows - sum(rejected.values()),
            "rejected": rejected,
            "rows": sum(rows.values()),
            "shards": len(rows),
        },
        "shards": rows,
        "failed": {shard_name(n): error for n, error in failed.items()},
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _versions() -> dict[str, str]:
    """Of what decides the bytes."""
    packages = ("linearsr", "torch", "numpy", "pyarrow", "pyvips-binary", "pillow", "imagehash")
    return {name: version(name) for name in packages}
