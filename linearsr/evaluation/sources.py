"""List and read the pictures of an evaluation in Parquet shards and on S3; needs no Ray."""

from __future__ import annotations

from collections.abc import Sequence

from linearsr.evaluation.config import Source
from linearsr.imaging.sources import choose, list_inputs, open_shard, read_input
from linearsr.storage.location import Location, locate, url


def list_pictures(folder: str, *columns: str) -> dict[str, Source]:
    """Return pictures, or rows of Parquet shards, by id; local or s3://. Raises InputError.

    Shards are read at the first of the columns that they have.
    """
    location = locate(folder)
    column = _column(location, columns)
    sources = {}
    for row in list_inputs(location, column).to_pylist():
        fields = {name: row[name] for name in ("file", "group", "row")}
        in_shard = column if row["group"] >= 0 else ""
        sources[row["id"]] = Source(folder=url(location), column=in_shard, **fields)
    return sources


def _column(folder: Location, columns: Sequence[str]) -> str:
    """Return the first column that the first shard has, if there is a choice."""
    shards = choose(folder.files(), folder, "id")[1] if len(columns) > 1 else []
    names = open_shard(shards[0]).schema_arrow.names if shards else []
    return next((column for column in columns if column in names), columns[0])


def read_source(source: Source) -> bytes:
    """Return an encoded picture of `list_pictures`. Raises InputError."""
    row = {**source.model_dump(), "id": f"{source.file}:{source.group}:{source.row}"}
    return read_input(locate(source.folder), row, source.column)
