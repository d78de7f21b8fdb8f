"""Find and read the pictures of an evaluation: picture files or Parquet shards, local or on S3."""

from __future__ import annotations

from collections.abc import Sequence

from linearsr.evaluation.config import Source
from linearsr.imaging.sources import choose, list_inputs, open_shard, read_input
from linearsr.storage.location import Location, locate, url
from linearsr.storage.walk import Notes


def list_pictures(folder: str, *columns: str, notes: Notes | None = None) -> dict[str, Source]:
    """Return all pictures below a folder by id, or all rows of its Parquet shards.

    Shards are read at the first of `columns` that they have. notes: as for `list_inputs`. Raises
    InputError if there are none.
    """
    place = locate(folder)
    column = _first_column(place, columns)
    sources = {}
    for row in list_inputs(place, column, notes=notes).to_pylist():
        place_in_shard = {name: row[name] for name in ("file", "group", "row")}
        in_shard = column if row["group"] >= 0 else ""
        sources[row["id"]] = Source(folder=url(place), column=in_shard, **place_in_shard)
    return sources


def _first_column(folder: Location, columns: Sequence[str]) -> str:
    """Return the first of the columns that the first shard has."""
    shards = choose(folder, "id", notes=Notes())[1] if len(columns) > 1 else []
    names = open_shard(shards[0]).schema_arrow.names if shards else []
    return next((column for column in columns if column in names), columns[0])


def read_source(source: Source) -> bytes:
    """Return an encoded picture of `list_pictures`. Raises InputError."""
    row = {**source.model_dump(), "id": f"{source.file}:{source.group}:{source.row}"}
    return read_input(locate(source.folder), row, source.column)
