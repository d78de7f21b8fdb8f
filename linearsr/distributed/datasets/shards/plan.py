"""Plan a shard dataset: from a scan of its pictures to the list of rows in each shard.

A plan is a function of the scan and the settings alone, whatever the cluster.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from linearsr.distributed.datasets.shards.config import ShardConfig
from linearsr.distributed.datasets.shards.filters import near_duplicates
from linearsr.distributed.datasets.shards.scan import BOX

# Maximum number of HR pixels in a shard, which is built in memory.
SHARD_PIXELS: Final = 1 << 28


def reject_duplicates(scanned: pa.Table, distance: int) -> pa.Table:
    """Return the scanned pictures, with a reason at each that resembles an earlier kept one."""
    numbers = np.flatnonzero(pc.is_null(scanned["reason"]).to_numpy())
    first = near_duplicates(scanned["hash"].take(numbers).to_pylist(), distance)
    reasons, details = scanned["reason"].to_pylist(), scanned["detail"].to_pylist()
    sources = scanned["source"]
    for number, other in zip(numbers, first, strict=True):
        if other is not None:
            reasons[number] = "near-duplicate"
            details[number] = f"of {sources[int(numbers[other])]}"
    for name, values in (("reason", reasons), ("detail", details)):
        column = scanned.column_names.index(name)
        scanned = scanned.set_column(column, name, pa.array(values, pa.string()))
    return scanned


def plan(scanned: pa.Table, config: ShardConfig) -> list[pa.Table]:
    """Return a table per shard with columns id, source, digest, left, top, width, height.

    Pictures are shuffled over shards, so that a shard is a sample of all; the crops of a picture
    stay together, so that it is decoded once.
    """
    used = scanned.filter(pc.is_null(scanned["reason"]))
    order = np.random.default_rng(config.seed).permutation(used.num_rows)
    used = used.take(order).combine_chunks()
    # From a row per picture to a row per box.
    nested = used["boxes"].combine_chunks()
    parents, flat = pc.list_parent_indices(nested), pc.list_flatten(nested)
    counts = pc.list_value_length(nested).to_numpy(zero_copy_only=False)
    nth = np.arange(len(flat)) - np.repeat(np.cumsum(counts) - counts, counts)
    sources = used["source"].take(parents)
    ids = pc.binary_join_element_wise(sources, pa.array(nth).cast(pa.string()), "#")
    named = {"id": ids, "source": sources, "digest": used["digest"].take(parents)}
    rows = pa.table({**named, **{field.name: flat.field(field.name) for field in BOX}})
    pixels = (rows["width"].to_numpy().astype(np.int64) * rows["height"].to_numpy()).tolist()
    # Taken, not sliced: a slice would carry the whole table to its worker.
    return [
        rows.take(np.arange(*ends)) for ends in cut(pixels, config.rows_per_shard, SHARD_PIXELS)
    ]


def cut(pixels: list[int], max_rows: int, max_pixels: int) -> Iterator[tuple[int, int]]:
    """Yield the first row of each row group, and the row after its last.

    A group has at most `max_rows` rows and, unless it is a single row, at most `max_pixels` pixels.
    """
    start, total = 0, 0
    for i, size in enumerate(pixels):
        if i > start and (i - start == max_rows or total + size > max_pixels):
            yield start, i
            start, total = i, 0
        total += size
    if pixels:
        yield start, len(pixels)
