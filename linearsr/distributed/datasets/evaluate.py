"""Evaluate on a cluster, with the pictures, the judge and the report of `linearsr evaluate`.

    names ─▶ actors: read ▶ every method ▶ every metric ─▶ scores ─▶ parts ─▶ the report

Pixels do not travel, except for the few details of the contact sheet. Scores are kept in
OUTPUT/parts-* until all pictures have them, so a job that is started again goes on with the
pictures that are left or failed.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from linearsr.distributed.datasets.resume import Errors, Failure, digest, progress
from linearsr.distributed.models import absolute, check_model, load_upscaler
from linearsr.distributed.queue import CRASHED, Pool, map_actors
from linearsr.errors import InputError, LinearSRError, one_line
from linearsr.evaluation.checkpoint import Checkpoint, is_checkpoint
from linearsr.evaluation.config import Item, Score, Settings
from linearsr.evaluation.judge import Judge
from linearsr.evaluation.report import Report
from linearsr.evaluation.run import Evaluation, ModelViews, Request, finish, plan
from linearsr.evaluation.sources import list_pictures, read_source
from linearsr.metrics.measure import conventions
from linearsr.pipeline.upscaler import Upscaler
from linearsr.storage.location import (
    Location,
    check_writable,
    locate,
    part_name,
    url,
    write_table,
)

# Pictures in a part: as many are judged again after the driver was killed.
PART_SIZE = 20
# A picture's scores as JSON, in which floats stay exactly what they are.
PART = pa.schema({"id": pa.string(), "scores": pa.string()})


class EvaluationConfig(Pool):
    """An evaluation job. Folders are local (on storage that all nodes see) or s3://.

    Metrics are computed on the CPU in any case.
    """

    request: Request
    """Pictures, models and metrics of the evaluation."""
    output: str
    """Folder of the report."""
    device: str = "auto"
    """Device of the models; auto is the GPU that the actor has reserved, or else the CPU."""

    @property
    def model_device(self) -> str:
        """The device that the models run on: `device`, with "auto" replaced by cuda or cpu."""
        return ("cuda" if self.gpu else "cpu") if self.device == "auto" else self.device


def evaluate(config: EvaluationConfig) -> Report:
    """Judge every picture on a running Ray cluster; write metrics.parquet, contact.jpg, report.md.

    Return the report, which lists the pictures that failed. Errors that can be found in advance are
    raised before any work starts: OptionError, WeightsError, InputError or OutputError.
    """
    planned = plan(_absolute(config.request), list_pictures)
    output = locate(config.output)
    check_writable(output)
    for model in planned.settings.models.values():  # an actor would only find out minutes later
        _check(model)
    parts = output / f"parts-{_fingerprint(config, planned.settings)}"
    scores = _scores(planned, config, parts)
    with Errors(output, keep=lambda _: False) as errors:
        for score in scores:
            if score.failed:
                errors.add(score.id, Failure("evaluate", f"{score.method} {score.error}".strip()))
    report = finish(
        planned,
        scores,
        lambda items: _examples(planned.settings, items, config),
        lambda name, data: (output / name).write(data),
    )
    if not errors.rows:  # otherwise the next run needs the scores that there are
        parts.delete()
    return report


def _absolute(request: Request) -> Request:
    """Make the paths of models absolute, since workers have working folders of their own."""
    models = {
        name: url(locate(model)) if is_checkpoint(model) else absolute(model)
        for name, model in request.models.items()
    }
    return request.model_copy(update={"models": models})


def _check(model: str) -> None:
    """Raise WeightsError for a path without a model, MissingExtra for a package that it needs."""
    if is_checkpoint(model):  # small enough to be loaded by the driver
        _load(model, "cpu")
    else:
        check_model(model)


def _load(model: str, device: str) -> Upscaler | Checkpoint:
    """Load a model that `_check` accepts, local or s3://. Raises WeightsError."""
    if not is_checkpoint(model):
        return load_upscaler(model, device)
    if not model.startswith("s3://"):
        return Checkpoint.load(model, device)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, locate(model).name)
        file.write_bytes(locate(model).read())
        return Checkpoint.load(file, device)


def _fingerprint(config: EvaluationConfig, settings: Settings) -> str:
    """Return a digest of everything that decides the scores."""
    request = config.request
    folders = [url(locate(p)) for p in (request.hr, *request.results.values()) if p]
    fields = settings.model_dump_json()
    return digest([fields, request.lr, folders, conventions(), config.model_device])


def _scores(planned: Evaluation, config: EvaluationConfig, parts: Location) -> list[Score]:
    """Return the scores of all pictures: those of earlier runs, and those judged now."""
    done = dict(_read_parts(parts))
    wanted = {item.id for item in planned.items}
    scores = [score for id, saved in done.items() if id in wanted for score in saved]
    todo = [item for item in planned.items if item.id not in done]
    results = map_actors(todo, _Worker, (planned.settings, config), config)
    total, unsaved = len(planned.items), []
    try:
        with progress("evaluate", total, "pictures", initial=total - len(todo)) as bar:
            for item, result in results:
                judged: list[Score] = result or [Score(item.id, "", "", None, CRASHED)]
                scores += judged
                if not any(score.failed for score in judged):  # a failure is tried again
                    unsaved.append(judged)
                if len(unsaved) >= PART_SIZE:
                    _write_part(parts, unsaved)
                    unsaved = []
                bar.update()
    finally:  # whatever ended the job
        _write_part(parts, unsaved)
    return scores


def _read_parts(parts: Location) -> Iterator[tuple[str, list[Score]]]:
    """Yield ids and scores. Raises InputError for a file that no earlier run can have written."""
    for file in parts.files():
        try:
            rows = pq.read_table(pa.BufferReader(file.read()), schema=PART).to_pylist()
            saved = [(r["id"], [Score(*s) for s in json.loads(r["scores"])]) for r in rows]
        except (ValueError, TypeError, pa.ArrowException) as error:
            raise InputError(
                f"{url(file)}: cannot be read as the scores of an earlier run ({one_line(error)}); "
                "delete it"
            ) from error
        yield from saved


def _write_part(parts: Location, pictures: list[list[Score]]) -> None:
    if pictures:
        rows = [{"id": scores[0].id, "scores": json.dumps(scores)} for scores in pictures]
        write_table(parts / f"{part_name(row['id'] for row in rows)}.parquet", rows, PART)


class _Worker:
    """The worker of an actor: models and metrics, loaded once."""

    def __init__(self, settings: Settings, config: EvaluationConfig) -> None:
        torch.set_num_threads(max(1, int(config.actor_cpus)))
        self.judge = Judge(settings, read_source, lambda model: _load(model, config.model_device))

    def __call__(self, items: list[Item]) -> list[list[Score]]:
        """Return the scores of each picture."""
        return [self.judge.scores(item) for item in items]


class _ExampleWorker(_Worker):
    """Describes the models and cuts the examples of the contact sheet."""

    def __call__(self, lists: list[Sequence[Item]]) -> list[ModelViews]:  # type: ignore[override]
        """Return the descriptions and examples for each list of pictures."""
        return [
            ModelViews(self.judge.describe(), [self.judge.example(item) for item in items])
            for items in lists
        ]


def _examples(settings: Settings, items: Sequence[Item], config: EvaluationConfig) -> ModelViews:
    """Return the models' descriptions and the examples, from one actor."""
    pool = config.model_copy(update={"actors": 1})
    ((_, result),) = map_actors([items], _ExampleWorker, (settings, config), pool)
    if result is None:
        raise LinearSRError(f"the contact sheet failed: {CRASHED}")
    examples: ModelViews = result
    return examples
