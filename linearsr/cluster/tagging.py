"""Tags for a shard dataset: what the LR pictures show, written beside them.

    list shards ─▶ leave out what is done ─▶ actors: row group ▸ decode ▸ tag ─▶ shard written whole

A shard's footer says which tagger has looked, and which rows it could not see. So the output may be
the input, and a killed job goes on with the shards that lack this tagger's word.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field
from tqdm import tqdm

from linearsr.cluster.logs import last_line, quiet_data
from linearsr.cluster.storage import Location, check_writable, explained, locate
from linearsr.config import Config
from linearsr.errors import InputError, LinearSRError, OptionError, WeightsError, one_line
from linearsr.imaging.files import read
from linearsr.tags.tagger import Tag, TaggerConfig, load_tagger

# In the footer: JSON of `settings`, how many rows have `tagged`, and `errors` by id.
NOTE: Final = b"linearsr.tags"
TAGS: Final = (
    pa.field("tags", pa.list_(pa.string())),
    pa.field("tag_scores", pa.list_(pa.float32())),
)
_REPORT: Final = pa.schema([("shard", pa.string()), ("rows", pa.int64()), ("note", pa.string())])
# Blocks that Ray Data plans; each has some shards' names.
MOST_BLOCKS: Final = 1000


class TagConfig(Config):
    """What is tagged, by which tagger, and what that may take."""

    # Folders of Parquet shards, local (shared) or s3://; the same for tagging in place.
    input: str
    output: str
    # Which picture is looked at. The upscaler will see LR only, so its tags are what it can have.
    column: Literal["lr", "hr"] = "lr"
    tagger: TaggerConfig = TaggerConfig()
    actors: int = Field(default=1, ge=1)
    # Logical CPUs of each.
    actor_cpus: float = Field(default=1.0, gt=0)
    gpu: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the tags: the same settings, the same tags. Raises OptionError."""
        chosen = self.tagger.model_dump(mode="json")
        if self.tagger.vocabulary is not None:
            chosen["vocabulary"] = _digest(self.tagger.vocabulary)
        return {**chosen, "column": self.column}


@dataclass
class Tagged:
    """What became of a dataset."""

    rows: int = 0
    tagged: int = 0
    shards: int = 0
    # Shards that an earlier run had finished.
    before: int = 0
    # (shard, id, what was wrong); the id is empty for a whole shard.
    errors: list[tuple[str, str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.rows} pictures in {self.shards} shards ({self.before} done before): "
            f"{self.tagged} have tags, {len(self.errors)} errors"
        )

    def add(self, shard: str, rows: int, note: dict[str, Any]) -> None:
        """Count one shard's report."""
        self.shards += 1
        self.rows += rows
        self.tagged += note["tagged"]
        self.errors += [(shard, id, error) for id, error in note["errors"].items()]


def tag_dataset(config: TagConfig) -> Tagged:
    """Tag every shard that this tagger has not seen, on a running Ray; tag_errors.csv beside them.

    Raises InputError, OutputError or OptionError before any work for what can be known by then.
    """
    source, output = locate(config.input), locate(config.output)
    shards = _shards(source)
    settings = config.settings
    check_writable(output)
    result = Tagged()
    todo = []
    for name, size in shards.items():
        done = _note_of(output / name, settings)
        if done is None:
            todo.append((name, size))
            continue
        result.before += 1
        result.add(name, size, done)
    for report in _progress(_run(config, todo), sum(size for _, size in todo)):
        result.add(report["shard"], report["rows"], json.loads(report["note"]))
    _write_errors(output / "tag_errors.csv", sorted(result.errors))
    return result


