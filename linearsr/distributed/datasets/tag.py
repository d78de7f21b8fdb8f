"""Tags for a shard dataset: what the LR pictures show, written beside them.

    list shards ─▶ leave out what is done ─▶ actors: row group ▸ decode ▸ tag ─▶ shard written whole

A shard's footer says which tagger has looked, at which rows, and which it could not see. So the
output may be the input, and a killed job goes on with the shards that lack this tagger's word.
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
from typing import Any, Final, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from linearsr.distributed.queue import LOST, Pool, pooled
from linearsr.errors import InputError, LinearSRError, OptionError, WeightsError, one_line
from linearsr.imaging.files import read
from linearsr.imaging.sources import map_files, open_shard
from linearsr.storage.location import Location, check_writable, explained, locate, url
from linearsr.tags import load_tagger
from linearsr.tags.base import Tag, TaggerConfig

# In the footer: JSON of `settings`, the `identity` of the shard, how many rows have `tagged`, and
# `errors` by id.
NOTE: Final = b"linearsr.tags"
TAGS: Final = (
    pa.field("tags", pa.list_(pa.string())),
    pa.field("tag_scores", pa.list_(pa.float32())),
)
# What tells shards apart whatever their tags are; LR follows from HR by the degradation's seed.
IDENTITY: Final = ("id", "degradation")
Note = dict[str, Any]


class _Shard(NamedTuple):
    """Its name below the folder, how many rows, and a digest of `IDENTITY`."""

    name: str
    rows: int
    identity: str


class TagConfig(Pool):
    """What is tagged, by which tagger, and what that may take."""

    input: str
    """A folder of Parquet shards, that all nodes see; s3:// too."""
    output: str
    """A folder; s3:// too; may be the input."""
    column: Literal["lr", "hr"] = "lr"
    """The picture looked at: the upscaler will see LR only, so its tags are what it can have."""
    tagger: TaggerConfig = TaggerConfig()

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

    def add(self, shard: _Shard, note: Note) -> None:
        """Count one shard."""
        self.shards += 1
        self.rows += shard.rows
        self.tagged += note["tagged"]
        self.errors += [(shard.name, id, error) for id, error in note["errors"].items()]


def tag_dataset(config: TagConfig) -> Tagged:
    """Tag every shard that this tagger has not seen, on a running Ray; tag_errors.csv beside them.

    Raises InputError, OutputError or OptionError before any work for what can be known by then, as
    that `output` holds shards that are not those of `input`.
    """
    source, output = locate(config.input), locate(config.output)
    shards = _shards(source, config.column)
    settings = config.settings
    notes = _notes(shards, output, settings)
    check_writable(output)
    result = Tagged(before=sum(note is not None for note in notes))
    for shard, note in zip(shards, notes, strict=True):
        if note is not None:
            result.add(shard, note)
    todo = [shard for shard, note in zip(shards, notes, strict=True) if note is None]
    # Locations, not paths: an S3 endpoint is the driver's, not that of where an actor runs.
    done = pooled(todo, _Worker, (config, source, output), config)
    for shard, note in _progress(done, sum(shard.rows for shard in todo)):
        result.add(shard, note)
    _write_errors(output / "tag_errors.csv", sorted(result.errors))
    return result


