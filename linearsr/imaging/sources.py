"""List and read the pictures of a dataset: a folder of picture files, or of Parquet shards.

The list holds names only; a worker reads the bytes of a picture when it needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from linearsr.errors import InputError, is_text, one_line
from linearsr.imaging.listing import HEAD_BYTES, NAME_FAULT, choose_pictures, litter
from linearsr.storage.location import Location, explained, is_plain
from linearsr.storage.walk import Notes

# The most row groups of encoded pictures that a process keeps in memory.
GROUPS_KEPT = 8
# Shards that are opened at the same time.
OPENED = 16
# The list of failures among a job's results, which is neither a picture nor a shard.
FAILURES = "errors/errors.parquet"
# file: the path below the folder. group, row: the position in a shard, or -1 for a picture file.
INPUTS = pa.schema({"id": pa.string(), "file": pa.string(), "group": pa.int32(), "row": pa.int32()})

_PICTURES = (
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_fixed_size_binary,
    pa.types.is_binary_view,
)
_TEXTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)


def list_inputs(
    folder: Location, column: str, without: Location | None = None, notes: Notes | None = None
) -> pa.Table:
    """Return a table `INPUTS` of every picture below `folder`, sorted by file.

    They are picture files, or rows of shards with encoded pictures in `column` (see `choose`). An
    id is a shard's `id`, or a file's path below the folder.

    without: a folder inside `folder` to leave out, such as the results of an earlier job.
    notes: gets what is left out, and as failures the pictures and folders that cannot be listed.

    Raises InputError if there are no pictures, an id occurs twice, or a shard lacks a column or has
    one of another type.
    """
    notes = Notes() if notes is None else notes
    pictures, shards = choose(folder, "id", column, without=without, notes=notes)
    if shards:
        tables = map_files(
            shards, lambda shard: _shard_rows(shard, shard.relative_to(folder), column)
        )
        return _unique(pa.concat_tables(tables), folder)
    if not pictures and not notes.failures:
        raise InputError(f"{folder.path}: no pictures and no .parquet shards here")
    names = [picture.relative_to(folder) for picture in pictures]
    none = pa.array([-1] * len(names), pa.int32())
    return _unique(pa.table([names, names, none, none], schema=INPUTS), folder)


def _unique(table: pa.Table, folder: Location) -> pa.Table:
    counts = table.column("id").value_counts().to_pylist()
    if repeated := [c["values"] for c in counts if c["counts"] > 1]:
        raise InputError(f"{folder.path}: id {repeated[0]!r} occurs more than once")
    return table


def choose(
    folder: Location,
    *columns: str,
    without: Location | None = None,
    notes: Notes | None = None,
) -> tuple[list[Location], list[Location]]:
    """Return the pictures and the shards of a folder; one of the two lists is empty.

    Without pictures, every .parquet file is a shard. Beside pictures, a .parquet file without the
    `columns` is not a shard but a result of an earlier job. `without` and `notes` are those of
    `list_inputs`; without `notes` a failure raises InputError, as do pictures beside shards.
    """
    seen = Notes() if notes is None else notes
    files = folder.files(seen)
    if without is not None and without.is_inside(folder):
        files = [file for file in files if not file.is_inside(without)]
    pictures = list_pictures(files, folder, seen)
    tables = [file for file in files if is_shard_name(file.relative_to(folder))]
    for name in [file.relative_to(folder) for file in tables]:
        if not is_text(name):
            seen.fail(name, NAME_FAULT)
    tables = [file for file in tables if is_text(file.relative_to(folder))]
    if notes is None:
        seen.check(folder.path)
    if not pictures:
        return [], tables
    shards = [
        table
        for table, names in zip(
            tables, map_files(tables, lambda file: open_shard(file).schema_arrow.names), strict=True
        )
        if {*columns} <= {*names}
    ]
    if shards:
        raise InputError(
            f"{folder.path}: both pictures ({pictures[0].relative_to(folder)}) and shards "
            f"({shards[0].relative_to(folder)}); put them into separate folders"
        )
    return pictures, []


def is_shard_name(name: str) -> bool:
    """Return whether a path below a folder can be that of a shard."""
    return name.endswith(".parquet") and name != FAILURES and litter(name) is None


def list_pictures(files: list[Location], folder: Location, notes: Notes) -> list[Location]:
    """Return the pictures among the files of a folder, in order; see `choose_pictures`.

    A picture whose name is not UTF-8 is a failure in `notes`, since ids are text.
    """
    names = {file.relative_to(folder): file for file in files}
    head = partial(_head, names)
    return [names[name] for name in choose_pictures(names, head, notes, text=True)]


def _head(files: Mapping[str, Location], name: str) -> bytes:
    return files[name].head(HEAD_BYTES)


def read_input(folder: Location, row: dict[str, Any], column: str) -> bytes:
    """Return the encoded picture of one row of `list_inputs`. Raises InputError."""
    file = folder / row["file"]
    if row["group"] < 0:
        return file.read()
    data = _group(file, row["group"], column).pictures()[row["row"]].as_py()
    if data is None:
        raise InputError(f"{row['id']}: its {column!r} is empty")
    return bytes(data)


def open_shard(file: Location, *columns: str) -> Any:
    """Open a shard as a `pyarrow.parquet.ParquetFile` and check its columns.

    `id` must be text and `tags` may be anything; all other columns must be bytes, which are encoded
    pictures. Raises InputError or StorageError.
    """
    try:
        with explained(file):
            shard = _open(file)
    except pa.ArrowInvalid as error:
        raise InputError(f"{file.path}: not a readable Parquet shard: {one_line(error)}") from error
    for column in columns:
        _check_column(file, shard.schema_arrow, column)
    return shard


def _open(file: Location) -> Any:
    if not is_plain(file.path.lstrip("/")):
        # pyarrow takes such a key for another one, or refuses it.
        return pq.ParquetFile(pa.BufferReader(file.read()))
    return pq.ParquetFile(file.path, filesystem=file.filesystem)


def _check_column(file: Location, schema: pa.Schema, column: str) -> None:
    if column not in schema.names:
        raise InputError(
            f"{file.path}: no column {column!r}; build shards with ray_jobs/build_shards.py"
        )
    kind = schema.field(column).type
    types, needed = (_TEXTS, "text") if column == "id" else (_PICTURES, "bytes, encoded pictures")
    # Text instead of bytes would be the path of a file outside the dataset.
    if column != "tags" and not any(is_of(kind) for is_of in types):
        raise InputError(
            f"{file.path}: column {column!r} is of type {kind}; it must hold {needed} "
            f"({'string' if column == 'id' else 'binary'})"
        )


def map_files(files: list[Location], function: Callable[[Location], Any]) -> list[Any]:
    """Return the results of a function for each file, in order, from several threads."""
    with ThreadPoolExecutor(OPENED) as pool:
        return list(pool.map(function, files))


def _shard_rows(file: Location, name: str, column: str) -> pa.Table:
    shard = open_shard(file, "id", column)
    with explained(file):
        ids = shard.read(columns=["id"]).column("id")
    if ids.null_count:
        raise InputError(f"{file.path}: {ids.null_count} rows have no id; every row needs one")
    try:
        ids.validate(full=True)
    except pa.ArrowInvalid as error:
        raise InputError(f"{file.path}: an id is not UTF-8 text; {one_line(error)}") from error
    sizes = [shard.metadata.row_group(n).num_rows for n in range(shard.num_row_groups)]
    groups = [number for number, size in enumerate(sizes) for _ in range(size)]
    rows = [row for size in sizes for row in range(size)]
    columns = {"id": ids.cast(pa.string()), "file": [name] * len(ids), "group": groups, "row": rows}
    return pa.table(columns, schema=INPUTS)


class _RowGroup:
    """One column of a row group; the first thread that needs it reads it, the others wait."""

    def __init__(self, file: Location, number: int, column: str) -> None:
        self.file, self.number, self.column = file, number, column
        self.lock = Lock()
        self.column_data: Any = None

    def pictures(self) -> Any:
        """Return the column. Raises InputError or StorageError; the next call then tries again."""
        with self.lock:
            if self.column_data is None:
                shard = open_shard(self.file, self.column)
                with explained(self.file):
                    group = shard.read_row_group(self.number, columns=[self.column])
                self.column_data = group.column(self.column)
            return self.column_data


_cached_group = lru_cache(maxsize=GROUPS_KEPT)(_RowGroup)
_cache_lock = Lock()


def _group(file: Location, number: int, column: str) -> _RowGroup:
    """Return the cached row group. Without the lock, threads that miss together would make two."""
    with _cache_lock:
        return _cached_group(file, number, column)
