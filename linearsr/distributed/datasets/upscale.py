"""A whole dataset upscaled by Ray Data: pictures or shards in, pictures or Parquet out.

    list names ─▶ leave out what is done ─▶ actors: read ▶ upscale ▶ write ─▶ a row each ─▶ errors

The output is the job's checkpoint: a result appears complete, under a name that its input alone
decides, so what is there is done, and a killed job goes on when it is started again. Pixels never
travel between processes: memory does not grow with the dataset.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, field_validator
from tqdm import tqdm

from linearsr.config import FileOptions, Options
from linearsr.distributed.models import absolute, check_model, load_upscaler
from linearsr.distributed.queue import LOST, Pool, pooled
from linearsr.errors import InputError, LinearSRError, OptionError, StorageError, one_line
from linearsr.imaging.files import READ_SUFFIXES, WRITE_SUFFIXES, encode, read, result_name
from linearsr.imaging.sources import list_inputs, open_shard, read_input
from linearsr.storage.location import (
    Location,
    check_writable,
    explained,
    locate,
    part_name,
    url,
    write_table,
)

# Errors between two savings of their list.
SAVE_EVERY = 100
ERRORS = pa.schema({"id": pa.string(), "stage": pa.string(), "error": pa.string()})
RESULTS = pa.schema(
    {"id": pa.string(), "image": pa.binary(), "width": pa.int32(), "height": pa.int32()}
)


class UpscaleConfig(Pool):
    """One job. Paths are local (on storage that all nodes see) or s3://."""

    input: str
    """A folder of pictures, or of Parquet shards."""
    output: str
    """A folder of its own."""
    kind: Literal["images", "parquet"] = "images"
    """Under the names of their inputs, or with columns id, image, width and height."""
    column: str = "lr"
    """The column of shards to upscale."""
    model: str = "linearsr-tiny"
    """A bundled model's name or a folder."""
    device: str = "auto"
    """Where models run; "auto" is the GPU that the actor has reserved, else the CPU."""
    compile: bool = False
    """On CUDA, for many pictures of one size."""
    options: Options = Options()
    files: FileOptions = FileOptions()
    batch: int = Field(default=8, ge=1)
    """Pictures of one call, and rows of one Parquet file."""
    hands: int = Field(default=2, ge=1)
    """Calls that each actor has under way, so that reading and encoding of one overlap the
    upscaling of another."""

    @field_validator("input", "output")
    @classmethod
    def _absolute(cls, path: str) -> str:
        """Workers have working folders of their own."""
        return url(locate(path))

    @field_validator("model")
    @classmethod
    def _absolute_model(cls, model: str) -> str:
        return absolute(model)


# What decides the results: jobs that differ here must not share an output.
_SAME = {"input", "kind", "column", "model", "options", "files"}


@dataclass(frozen=True)
class Summary:
    """How a job ended: of `inputs`, `earlier` were done before it, `done` now; `failed` are not."""

    inputs: int
    earlier: int
    done: int
    failed: int

    def __str__(self) -> str:
        earlier = f", {self.earlier} done earlier" if self.earlier else ""
        return f"{self.inputs} pictures: {self.done} upscaled{earlier}, {self.failed} failed"