def _digest(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise OptionError(
            f"{path}: cannot be read ({error.strerror}); check --vocabulary"
        ) from error


def _shards(folder: Location, column: str) -> list[_Shard]:
    """Those below the folder. Raises InputError when there are none, or one is broken."""
    files = [file for file in folder.files() if file.name.endswith(".parquet")]
    if not files:
        raise InputError(f"{folder.path}: no .parquet shards here; see ray_jobs/build_shards.py")

    def seen(file: Location) -> _Shard:
        shard = open_shard(file, "id", column)
        with explained(file):
            return _Shard(file.relative_to(folder), shard.metadata.num_rows, identity(shard))

    return map_files(files, seen)


def identity(shard: Any) -> str:
    """A digest of the rows of an open shard that tagging does not change; pictures stay unread."""
    names = [name for name in IDENTITY if name in shard.schema_arrow.names]
    rows = shard.read(columns=names).to_pylist()
    return hashlib.sha256(json.dumps(rows, default=str).encode()).hexdigest()


def _notes(shards: list[_Shard], output: Location, settings: dict[str, Any]) -> list[Note | None]:
    """What this tagger noted in finished shards; None where it has not looked.

    Raises OptionError for shards of others, which would be overwritten, and InputError.
    """
    known = {(output / shard.name).path: shard for shard in shards}
    there = [file for file in output.files() if file.path in known]

    def noted(file: Location) -> Note | None:
        shard = open_shard(file, "id")
        note = _note(shard, file)
        with explained(file):
            same = identity(shard) == known[file.path].identity
        if not same:
            raise OptionError(
                f"{url(output)} holds other shards: {known[file.path].name} has other rows than "
                "the input's; choose another output"
            )
        told = (note.get("settings"), note.get("identity"))
        return note if told == (settings, known[file.path].identity) else None

    found = dict(zip((file.path for file in there), map_files(there, noted), strict=True))
    return [found.get(path) for path in known]


def _note(shard: Any, file: Location) -> Note:
    """What any tagger noted in the open shard. Raises InputError for what none has written."""
    text = (shard.metadata.metadata or {}).get(NOTE)
    try:
        note: Note = {} if text is None else json.loads(text)
        if note and not {"settings", "tagged", "errors"} <= note.keys():
            raise ValueError("a part of it is missing")
    except (ValueError, AttributeError) as error:
        raise InputError(
            f"{url(file)}: its note {NOTE.decode()} is damaged ({one_line(error)}); "
            "delete it, or build it anew"
        ) from error
    return note


def _progress(
    notes: Iterator[tuple[_Shard, Note | None]], total: int
) -> Iterator[tuple[_Shard, Note]]:
    """Shards with their notes, under a bar with images/s, time left and errors."""
    failed = 0
    with tqdm(total=total, unit="image", desc="tag", mininterval=1) as bar:
        for shard, told in notes:
            note = _failed(LOST) if told is None else told
            for id, error in note["errors"].items():
                failed += 1
                bar.write(f"{shard.name}: {id or 'whole shard'}: {error}", file=sys.stderr)
            bar.set_postfix(errors=failed, refresh=False)
            bar.update(shard.rows)
            yield shard, note


def _failed(error: str) -> Note:
    return {"tagged": 0, "errors": {"": error}}


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
        self.tagger = load_tagger(config.tagger, "cuda" if config.gpu else "cpu")

    def __call__(self, shards: list[_Shard]) -> list[Note]:
        """Names of shards in, the note of each out."""
        return [self._shard(shard.name) for shard in shards]

    def _shard(self, name: str) -> Note:
        """One bad shard must not end the job."""
        try:
            data, note = tagged_shard(open_shard(self.source / name), self.config, self.tagger)
            (self.output / name).write(data)
        except (OptionError, WeightsError):
            raise  # the next one would fail as well
        except Exception as error:
            return _failed(_reason(error))
        return note


def tagged_shard(file: Any, config: TagConfig, tagger: Any) -> tuple[bytes, Note]:
    """The Parquet file with `tags` and `tag_scores` filled, and the note in its footer.

    All else stays as it is, by row group, so no more than one is decoded at a time. A row whose
    picture cannot be seen has no tags and an error in the note.
    """
    schema = _schema(file.schema_arrow)
    note: Note = {"settings": config.settings, "identity": identity(file)}
    note |= {"tagged": 0, "errors": {}}
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


def _schema(schema: Any) -> Any:
    """The shard's own, with TAGS in their place or at the end."""
    for field_ in TAGS:
        at = schema.get_field_index(field_.name)
        schema = schema.append(field_) if at < 0 else schema.set(at, field_)
    kept = {k: v for k, v in (schema.metadata or {}).items() if k != NOTE}
    return schema.with_metadata(kept or None)


def _tags(id: str, data: bytes | None, tagger: Any, note: Note) -> list[Tag]:
    try:
        if data is None:
            raise InputError("there is no picture")
        tags: list[Tag] = tagger(read(data, name="the picture").pixels)
    except (OptionError, WeightsError):
        raise  # the next one would fail as well
    except Exception as error:  # torch, codecs and models have their own ways
        note["errors"][str(id)] = _reason(error)
        return []
    note["tagged"] += bool(tags)
    return tags


def _reason(error: Exception) -> str:
    kind = "" if isinstance(error, LinearSRError) else f"{type(error).__name__}: "
    return kind + one_line(error)


def _filled(group: pa.Table, tags: list[list[Tag]], schema: Any) -> pa.Table:
    names = pa.array([[tag.name for tag in row] for row in tags], TAGS[0].type)
    scores = pa.array([[tag.score for tag in row] for row in tags], TAGS[1].type)
    new = {"tags": names, "tag_scores": scores}
    columns = [new[n] if n in new else group.column(n) for n in schema.names]
    return pa.table(columns, schema=schema)
