"""What a job reads: a folder of pictures, or of Parquet shards, as one table of names.

Only names go through Ray; whoever works on a picture fetches its bytes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from linearsr.cluster.storage import Location, explained
from linearsr.errors import InputError, one_line
from linearsr.imaging.files import READ_SUFFIXES

# Row groups of encoded pictures that one process keeps.
GROUPS_KEPT = 2
# file: path below the folder; group and row: the place inside a shard, -1 for a picture file.
INPUTS = pa.schema({"id": pa.string(), "file": pa.string(), "group": pa.int32(), "row": pa.int32()})


def list_inputs(folder: Location, column: str, without: Location | None = None) -> pa.Table:
    """Every picture below `folder`, sorted by file: `INPUTS`, each id once.

    Shards, where there are any, count instead of picture files: `column` holds their encoded
    pictures. An id is a shard's `id`, or a file's path below the folder. What lies below `without`
    (results of an earlier job) is left out. Raises InputError when there is nothing, or for a shard
    that lacks a column or repeats an id.
    """
    inside = f"{without.path}/" if without else None
    files = [f for f in folder.files() if inside is None or not f.path.startswith(inside)]
    shards = [f for f in files if f.name.endswith(".parquet")]
    names = [_below(folder, f) for f in files if _suffix(f.name) in READ_SUFFIXES]
    if shards:
        return _unique(pa.concat_tables(_rows(folder, shard, column) for shard in shards), folder)
    if not names:
        raise InputError(f"{folder.path}: no pictures and no .parquet shards here")
    none = pa.array([-1] * len(names), pa.int32())
    return pa.table([names, names, none, none], schema=INPUTS)


def read_input(folder: Location, row: dict[str, Any], column: str) -> bytes:
    """The encoded picture of one row of `list_inputs`. Raises InputError."""
    file = folder / row["file"]
    if row["group"] < 0:
        return file.read()
    data = _group(file, row["group"], column)[row["row"]].as_py()
    if data is None:
        raise InputError(f"{row['id']}: its {column!r} is empty")
    return bytes(data)


def _below(folder: Location, file: Location) -> str:
    return file.path.removeprefix(folder.path).lstrip("/")


def _suffix(name: str) -> str:
    return f".{name.rsplit('.', 1)[-1].lower()}"


def open_shard(file: Location, *columns: str) -> Any:
    """A `pyarrow.parquet.ParquetFile` that has the columns. Raises InputError or StorageError."""
    try:
        with explained(file):
            shard = pq.ParquetFile(file.path, filesystem=file.filesystem)
    except pa.ArrowInvalid as error:
        raise InputError(f"{file.path}: not a readable Parquet shard: {one_line(error)}") from error
    for column in columns:
        if column not in shard.schema_arrow.names:
            raise InputError(
                f"{file.path}: no column {column!r}; build shards with ray_jobs/build_shards.py"
            )
    return shard


def _rows(folder: Location, file: Location, column: str) -> pa.Table:
    shard = open_shard(file, "id", column)
    with explained(file):
        ids = [shard.read_row_group(n, columns=["id"]) for n in range(shard.num_row_groups)]
    name = _below(folder, file)
    groups = [_group_rows(table, name, number) for number, table in enumerate(ids)]
    return pa.concat_tables([INPUTS.empty_table(), *groups])


def _group_rows(ids: pa.Table, name: str, number: int) -> pa.Table:
    size = ids.num_rows
    text = ids.column("id").cast(pa.string())
    return pa.table([text, [name] * size, pa.array([number] * size), pa.array(range(size))], INPUTS)


def _unique(table: pa.Table, folder: Location) -> pa.Table:
    counts = table.column("id").value_counts()
    twice = [c["values"] for c in counts.to_pylist() if c["counts"] > 1]
    if twice:
        raise InputError(f"{folder.path}: id {twice[0]!r} occurs more than once")
    return table


@lru_cache(maxsize=GROUPS_KEPT)
def _group(file: Location, number: int, column: str) -> Any:
    shard = open_shard(file, column)
    with explained(file):
        return shard.read_row_group(number, columns=[column]).column(column)