def upscale_dataset(config: UpscaleConfig) -> Summary:
    """Upscale what has no result yet, on a running Ray.

    A picture that fails gets a row in OUTPUT/errors/errors.parquet (id, stage, error) and is tried
    again when the job is. Raises InputError, OutputError, OptionError or WeightsError before any
    work for what can be known by then.
    """
    source, output = locate(config.input), locate(config.output)
    if source.path == output.path:
        raise OptionError("input and output are the same folder; choose another output")
    inputs = list_inputs(source, config.column, without=output)
    # What only an actor would find out, minutes later.
    check_model(config.model)
    _claim(output, config)
    todo = _todo(inputs, output, config)
    # Locations, not paths: an S3 endpoint is the driver's, not that of where an actor runs.
    places = (config, source, output)
    # No actor idles while another has a batch of several.
    batch = min(config.batch, -(-len(todo) // (config.actors * config.hands)) or 1)
    results = pooled(todo, _Worker, places, config, batch=batch, hands=config.hands)
    errors = _Errors(output / "errors" / "errors.parquet", {row["id"] for row in todo})
    try:
        for id, failure in _progress(results, len(todo)):
            errors.note(id, failure)
    finally:  # whatever ended the job, what is known by then is kept
        errors.write()
    failed, earlier = len(errors.rows), inputs.num_rows - len(todo)
    return Summary(inputs.num_rows, earlier, len(todo) - failed, failed)


def _claim(output: Location, config: UpscaleConfig) -> None:
    """Write down what the folder's results are, or check that they are the same."""
    settings = config.model_dump(mode="json", include=_SAME)
    note = output / "job.json"
    check_writable(output)
    if not note.exists():
        note.write(json.dumps(settings, indent=1).encode())
        return
    try:
        before = json.loads(note.read())
    except ValueError as error:
        raise OptionError(f"{note.path}: not a job's settings; choose another output") from error
    # An option that an earlier version did not have is at its default there.
    defaults = {"options": Options().model_dump(mode="json")}
    now, then = _flat(settings), _flat(defaults) | _flat(before)
    other = [f"{k} ({then.get(k)}, now {now[k]})" for k in now if then.get(k) != now[k]]
    if other:
        raise OptionError(
            f"{url(output)}: holds results of other {', '.join(other)}; choose another output, or "
            "delete that one"
        )


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Options and file options beside the other settings."""
    flat = {k: v for k, v in settings.items() if not isinstance(v, dict)}
    for inner in (v for v in settings.values() if isinstance(v, dict)):
        flat |= inner
    return flat


def _todo(inputs: pa.Table, output: Location, config: UpscaleConfig) -> list[dict[str, Any]]:
    """The inputs that have no result, each with the `target` it gets."""
    ids = inputs.column("id").to_pylist()
    if config.kind == "parquet":
        targets, done = ids, _ids_in(output / "data")
    else:
        targets = [target_name(id, config.files) for id in ids]
        _check_unique(ids, targets)
        done = {file.relative_to(output) for file in output.files()}
    inputs = inputs.append_column("target", pa.array(targets, pa.string()))
    left = inputs.filter(pa.array([target not in done for target in targets], pa.bool_()))
    rows: list[dict[str, Any]] = left.to_pylist()
    return rows


def target_name(id: str, files: FileOptions) -> str:
    """The path below the output of an input's result; ids without a picture's suffix get one.

    Raises InputError for an id that points outside the output.
    """
    path = PurePosixPath(id)
    if path.is_absolute() or ".." in path.parts or not path.name:
        raise InputError(f"id {id!r} cannot be a file's name: it would lie outside the output")
    if path.suffix.lower() not in READ_SUFFIXES:
        path = path.with_name(f"{path.name}.png")
    return str(result_name(path, files.format))


def _check_unique(ids: list[str], targets: list[str]) -> None:
    taken: dict[str, str] = {}
    for id, target in zip(ids, targets, strict=True):
        if target in taken:
            raise OptionError(
                f"{taken[target]} and {id} would both become {target}; leave out --format, "
                "or write Parquet"
            )
        taken[target] = id


def _ids_in(folder: Location) -> set[str]:
    """Ids of all results in Parquet files."""
    done: set[str] = set()
    for file in folder.files():
        if file.name.endswith(".parquet"):
            shard = open_shard(file, "id")
            with explained(file):
                done.update(shard.read(columns=["id"]).column("id").to_pylist())
    return done


def _progress(
    results: Iterator[tuple[dict[str, Any], _Failure | None]], total: int
) -> Iterator[tuple[str, _Failure]]:
    """Ids with what was wrong, if anything; under a bar with images/s, time left and errors."""
    failed = 0
    with tqdm(total=total, unit="image", desc="upscale", mininterval=1) as bar:
        for row, outcome in results:
            failure = outcome or LOST_WORKER
            if failure.error:
                failed += 1
                bar.write(f"{row['id']}: {failure.stage}: {failure.error}", file=sys.stderr)
            bar.set_postfix(errors=failed, refresh=False)
            bar.update()
            yield row["id"], failure


class _Errors:
    """The list of what failed: of earlier runs too, for pictures that this one has not reached."""

    def __init__(self, file: Location, todo: set[str]) -> None:
        self.file = file
        before = pq.read_table(pa.BufferReader(file.read())).to_pylist() if file.exists() else []
        self.rows = {row["id"]: row for row in before if row["id"] in todo}
        self.unsaved = 0

    def note(self, id: str, failure: _Failure) -> None:
        """How a picture ended; saved at times, as a killed job cannot."""
        self.rows.pop(id, None)
        if failure.error:
            self.rows[id] = {"id": id, **failure._asdict()}
            self.unsaved += 1
        if self.unsaved >= SAVE_EVERY:
            self.write()

    def write(self) -> None:
        """The file, or none when there is nothing in it."""
        self.unsaved = 0
        if self.rows:
            write_table(self.file, list(self.rows.values()), ERRORS)
        else:
            self.file.delete_file()


class _Failure(NamedTuple):
    """What was wrong with a picture, and at which stage; an empty error when nothing was."""

    stage: str
    error: str


LOST_WORKER = _Failure("lost", LOST)


class _Result(NamedTuple):
    """An upscaled picture as a file's bytes."""

    image: bytes
    width: int
    height: int


class _Worker:
    """The actor: one model, and `hands` calls at a time that take turns with it."""

    def __init__(self, config: UpscaleConfig, source: Location, output: Location) -> None:
        self.config, self.source, self.output = config, source, output
        reserved = "cuda" if config.gpu else "cpu"
        device = reserved if config.device == "auto" else config.device
        self.upscaler = load_upscaler(config.model, device, compiled=config.compile)

    def __call__(self, rows: list[dict[str, Any]]) -> list[_Failure]:
        """Names in, outcomes out."""
        return self._to_images(rows) if self.config.kind == "images" else self._to_parquet(rows)

    def _to_images(self, rows: list[dict[str, Any]]) -> list[_Failure]:
        return [self._guarded(row, self._to_image) for row in rows]

    def _to_image(self, row: dict[str, Any], stage: _Stage) -> None:
        target = self.output / row["target"]
        if target.exists():  # this call is a retry: its actor died in the middle of it
            return
        suffix = PurePosixPath(row["target"]).suffix.lower()
        result = self._upscaled(row, WRITE_SUFFIXES[suffix], stage)
        stage.name = "write"
        target.write(result.image)

    def _to_parquet(self, rows: list[dict[str, Any]]) -> list[_Failure]:
        """One file for the batch, named after what is in it: a retry writes the same one."""
        results: list[dict[str, Any]] = []
        format = WRITE_SUFFIXES[f".{self.config.files.format or 'png'}"]

        def keep(row: dict[str, Any], stage: _Stage) -> None:
            results.append({"id": row["id"], **self._upscaled(row, format, stage)._asdict()})

        told = [self._guarded(row, keep) for row in rows]
        if results:
            name = f"part-{part_name(row['id'] for row in rows)}.parquet"
            write_table(self.output / "data" / name, results, RESULTS)
        return told

    def _upscaled(self, row: dict[str, Any], format: str, stage: _Stage) -> _Result:
        options, files = self.config.options, self.config.files
        data = read_input(self.source, row, self.config.column)
        picture = read(data, max_pixels=files.max_pixels, name=row["id"])
        stage.name = "upscale"
        options = self.upscaler.with_tags(picture, options)
        result = self.upscaler.upscale(picture, options)
        stage.name = "encode"
        provenance = self.upscaler.describe(options)
        image = encode(result, format, quality=files.quality, provenance=provenance)
        height, width = result.pixels.shape[-2:]
        return _Result(image, width, height)

    def _guarded(
        self, row: dict[str, Any], work: Callable[[dict[str, Any], _Stage], None]
    ) -> _Failure:
        """One bad picture must not end the job; what is wrong with all of them does."""
        stage, error = _Stage(), ""
        try:
            work(row, stage)
        except (OptionError, StorageError):
            raise  # the next one would fail as well
        except LinearSRError as failure:
            error = one_line(failure)
        except Exception as failure:
            error = f"{type(failure).__name__}: {one_line(failure)}"
        return _Failure(stage.name, error)


class _Stage:
    """Where a picture is, for the error it may end in."""

    name = "read"
