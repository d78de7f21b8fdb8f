"""Tag a shard dataset: what the LR pictures show, written beside them.

    list shards ─▶ leave out those done ─▶ actors: row group ▸ decode ▸ tag ─▶ shard written whole

Shards whose latents are of a model with tags also get the tags' embeddings by the encoder of that
model, so that training need not embed them.

A shard's footer says which tagger has seen it, which rows it had then, and which rows failed. So
the output may be the input, and a job that is started again goes on with the shards that this
tagger has not seen.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections import Counter
from typing import Any, Final, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from linearsr.distributed.datasets.resume import Errors, Failure, Summary, progress
from linearsr.distributed.latents import (
    EMBEDDED,
    EMBEDDED_PRECISION,
    EMBEDDINGS,
    EmbeddingsNote,
    latents_of,
    with_note,
)
from linearsr.distributed.queue import CRASHED, Pool, map_actors
from linearsr.errors import (
    InputError,
    OptionError,
    WeightsError,
    is_text,
    one_line,
    reason,
)
from linearsr.imaging.files import read
from linearsr.imaging.listing import NAME_FAULT
from linearsr.imaging.sources import is_shard_name, map_files, open_shard
from linearsr.pipeline.notes import notes_of
from linearsr.storage.location import (
    Location,
    check_writable,
    explained,
    is_plain,
    locate,
    url,
)
from linearsr.storage.walk import Notes
from linearsr.tags import load_tagger
from linearsr.tags.base import Tag, TaggerConfig
from linearsr.tags.encoder import GemmaEncoder, TagEncoder
from linearsr.training.latents import pack

# The footer's key. Its value is JSON: the `settings`, the shard's `identity`, the number of rows
# `tagged`, and `errors` by id; the id "" stands for the whole shard. It may have `notes` by id, of
# pictures that did not fail.
NOTE: Final = b"linearsr.tags"
TAGS: Final = (
    pa.field("tags", pa.list_(pa.string())),
    pa.field("tag_scores", pa.list_(pa.float32())),
)
# Columns that identify a row whatever its tags are; LR follows from HR by the degradation's seed.
IDENTITY: Final = ("id", "degradation")
OUTSIDE: Final = "the shard's key cannot be a file below the output; rename it"
Note = dict[str, Any]


class _Shard(NamedTuple):
    """A shard: its path below the folder, its number of rows, and a digest of `IDENTITY`."""

    name: str
    rows: int
    identity: str


class TagConfig(Pool):
    """A tagging job."""

    input: str
    """Folder of Parquet shards, local (on storage that all nodes see) or s3://."""
    output: str
    """Folder for the tagged shards, local or s3://; may be the input."""
    column: Literal["lr", "hr"] = "lr"
    """Picture of each pair to tag. When a picture is upscaled, the tagger sees only LR, so tags of
    lr are like those that the model will get."""
    tagger: TaggerConfig = TaggerConfig()

    @property
    def settings(self) -> dict[str, Any]:
        """All settings that the tags depend on. Raises OptionError for an unreadable vocabulary."""
        return {**self.tagger.settings, "column": self.column}


def tag_dataset(config: TagConfig) -> Summary:
    """Tag every shard that this tagger has not seen, on a running Ray cluster.

    Errors that can be found in advance are raised before any work starts: InputError, OutputError
    or OptionError, for example if `output` holds shards other than those of `input`.
    """
    source, output = locate(config.input), locate(config.output)
    skipped = Notes()
    shards = _list_shards(source, config.column, skipped)
    notes = _read_notes(shards, output, config.settings)
    check_writable(output)
    skipped.tell_left_out()
    finished = [(shard, note) for shard, note in zip(shards, notes, strict=True) if note]
    left = [shard for shard, note in zip(shards, notes, strict=True) if note is None]
    todo = [shard for shard in left if _is_inside(shard.name, output)]
    outside = [(shard, _failed_shard(OUTSIDE)) for shard in left if shard not in todo]
    # Locations, not paths: an actor's node may have another S3 endpoint than the driver's.
    results = map_actors(todo, _Worker, (config, source, output), config)
    counts: Counter[str] = Counter()
    with (
        # The errors of build_shards remain, if the output is the folder that it wrote.
        Errors(output, keep=lambda row: row["stage"] != "tag") as errors,
        progress("tag", sum(shard.rows for shard in shards), "pictures") as bar,
    ):
        for name, error in skipped.failures.items():
            errors.add(name, Failure("tag", error), bar)
        for run, tagged in (("earlier", finished), ("done", outside), ("done", results)):
            for shard, result in tagged:
                note = result or _failed_shard(CRASHED)
                failed = _add_errors(errors, shard, note, bar)
                counts[run] += shard.rows - failed
                counts["failed"] += failed
                counts["tagged"] += note["tagged"]
                counts["noted"] += len(note.get("notes", ()))
                if run == "done":
                    _write_notes(shard, note, bar)
                bar.update(shard.rows)
    return Summary(
        unit="pictures",
        verb="processed",
        total=sum(shard.rows for shard in shards) + len(skipped.failures),
        earlier=counts["earlier"],
        done=counts["done"],
        failed=counts["failed"] + len(skipped.failures),
        detail=f"{counts['tagged']} have tags, in {len(shards)} shards"
        + (f", {counts['noted']} with notes" if counts["noted"] else ""),
    )


