"""What a job reads: a folder of pictures, or of Parquet shards, as one table of names.

Only names go through Ray; whoever works on a picture fetches its bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from linearsr.errors import InputError, one_line
from linearsr.imaging.files import READ_SUFFIXES
from linearsr.storage.location import Location, explained

# Row groups of encoded pictures that one process keeps.
GROUPS_KEPT = 8
# Shards that are opened side by side.
OPENED = 16
# Where a job lists what failed: of its results, but neither a picture nor a shard.
FAILURES = "errors/errors.parquet"
# file: path below the folder; group and row: the place inside a shard, -1 for a picture file.
INPUTS = pa.schema({"id": pa.string(), "file": pa.string(), "group": pa.int32(), "row": pa.int32()})

_PICTURES = (
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_fixed_size_binary,
    pa.types.is_binary_view,
)
_TEXTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)


def list_inputs(folder: Location, column: str, without: Location | None = None) -> pa.Table:
    """Every picture below `folder`, sorted by file: `INPUTS`, each id once.

    Picture files, or the rows of shards, see `choose`: `column` holds their encoded pictures. An
    id is a shard's `id`, or a file's path below the folder. What lies below `without` (results of
    an earlier job) is left out where that is a folder inside `folder`. Raises InputError when there
    is nothing, or for a shard that lacks a column, has one of another type, or repeats an id.
    """
    files = folder.files()
    if without is not None and without.path.startswith(f"{folder.path.rstrip('/')}/"):
        files = [f for f in files if not f.path.startswith(f"{without.path}/")]
    pictures, shards = choose(files, folder, "id", column)
    if shards:
        return _unique(pa.concat_tables(_rows(folder, shards, column)), folder)
    if not pictures:
        raise InputError(f"{folder.path}: no pictures and no .parquet shards here")
    names = [_below(folder, picture) for picture in pictures]
    none = pa.array([-1] * len(names), pa.int32())
    return pa.table([names, names, none, none], schema=INPUTS)


def choose(
    files: list[Location], folder: Location, *columns: str
) -> tuple[list[Location], list[Location]]:
    """The pictures of a folder, or its shards: one of the two is empty.

    Every .parquet file is a shard, where there are no pictures. Beside pictures one without the
    `columns` is not: results of an earlier job. Raises InputError for pictures beside shards.
    """
    tables = [f for f in files if f.name.endswith(".parquet") and _below(folder, f) != FAILURES]
    pictures = [f for f in files if _suffix(f.name) in READ_SUFFIXES]
    if not pictures:
        return [], tables
    shards = [
        table
        for table, names in zip(tables, at_once(tables, _column_names), strict=True)
        if names.issuperset(columns)
    ]
    if shards:
        raise InputError(
            f"{folder.path}: both pictures ({_below(folder, pictures[0])}) and shards "
            f"({_below(folder, shards[0])}); give each a folder of their own"
        )
    return pictures, []


def read_input(folder: Location, row: dict[str, Any], column: str) -> bytes:
    """The encoded picture of one row of `list_inputs`. Raises InputError."""
    file = folder / row["file"]
    if row["group"] < 0:
        return file.read()
    data = _group(file, row["group"], column).pictures()[row["row"]].as_py()
    if data is None:
        raise InputError(f"{row['id']}: its {column!r} is empty")
    return bytes(data)


def open_shard(file: Location, *columns: str) -> Any:
    """A `pyarrow.parquet.ParquetFile` that has the columns, of the types that they must have.

    That is text for `id`, anything for `tags`, and bytes, of encoded pictures, for all others.
    Raises InputError or StorageError.
    """
    try:
        with explained(file):
            shard = pq.ParquetFile(file.path, filesystem=file.filesystem)
    except pa.ArrowInvalid as error:
        raise InputError(f"{file.path}: not a readable Parquet shard: {one_line(error)}") from error
    for column in columns:
        _check_column(file, shard.schema_arrow, column)
    return shard


def _check_column(file: Location, schema: pa.Schema, column: str) -> None:
    if column not in schema.names:
        raise InputError(
            f"{file.path}: no column {column!r}; build shards with ray_jobs/build_shards.py"
        )
    kind = schema.field(column).type
    types, needed = (_TEXTS, "text") if column == "id" else (_PICTURES, "bytes, encoded pictures")
    # Text in place of bytes would be the path of a file that is not the dataset's to read.
    if column != "tags" and not any(is_of(kind) for is_of in types):
        raise InputError(
            f"{file.path}: column {column!r} is of type {kind}; it must hold {needed} "
            f"({'string' if column == 'id' else 'binary'})"
        )


def _column_names(file: Location) -> set[str]:
    return set(open_shard(file).schema_arrow.names)


def _below(folder: Location, file: Location) -> str:
    return file.path.removeprefix(folder.path).lstrip("/")


def _suffix(name: str) -> str:
    return f".{name.rsplit('.', 1)[-1].lower()}"


def at_once(files: list[Location], look: Callable[[Location], Any]) -> list[Any]:
    """What `look` says of each file, in order; it is asked about many at a time."""
    with ThreadPoolExecutor(OPENED) as pool:
        return list(pool.map(look, files))


def _rows(folder: Location, shards: list[Location], column: str) -> list[pa.Table]:
    return at_once(shards, lambda shard: _rows_of(shard, _below(folder, shard), column))


def _rows_of(file: Location, name: str, column: str) -> pa.Table:
    shard = open_shard(file, "id", column)
    with explained(file):
        ids = shard.read(columns=["id"]).column("id")
    if ids.null_count:
        raise InputError(f"{file.path}: {ids.null_count} rows have no id; every row needs one")
    sizes = [shard.metadata.row_group(n).num_rows for n in range(shard.num_row_groups)]
    groups = [number for number, size in enumerate(sizes) for _ in range(size)]
    rows = [row for size in sizes for row in range(size)]
    columns = {"id": ids.cast(pa.string()), "file": [name] * len(ids), "group": groups, "row": rows}
    return pa.table(columns, schema=INPUTS)


def _unique(table: pa.Table, folder: Location) -> pa.Table:
    counts = table.column("id").value_counts()
    twice = [c["values"] for c in counts.to_pylist() if c["counts"] > 1]
    if twice:
        raise InputError(f"{folder.path}: id {twice[0]!r} occurs more than once")
    return table


class _Group:
    """One column of a row group: fetched by the first thread that asks, the others wait for it."""

    def __init__(self, file: Location, number: int, column: str) -> None:
        self.file, self.number, self.column = file, number, column
        self.lock = Lock()
        self.fetched: Any = None

    def pictures(self) -> Any:
        """A chunked array. Raises InputError or StorageError; the next one to ask tries again."""
        with self.lock:
            if self.fetched is None:
                shard = open_shard(self.file, self.column)
                with explained(self.file):
                    group = shard.read_row_group(self.number, columns=[self.column])
                self.fetched = group.column(self.column)
            return self.fetched


@lru_cache(maxsize=GROUPS_KEPT)
def _kept(file: Location, number: int, column: str) -> _Group:
    return _Group(file, number, column)


_keeping = Lock()


def _group(file: Location, number: int, column: str) -> _Group:
    """Of each one only: by itself a cache makes two for threads that miss at the same time."""
    with _keeping:
        return _kept(file, number, column)
