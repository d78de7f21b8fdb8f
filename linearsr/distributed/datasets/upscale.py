"""Upscale a dataset: pictures or shards in, pictures or Parquet out.

    list names ─▶ leave out those done ─▶ actors: read ▶ upscale ▶ write ─▶ outcomes ─▶ errors

A result's name follows from its input's, so a job that is started again goes on with the rest.
Pixels never travel between processes: memory does not grow with the dataset.
"""

from __future__ import annotations

import sys
from pathlib import PurePosixPath
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field, field_validator

from linearsr.config import Acceleration, FileOptions, Options
from linearsr.distributed.datasets.resume import (
    CRASH,
    Errors,
    Failure,
    Summary,
    claim,
    progress,
)
from linearsr.distributed.models import absolute, check_model, fingerprint, load_upscaler
from linearsr.distributed.queue import Pool, map_actors
from linearsr.errors import InputError, OptionError, OutputError, StorageError, reason
from linearsr.imaging.files import WRITE_SUFFIXES, Picture, result_name
from linearsr.imaging.sources import list_inputs, open_shard, read_input
from linearsr.pipeline.codec import Encoded, upscale_encoded
from linearsr.storage.location import (
    Location,
    explained,
    is_plain,
    locate,
    part_name,
    url,
    write_table,
)
from linearsr.storage.targets import TargetCheck, check_collisions
from linearsr.storage.walk import Notes
from linearsr.tags.base import TaggerConfig

RESULTS = pa.schema(
    {"id": pa.string(), "image": pa.binary(), "width": pa.int32(), "height": pa.int32()}
)
# The longest key of an object on S3, in bytes.
KEY_BYTES = 1024


class UpscaleConfig(Pool):
    """An upscaling job. Folders are local (on storage that all nodes see) or s3://."""

    input: str
    """Folder of pictures, or of Parquet shards."""
    output: str
    """Folder for the results; it must not hold another job's results."""
    kind: Literal["images", "parquet"] = "images"
    """Kind of results: files named after their inputs, or shards with columns id, image, width and
    height."""
    column: str = "lr"
    """Column of the shards to upscale."""
    model: str = "linearsr-tiny"
    """Bundled model's name, or folder of weights."""
    device: str = "auto"
    """Device of the models; auto is the GPU that the actor has reserved, or else the CPU."""
    acceleration: Acceleration = Acceleration()
    """Ways to run the model faster on CUDA."""
    tagger: TaggerConfig = TaggerConfig()
    """Tagger of pictures with tags "auto"."""
    options: Options = Options()
    files: FileOptions = FileOptions()
    batch: int = Field(default=8, ge=1)
    """Number of pictures that an actor gets at once, and of rows per Parquet file."""
    concurrency: int = Field(default=2, ge=1)
    """Concurrent calls per actor, so that one reads or encodes while another upscales; on a GPU,
    about 8 keep it busy."""

    @field_validator("input", "output")
    @classmethod
    def _absolute(cls, path: str) -> str:
        """Make paths absolute, since workers have working folders of their own."""
        return url(locate(path))

    @field_validator("model")
    @classmethod
    def _absolute_model(cls, model: str) -> str:
        return absolute(model)

    def settings(self) -> dict[str, Any]:
        """Return all settings that the results depend on, in one flat dictionary."""
        return {
            **self.model_dump(mode="json", include={"input", "kind", "column", "model"}),
            **self.options.model_dump(mode="json"),
            **self.files.model_dump(mode="json"),
            "tagger": self.tagger.settings,
            "fp8": self.acceleration.fp8,
        }