def _is_inside(name: str, output: Location) -> bool:
    """Return whether a shard of this name can lie below the output."""
    return is_plain(name) or not (output.is_local or ".." in name.split("/"))


def _list_shards(folder: Location, column: str, notes: Notes) -> list[_Shard]:
    """List the shards below the folder. Raises InputError if there are none or one is broken.

    notes: gets as failures the subfolders and the shards that cannot be listed.
    """
    files = {file.relative_to(folder): file for file in folder.files(notes)}
    files = {n: file for n, file in files.items() if is_shard_name(n)}
    for name in [name for name in files if not is_text(name)]:
        del files[name]
        notes.fail(name, NAME_FAULT)
    if not files and not notes.failures:
        raise InputError(f"{folder.path}: no .parquet shards here; see ray_jobs/build_shards.py")

    def describe(name: str) -> _Shard:
        shard = open_shard(files[name], "id", column)
        with explained(files[name]):
            return _Shard(name, shard.metadata.num_rows, identity(shard))

    return map_files(list(files), describe)  # type: ignore[arg-type]


def identity(shard: Any) -> str:
    """Return a digest of the columns that tagging does not change; pictures stay unread."""
    names = [name for name in IDENTITY if name in shard.schema_arrow.names]
    rows = shard.read(columns=names).to_pylist()
    return hashlib.sha256(json.dumps(rows, default=str).encode()).hexdigest()


def _read_notes(
    shards: list[_Shard], output: Location, settings: dict[str, Any]
) -> list[Note | None]:
    """Return this tagger's note in each finished shard, or None for a shard that is left to do.

    Raises OptionError for shards of another dataset, which would be overwritten, and InputError for
    a damaged note.
    """
    known = {(output / shard.name).path: shard for shard in shards}
    existing = [file for file in output.files(Notes()) if file.path in known]

    def read_note(file: Location) -> Note | None:
        shard = open_shard(file, "id")
        note = _note(shard, file)
        wanted = {**settings, **_encoder_settings(shard.schema_arrow, file)}
        with explained(file):
            same = identity(shard) == known[file.path].identity
        if not same:
            raise OptionError(
                f"{url(output)}: holds shards of another data set: the rows of "
                f"{known[file.path].name} differ from those in the input; choose another --output"
            )
        done = (note.get("settings"), note.get("identity"))
        return note if done == (wanted, known[file.path].identity) else None

    notes = dict(zip((file.path for file in existing), map_files(existing, read_note), strict=True))
    return [notes.get(path) for path in known]


def _encoder_settings(schema: Any, file: Location) -> dict[str, str]:
    """Return the encoder that must embed a shard's tags, as a setting; {} if none must."""
    latents = latents_of(schema, url(file))
    note = None if latents is None else EmbeddingsNote.of(latents)
    return {} if note is None else {"encoder": note.source}


def _note(shard: Any, file: Location) -> Note:
    """Return any tagger's note in the open shard, or {}. Raises InputError for a damaged one."""
    text = (shard.metadata.metadata or {}).get(NOTE)
    try:
        note: Note = {} if text is None else json.loads(text)
        if note and not {"settings", "tagged", "errors"} <= note.keys():
            raise ValueError("a part of it is missing")
    except (ValueError, AttributeError) as error:
        raise InputError(
            f"{url(file)}: its metadata entry {NOTE.decode()} is damaged ({one_line(error)}); "
            "delete the shard or build it again"
        ) from error
    return note


def _add_errors(errors: Errors, shard: _Shard, note: Note, bar: Any) -> int:
    """List a shard's errors; return the number of pictures that failed."""
    for id, error in note["errors"].items():
        errors.add(f"{shard.name}#{id}" if id else shard.name, Failure("tag", error), bar)
    return shard.rows if "" in note["errors"] else len(note["errors"])


def _write_notes(shard: _Shard, note: Note, bar: Any) -> None:
    """Print the notes of a shard's pictures above the bar."""
    for id, text in note.get("notes", {}).items():
        bar.write(f"{shard.name}#{id}: {text}", file=sys.stderr)


def _failed_shard(error: str) -> Note:
    return {"tagged": 0, "errors": {"": error}}