def _digest(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise OptionError(
            f"{path}: cannot be read ({error.strerror}); check --vocabulary"
        ) from error


def _shards(folder: Location) -> dict[str, int]:
    """Names below the folder, and rows. Raises InputError when there are none, or one is broken."""
    files = [file for file in folder.files() if file.name.endswith(".parquet")]
    if not files:
        raise InputError(f"{folder.path}: no .parquet shards here; see ray_jobs/build_shards.py")
    inside = {file.path.removeprefix(folder.path).lstrip("/"): file for file in files}
    return {name: _open(file).metadata.num_rows for name, file in inside.items()}


def _open(file: Location) -> Any:
    try:
        with explained(file):
            return pq.ParquetFile(file.path, filesystem=file.filesystem)
    except pa.ArrowInvalid as error:
        raise InputError(f"{file.path}: not a readable shard: {one_line(error)}") from error


def _note_of(file: Location, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What this tagger noted in a finished shard; None when it has not looked."""
    if not file.exists():
        return None
    note = json.loads((_open(file).metadata.metadata or {}).get(NOTE, b"{}"))
    return note if note.get("settings") == settings else None


def _run(config: TagConfig, todo: list[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    """A report per shard, when it is through."""
    import ray

    if not todo:
        return
    names = [name for name, _ in todo]
    size = -(-len(names) // MOST_BLOCKS)
    quiet_data()
    # In memory: reading would be tasks of a whole CPU each, that nobody has reserved.
    blocks = [pa.table({"shard": names[i : i + size]}) for i in range(0, len(names), size)]
    reports = ray.data.from_blocks(blocks).map_batches(
        _Worker,
        # Locations, not paths: an S3 endpoint is the driver's, not that of where an actor runs.
        fn_constructor_args=(config, locate(config.input), locate(config.output)),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=config.actors),
        num_cpus=config.actor_cpus,
        num_gpus=1 if config.gpu else None,
    )
    try:
        for batch in reports.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from batch.to_pylist()
    except ray.exceptions.RayError as error:
        raise LinearSRError(last_line(error)) from error


def _progress(reports: Iterator[dict[str, Any]], total: int) -> Iterator[dict[str, Any]]:
    """The reports, under a bar with images/s, time left and errors."""
    failed = 0
    with tqdm(total=total, unit="image", desc="tag", mininterval=1) as bar:
        for report in reports:
            note = json.loads(report["note"])
            if "refused" in note:
                raise OptionError(note["refused"])
            for id, error in note["errors"].items():
                failed += 1
                bar.write(f"{report['shard']}: {id or 'whole shard'}: {error}", file=sys.stderr)
            bar.set_postfix(errors=failed, refresh=False)
            bar.update(report["rows"])
            yield report


def _write_errors(target: Location, errors: list[tuple[str, str, str]]) -> None:
    if not errors:
        target.delete_file()
        return
    text = io.StringIO()
    csv.writer(text).writerows([("shard", "id", "error"), *errors])
    target.write(text.getvalue().encode())


class _Worker:
    """The actor: one tagger, a shard at a time."""

    def __init__(self, config: TagConfig, source: Location, output: Location) -> None:
        self.config, self.source, self.output = config, source, output
        self.refused = ""
        try:
            self.tagger = load_tagger(config.tagger, "cuda" if config.gpu else "cpu")
        except (OptionError, WeightsError) as error:  # raised here, Ray would start it ever again
            self.refused = str(error)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Names of shards in, a row of `_REPORT` for each out."""
        reports = [self._report(name) for name in batch.column("shard").to_pylist()]
        return pa.Table.from_pylist(reports, schema=_REPORT)

    def _report(self, name: str) -> dict[str, Any]:
        """One bad shard must not end the job."""
        if self.refused:
            return {"shard": name, "rows": 0, "note": json.dumps({"refused": self.refused})}
        try:
            rows, note = self._shard(name)
        except (LinearSRError, OSError, pa.ArrowException) as error:
            rows, note = 0, {"tagged": 0, "errors": {"": one_line(error)}}
        return {"shard": name, "rows": rows, "note": json.dumps(note)}

    def _shard(self, name: str) -> tuple[int, dict[str, Any]]:
        """Write one shard with its tags; its rows and its note."""
        file = _open(self.source / name)
        data, note = tagged_shard(file, self.config, self.tagger)
        (self.output / name).write(data)
        return file.metadata.num_rows, note


def tagged_shard(file: Any, config: TagConfig, tagger: Any) -> tuple[bytes, dict[str, Any]]:
    """The Parquet file with `tags` and `tag_scores` filled, and the note in its footer.

    All else stays as it is, by row group, so no more than one is decoded at a time. A row whose
    picture cannot be seen has no tags and an error in the note. Raises InputError for a shard
    without the columns.
    """
    schema = _schema(file.schema_arrow, config.column)
    note: dict[str, Any] = {"settings": config.settings, "tagged": 0, "errors": {}}
    sink = io.BytesIO()
    # Pictures are compressed already; neither statistics nor dictionaries of them are of use.
    plain: dict[str, Any] = {"use_dictionary": False, "write_statistics": False}
    with pq.ParquetWriter(sink, schema, compression="none", **plain) as writer:
        for number in range(file.num_row_groups):
            group = file.read_row_group(number)
            rows = zip(*(group.column(c).to_pylist() for c in ("id", config.column)), strict=True)
            tags = [_tags(id, data, tagger, note) for id, data in rows]
            writer.write_table(_filled(group, tags, schema))
        writer.add_key_value_metadata({NOTE.decode(): json.dumps(note)})
    return sink.getvalue(), note


def _schema(schema: Any, column: str) -> Any:
    """The shard's own, with TAGS in their place or at the end."""
    missing = {"id", column} - set(schema.names)
    if missing:
        raise InputError(f"no column {', '.join(sorted(missing))}")
    for field_ in TAGS:
        at = schema.get_field_index(field_.name)
        schema = schema.append(field_) if at < 0 else schema.set(at, field_)
    kept = {k: v for k, v in (schema.metadata or {}).items() if k != NOTE}
    return schema.with_metadata(kept or None)


def _tags(id: str, data: bytes | None, tagger: Any, note: dict[str, Any]) -> list[Tag]:
    try:
        if data is None:
            raise InputError("there is no picture")
        tags: list[Tag] = tagger(read(data, name="the picture").pixels)
    except (LinearSRError, MemoryError, OSError, RuntimeError, ValueError) as error:
        note["errors"][str(id)] = one_line(error) or type(error).__name__
        return []
    note["tagged"] += bool(tags)
    return tags


def _filled(group: pa.Table, tags: list[list[Tag]], schema: Any) -> pa.Table:
    names = pa.array([[tag.name for tag in row] for row in tags], TAGS[0].type)
    scores = pa.array([[tag.score for tag in row] for row in tags], TAGS[1].type)
    new = {"tags": names, "tag_scores": scores}
    columns = [new[n] if n in new else group.column(n) for n in schema.names]
    return pa.table(columns, schema=schema)
