"""Upscale a dataset: pictures or shards in, pictures or Parquet out.

    list names ─▶ leave out those done ─▶ actors: read ▶ upscale ▶ write ─▶ outcomes ─▶ errors

A result's name follows from its input's, so a job that is started again goes on with the rest.
Pixels never travel between processes: memory does not grow with the dataset.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field, field_validator

from linearsr.config import FileOptions, Options
from linearsr.distributed.datasets.resume import (
    CRASH,
    Errors,
    Failure,
    Summary,
    claim,
    progress,
)
from linearsr.distributed.models import absolute, check_model, load_upscaler
from linearsr.distributed.queue import Pool, map_actors
from linearsr.errors import InputError, OptionError, StorageError, reason
from linearsr.imaging.files import READ_SUFFIXES, WRITE_SUFFIXES, Picture, result_name
from linearsr.imaging.sources import list_inputs, open_shard, read_input
from linearsr.pipeline.codec import Encoded, upscale_encoded
from linearsr.storage.location import Location, explained, locate, part_name, url, write_table

RESULTS = pa.schema(
    {"id": pa.string(), "image": pa.binary(), "width": pa.int32(), "height": pa.int32()}
)


class UpscaleConfig(Pool):
    """An upscaling job. Folders are local (on storage that all nodes see) or s3://."""

    input: str
    """Folder of pictures, or of Parquet shards."""
    output: str
    """Folder for the results, which must not hold those of another job."""
    kind: Literal["images", "parquet"] = "images"
    """Kind of results: files named after their inputs, or shards with columns id, image, width and
    height."""
    column: str = "lr"
    """Column of the shards to upscale."""
    model: str = "linearsr-tiny"
    """Bundled model's name, or folder of weights."""
    device: str = "auto"
    """Device of the models; auto is the GPU that the actor has reserved, or else the CPU."""
    compile: bool = False
    """Compile the model on CUDA, which pays for many pictures of one size."""
    options: Options = Options()
    files: FileOptions = FileOptions()
    batch: int = Field(default=8, ge=1)
    """Number of pictures per call, and of rows per Parquet file."""
    concurrency: int = Field(default=2, ge=1)
    """Concurrent calls per actor, about 8 on a GPU; one reads or encodes while another upscales,
    so that the device is never idle."""

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
        }


def upscale_dataset(config: UpscaleConfig) -> Summary:
    """Upscale all pictures that have no result yet, on a running Ray.

    Raises InputError, OutputError, OptionError or WeightsError before any work for everything that
    can be known by then.
    """
    source, output = locate(config.input), locate(config.output)
    if source.path == output.path:
        raise OptionError("input and output are the same folder; choose another --output")
    inputs = list_inputs(source, config.column, without=output)
    check_model(config.model)  # an actor would only find out minutes later
    claim(output, config.settings(), defaults=Options().model_dump(mode="json"))
    todo = _todo(inputs, output, config)
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
    ids = {row["id"] for row in todo}
    failed = 0
    with (
        Errors(output, keep=lambda row: row["id"] in ids) as errors,
        progress("upscale", inputs.num_rows, "images", initial=inputs.num_rows - len(todo)) as bar,
    ):
        for row, outcome in results:
            failure = outcome or CRASH
            if failure.error:
                failed += 1
                errors.add(row["id"], failure, bar)
            else:
                errors.remove(row["id"])
            bar.update()
    return Summary(
        unit="pictures",
        verb="upscaled",
        total=inputs.num_rows,
        earlier=inputs.num_rows - len(todo),
        done=len(todo) - failed,
        failed=failed,
    )


def _todo(inputs: pa.Table, output: Location, config: UpscaleConfig) -> list[dict[str, Any]]:
    """Return the inputs that have no result, each with the name of its `target`."""
    ids = inputs.column("id").to_pylist()
    if config.kind == "parquet":
        targets, done = ids, _ids_in(output / "data")
    else:
        targets = [target_name(id, config.files) for id in ids]
        taken: dict[str, str] = {}
        for id, target in zip(ids, targets, strict=True):
            if target in taken:
                raise OptionError(
                    f"{taken[target]} and {id} would both become {target}; leave out --format, "
                    "or write Parquet"
                )
            taken[target] = id
        done = {file.relative_to(output) for file in output.files()}
    inputs = inputs.append_column("target", pa.array(targets, pa.string()))
    left = inputs.filter(pa.array([target not in done for target in targets], pa.bool_()))
    rows: list[dict[str, Any]] = left.to_pylist()
    return rows


def target_name(id: str, files: FileOptions) -> str:
    """Return the path of an input's result below the output; an id without a suffix gets one.

    Raises InputError for an id that points outside the output.
    """
    path = PurePosixPath(id)
    if path.is_absolute() or ".." in path.parts or not path.name:
        raise InputError(f"id {id!r} cannot be a file's name: it would lie outside the output")
    if path.suffix.lower() not in READ_SUFFIXES:
        path = path.with_name(f"{path.name}.png")
    return str(result_name(path, files.format))


def _ids_in(folder: Location) -> set[str]:
    """Return the ids of all results in the folder's Parquet files."""
    done: set[str] = set()
    for file in folder.files():
        if file.name.endswith(".parquet"):
            shard = open_shard(file, "id")
            with explained(file):
                done.update(shard.read(columns=["id"]).column("id").to_pylist())
    return done


class _Stage:
    """The stage that a picture is at, for the error that it may end in."""

    name = "read"

    def begin(self, name: str, _: Picture) -> None:
        """Note that the picture's next stage begins."""
        self.name = name


class _Worker:
    """The worker of an actor: one model, and `concurrency` calls at a time that share it."""

    def __init__(self, config: UpscaleConfig, source: Location, output: Location) -> None:
        self.config, self.source, self.output = config, source, output
        reserved = "cuda" if config.gpu else "cpu"
        device = reserved if config.device == "auto" else config.device
        self.upscaler = load_upscaler(config.model, device, compiled=config.compile)

    def __call__(self, rows: list[dict[str, Any]]) -> list[Failure]:
        """Upscale rows of `list_inputs`; return what was wrong with each, an empty error if
        nothing was. The results of a Parquet job become one file, named after the ids in it, so
        that a retry writes the same one.
        """
        outcomes, results = [], []
        for row in rows:
            stage, error = _Stage(), ""
            try:
                if self.config.kind == "images":
                    self._write_image(row, stage)
                else:
                    format = WRITE_SUFFIXES[f".{self.config.files.format or 'png'}"]
                    result = self._upscale(row, format, stage)
                    size = {"width": result.width, "height": result.height}
                    results.append({"id": row["id"], "image": result.data, **size})
            except (OptionError, StorageError):
                raise  # the next one would fail as well
            except Exception as failure:  # one bad picture must not end the job
                error = reason(failure)
            outcomes.append(Failure(stage.name, error))
        if results:
            name = f"part-{part_name(row['id'] for row in rows)}.parquet"
            write_table(self.output / "data" / name, results, RESULTS)
        return outcomes

    def _write_image(self, row: dict[str, Any], stage: _Stage) -> None:
        target = self.output / row["target"]
        if target.exists():  # this call is a retry: its actor died in the middle of it
            return
        suffix = PurePosixPath(row["target"]).suffix.lower()
        result = self._upscale(row, WRITE_SUFFIXES[suffix], stage)
        stage.name = "write"
        target.write(result.data)

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