class _Worker:
    """The worker of an actor: one tagger, which tags a shard at a time."""

    def __init__(self, config: TagConfig, source: Location, output: Location) -> None:
        self.config, self.source, self.output = config, source, output
        self.device = "cuda" if config.gpu else "cpu"
        self.tagger = load_tagger(config.tagger, self.device)
        self.encoders: dict[EmbeddingsNote, TagEncoder] = {}

    def __call__(self, shards: list[_Shard]) -> list[Note]:
        """Tag shards and return the note of each."""
        return [self._tag(shard.name) for shard in shards]

    def _tag(self, name: str) -> Note:
        """Tag one shard; a bad one must not end the job."""
        try:
            shard = open_shard(self.source / name)
            encoder = self._encoder(shard.schema_arrow, name)
            data, note = tag_shard(shard, self.config, self.tagger, encoder)
            (self.output / name).write(data)
        except (OptionError, WeightsError):
            raise  # the next one would fail as well
        except Exception as error:
            return _failed_shard(reason(error))
        return note

    def _encoder(self, schema: Any, name: str) -> Encoder | None:
        """Return the encoder that a shard's latents ask for, if they do; each is loaded once."""
        latents = latents_of(schema, name)
        note = None if latents is None else EmbeddingsNote.of(latents)
        if note is None:
            return None
        if note not in self.encoders:
            self.encoders[note] = GemmaEncoder(note.source, note.dim, self.device)
        return Encoder(note, self.encoders[note])


class Encoder(NamedTuple):
    """An encoder of tags, and the note about its embeddings."""

    note: EmbeddingsNote
    encode: TagEncoder

    def column(self, tags: list[list[Tag]]) -> pa.Array:
        """Return the column of a row group's embeddings."""
        embedded, mask = self.encode([[tag.name for tag in row] for row in tags])
        rows = (row[kept] for row, kept in zip(embedded, mask, strict=True))
        return pa.array([pack(row, EMBEDDED_PRECISION) for row in rows], EMBEDDED.type)


def tag_shard(
    file: Any, config: TagConfig, tagger: Any, encoder: Encoder | None = None
) -> tuple[bytes, Note]:
    """Return the bytes of a shard with `tags` and `tag_scores` filled, and the note in its footer.

    file: the shard, opened by pyarrow. All its other columns stay as they are. Its row groups are
    tagged in turn, so at most one is in memory. A row whose picture cannot be read has no tags and
    an error in the note. encoder: also fills `tag_embeddings`; without it, a column of an earlier
    run is dropped, as its embeddings would be of other tags.
    """
    schema = _schema(file.schema_arrow, None if encoder is None else encoder.note)
    settings = config.settings | ({} if encoder is None else {"encoder": encoder.note.source})
    note: Note = {"settings": settings, "identity": identity(file)}
    note |= {"tagged": 0, "errors": {}, "notes": {}}
    sink = io.BytesIO()
    # Pictures are compressed already; neither statistics nor dictionaries of them are of use.
    plain: dict[str, Any] = {"use_dictionary": False, "write_statistics": False}
    with pq.ParquetWriter(sink, schema, compression="none", **plain) as writer:
        for number in range(file.num_row_groups):
            group = file.read_row_group(number)
            rows = zip(*(group.column(c).to_pylist() for c in ("id", config.column)), strict=True)
            tags = [_tags(id, data, tagger, note) for id, data in rows]
            embedded = None if encoder is None else encoder.column(tags)
            writer.write_table(_with_tags(group, tags, embedded, schema))
        writer.add_key_value_metadata({NOTE.decode(): json.dumps(note)})
    return sink.getvalue(), note


def _schema(schema: Any, embeddings: EmbeddingsNote | None) -> Any:
    """Return the shard's schema with TAGS in their place or at the end, without a note of tags.

    embeddings: the note about the column EMBEDDED, which there is with it alone.
    """
    for field_ in TAGS if embeddings is None else (*TAGS, EMBEDDED):
        at = schema.get_field_index(field_.name)
        schema = schema.append(field_) if at < 0 else schema.set(at, field_)
    if embeddings is None and EMBEDDED.name in schema.names:
        schema = schema.remove(schema.get_field_index(EMBEDDED.name))
    return with_note(with_note(schema, NOTE, None), EMBEDDINGS, embeddings)


def _tags(id: str, data: bytes | None, tagger: Any, note: Note) -> list[Tag]:
    try:
        if data is None:
            raise InputError("there is no picture")
        picture = read(data, name="the picture")
        tags: list[Tag] = tagger(picture.pixels)
    except (OptionError, WeightsError):
        raise  # the next one would fail as well
    except Exception as error:  # torch, codecs and models have their own ways
        note["errors"][str(id)] = reason(error)
        return []
    note["tagged"] += bool(tags)
    if notes := notes_of(picture):
        note["notes"][str(id)] = "; ".join(notes)
    return tags


def _with_tags(
    group: pa.Table, tags: list[list[Tag]], embedded: pa.Array | None, schema: Any
) -> pa.Table:
    names = pa.array([[tag.name for tag in row] for row in tags], TAGS[0].type)
    scores = pa.array([[tag.score for tag in row] for row in tags], TAGS[1].type)
    new = {"tags": names, "tag_scores": scores, EMBEDDED.name: embedded}
    columns = [new[n] if n in new else group.column(n) for n in schema.names]
    return pa.table(columns, schema=schema)