def upscale_dataset(config: UpscaleConfig) -> Summary:
    """Upscale all pictures that have no result yet, on a running Ray cluster.

    Errors that can be found in advance are raised before any work starts: InputError, OutputError,
    OptionError or WeightsError.
    """
    source, output = locate(config.input), locate(config.output)
    if source.is_same(output):
        raise OptionError("input and output are the same folder; choose another --output")
    notes = Notes()
    inputs = list_inputs(source, config.column, without=output, notes=notes)
    check_model(config.model)  # an actor would only find out minutes later
    targets, faults = _targets(inputs, output, config)
    made_of = {"weights": fingerprint(config.model)}
    defaults = Options().model_dump(mode="json") | made_of
    defaults |= {"tagger": TaggerConfig().settings, "fp8": False}
    claim(output, config.settings() | made_of, defaults=defaults)
    notes.tell_left_out()
    todo = _todo(inputs, targets, output, config)
    todo, unwritable = _writable(todo, output) if config.kind == "images" else (todo, {})
    # No actor idles while another has a batch of several.
    batch = min(config.batch, -(-len(todo) // (config.actors * config.concurrency)) or 1)
    # Locations, not paths: an actor's node may have another S3 endpoint than the driver's.
    results = map_actors(
        todo,
        _Worker,
        (config, source, output),
        config,
        batch=batch,
        concurrency=config.concurrency,
    )
    failures = [
        *((id, Failure("list", error)) for id, error in (notes.failures | faults).items()),
        *((id, Failure("write", error)) for id, error in unwritable.items()),
    ]
    ids = {row["id"] for row in todo}
    total, failed = inputs.num_rows + len(notes.failures), len(failures)
    earlier, noted = total - failed - len(todo), 0
    with (
        Errors(output, keep=lambda row: row["id"] in ids) as errors,
        progress("upscale", total, "images", initial=earlier + failed) as bar,
    ):
        for id, failure in failures:
            errors.add(id, failure, bar)
        for row, outcome in results:
            failure = outcome or CRASH
            if failure.error:
                failed += 1
                errors.add(row["id"], failure, bar)
            else:
                errors.remove(row["id"])
            if failure.notes:
                noted += 1
                bar.write(f"{row['id']}: {'; '.join(failure.notes)}", file=sys.stderr)
            bar.update()
    return Summary(
        unit="pictures",
        verb="upscaled",
        total=total,
        earlier=earlier,
        done=total - earlier - failed,
        failed=failed,
        detail=f"{noted} with notes" if noted else "",
    )


def _targets(
    inputs: pa.Table, output: Location, config: UpscaleConfig
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the name of each result by id, and by id the reason why there can be none.

    Raises OptionError if two results cannot both be written; see `check_collisions`.
    """
    ids: list[str] = inputs.column("id").to_pylist()
    if config.kind == "parquet":
        return dict(zip(ids, ids, strict=True)), {}
    targets, faults = {}, {}
    for id in ids:
        try:
            targets[id] = target_name(id, config.files, local=output.is_local)
        except InputError as error:
            faults[id] = str(error)
    plain = ((id, target_name(id, FileOptions(), local=False)) for id in targets)
    ways = "rename one, or write Parquet (--kind parquet)"
    check_collisions(targets.items(), plain, ways, nested=not output.is_local)
    return targets, faults


def target_name(id: str, files: FileOptions, *, local: bool = True) -> str:
    """Return the path of an input's result below the output; an id without a suffix gets one.

    local: whether the output is a local folder; a key on S3 may have empty parts, which stay.

    Raises InputError for an id that points outside the output.
    """
    folder, slash, name = id.rpartition("/")
    if name in ("", ".") or ".." in id.split("/") or (local and not is_plain(id)):
        raise InputError(
            f"id {id!r} cannot be a file's name: it would lie outside the output, or replace "
            "another file; rename it, or write Parquet"
        )
    return f"{folder}{slash}{result_name(PurePosixPath(name), files.format)}"


def _todo(
    inputs: pa.Table, targets: dict[str, str], output: Location, config: UpscaleConfig
) -> list[dict[str, Any]]:
    """Return the inputs that have a target but no result yet, each with its `target`."""
    if config.kind == "parquet":
        done = _ids_in(output / "data")
    else:
        done = {file.relative_to(output) for file in output.files(Notes())}
    names = [targets.get(id) for id in inputs.column("id").to_pylist()]
    left = [name is not None and name not in done for name in names]
    inputs = inputs.append_column("target", pa.array(names, pa.string()))
    rows: list[dict[str, Any]] = inputs.filter(pa.array(left, pa.bool_())).to_pylist()
    return rows


def _writable(
    rows: list[dict[str, Any]], output: Location
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return the rows whose results can be written, and reasons by id for the others."""
    check, writable, faults = TargetCheck(), [], {}
    for row in rows:
        target = output / row["target"]
        try:
            if output.is_local:
                check.file(target.path)
            elif (size := len(target.path.partition("/")[2].encode())) > KEY_BYTES:
                raise OutputError(f"a key of {size} bytes is too long for S3; rename the picture")
            writable.append(row)
        except OutputError as error:
            faults[row["id"]] = str(error)
    return writable, faults


def _ids_in(folder: Location) -> set[str]:
    """Return the ids of all results in the folder's Parquet files."""
    done: set[str] = set()
    for file in folder.files(Notes()):
        if file.name.endswith(".parquet"):
            shard = open_shard(file, "id")
            with explained(file):
                done.update(shard.read(columns=["id"]).column("id").to_pylist())
    return done


class _Stage:
    """The stage of one picture (read, upscale, encode or write); a failure is reported with it."""

    name = "read"

    def begin(self, name: str, _: Picture) -> None:
        """Record that the picture's stage `name` begins."""
        self.name = name


class _Worker:
    """The worker of an actor: one model, and `concurrency` calls at a time that share it."""

    def __init__(self, config: UpscaleConfig, source: Location, output: Location) -> None:
        self.config, self.source, self.output = config, source, output
        reserved = "cuda" if config.gpu else "cpu"
        device = reserved if config.device == "auto" else config.device
        self.upscaler = load_upscaler(
            config.model, device, acceleration=config.acceleration, tagger=config.tagger
        )

    def __call__(self, rows: list[dict[str, Any]]) -> list[Failure]:
        """Upscale rows of `list_inputs`; return what was wrong with each, an empty error if
        nothing was. The results of a Parquet job become one file, named after the ids in it, so
        that a retry writes the same one.
        """
        outcomes, results = [], []
        for row in rows:
            stage, error = _Stage(), ""
            notes: tuple[str, ...] = ()
            try:
                if self.config.kind == "images":
                    notes = self._write_image(row, stage)
                else:
                    format = WRITE_SUFFIXES[f".{self.config.files.format or 'png'}"]
                    result = self._upscale(row, format, stage)
                    size = {"width": result.width, "height": result.height}
                    results.append({"id": row["id"], "image": result.data, **size})
                    notes = result.notes
            except (OptionError, StorageError):
                raise  # the next one would fail as well
            except Exception as failure:  # one bad picture must not end the job
                error = reason(failure)
            outcomes.append(Failure(stage.name, error, notes))
        if results:
            name = f"part-{part_name(row['id'] for row in rows)}.parquet"
            write_table(self.output / "data" / name, results, RESULTS)
        return outcomes

    def _write_image(self, row: dict[str, Any], stage: _Stage) -> tuple[str, ...]:
        target = self.output / row["target"]
        if target.is_file():  # this call is a retry: its actor died in the middle of it
            return ()
        suffix = PurePosixPath(row["target"]).suffix.lower()
        result = self._upscale(row, WRITE_SUFFIXES[suffix], stage)
        stage.name = "write"
        target.write(result.data)
        return result.notes

    def _upscale(self, row: dict[str, Any], format: str, stage: _Stage) -> Encoded:
        return upscale_encoded(
            self.upscaler,
            read_input(self.source, row, self.config.column),
            self.config.options,
            self.config.files,
            format=format,
            name=row["id"],
            on_stage=stage.begin,
        )
