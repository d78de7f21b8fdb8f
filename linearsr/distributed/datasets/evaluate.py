"""An evaluation by Ray Data: the same pictures, judge and report as `linearsr evaluate`, spread.

    names ─▶ actors: read ▶ every method ▶ every metric ─▶ rows of numbers ─▶ parts ─▶ the report

Pixels never travel, but for the contact sheet's few details. Finished pictures are kept in
OUTPUT/parts-* until all are through, so a job that is started again, killed or with pictures that
failed, goes on with the rest.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from linearsr.distributed.logs import last_line
from linearsr.distributed.models import absolute, check_model, load_upscaler
from linearsr.distributed.queue import LOST, Pool, pooled
from linearsr.errors import InputError, LinearSRError, one_line
from linearsr.evaluation.checkpoint import Checkpoint, is_checkpoint
from linearsr.evaluation.config import Item, Score, Settings
from linearsr.evaluation.judge import Judge
from linearsr.evaluation.report import Report
from linearsr.evaluation.run import Plan, Request, Seen, finish, plan
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

# Pictures between two parts: what a killed job judges anew.
SAVE_EVERY = 20
# A picture's scores as JSON, in which floats stay exactly what they are.
ROWS = pa.schema({"id": pa.string(), "scores": pa.string()})


class EvaluationConfig(Pool):
    """One job. Folders are local (on storage that all nodes see) or s3://.

    actors: models at work, each with `actor_cpus` logical CPUs and, with `gpu`, one GPU. Metrics
    are on the CPU in any case. device: where models run; "auto" is the GPU that the actor has
    reserved, else the CPU.
    """

    request: Request
    output: str
    device: str = "auto"

    @property
    def models_on(self) -> str:
        """The device, chosen."""
        return ("cuda" if self.gpu else "cpu") if self.device == "auto" else self.device


def evaluate(config: EvaluationConfig) -> Report:
    """Judge every picture and write OUTPUT/metrics.parquet, contact.jpg and report.md.

    On a running Ray. Raises OptionError, WeightsError, InputError or OutputError before any work
    for what can be known by then; pictures that fail are in the report.
    """
    made = plan(_absolute(config.request), list_pictures)
    output = locate(config.output)
    check_writable(output)
    for model in made.settings.models.values():  # what only an actor would find out, minutes later
        _check(model)
    parts = output / f"parts-{_fingerprint(config, made.settings)}"
    scores = _scores(made, config, parts)
    report = finish(
        made,
        scores,
        lambda items: _look(made.settings, items, config),
        lambda name, data: (output / name).write(data),
    )
    if not any(score.failed for score in scores):  # else the next try needs only those
        parts.delete()
    return report


def _absolute(request: Request) -> Request:
    """Workers have working folders of their own."""
    models = {
        name: url(locate(model)) if is_checkpoint(model) else absolute(model)
        for name, model in request.models.items()
    }
    return request.model_copy(update={"models": models})


def _check(model: str) -> None:
    """Raise WeightsError for what is no model, and MissingExtra for a package that it needs."""
    if is_checkpoint(model):  # small enough to be loaded where the job begins
        _load(model, "cpu")
    else:
        check_model(model)


def _load(model: str, device: str) -> Upscaler | Checkpoint:
    """A model of `_check`, local or s3://. Raises WeightsError."""
    if not is_checkpoint(model):
        return load_upscaler(model, device)
    if not model.startswith("s3://"):
        return Checkpoint.load(model, device)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, locate(model).name)
        file.write_bytes(locate(model).read())
        return Checkpoint.load(file, device)


def _fingerprint(config: EvaluationConfig, settings: Settings) -> str:
    """Of all that decides the numbers: other parts than these must not be reused."""
    request = config.request
    places = [url(locate(p)) for p in (request.hr, *request.results.values()) if p]
    told = [settings.model_dump_json(), request.lr, places, conventions(), config.models_on]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]


def _scores(made: Plan, config: EvaluationConfig, parts: Location) -> list[Score]:
    """Of earlier parts and of what they lack."""
    done = dict(_read_parts(parts))
    wanted = {item.id for item in made.items}
    scores = [score for id, found in done.items() if id in wanted for score in found]
    todo = [item for item in made.items if item.id not in done]
    judged = pooled(todo, _Worker, (made.settings, config), config)
    kept: list[list[Score]] = []
    try:
        for item, result in tqdm(judged, total=len(todo), unit="picture", desc="evaluate"):
            found = result or [Score(item.id, "", "", None, LOST)]
            scores += found
            if not any(score.failed for score in found):  # a failure is tried again
                kept.append(found)
            if len(kept) >= SAVE_EVERY:
                _write_part(parts, kept)
                kept = []
    finally:  # whatever ended the job, what is known by then is kept
        _write_part(parts, kept)
    return scores


def _read_parts(parts: Location) -> Iterator[tuple[str, list[Score]]]:
    """Raises InputError for what this job has not written."""
    for file in parts.files():
        try:
            rows = pq.read_table(pa.BufferReader(file.read()), schema=ROWS).to_pylist()
            found = [(r["id"], [Score(*s) for s in json.loads(r["scores"])]) for r in rows]
        except (ValueError, TypeError, pa.ArrowException) as error:
            raise InputError(
                f"{url(file)}: no scores of an earlier run ({one_line(error)}); delete it"
            ) from error
        yield from found


def _write_part(parts: Location, pictures: list[list[Score]]) -> None:
    if not pictures:
        return
    rows = [{"id": scores[0].id, "scores": json.dumps(scores)} for scores in pictures]
    write_table(parts / f"{part_name(row['id'] for row in rows)}.parquet", rows, ROWS)


def _judge(settings: Settings, config: EvaluationConfig) -> Judge:
    torch.set_num_threads(max(1, int(config.actor_cpus)))
    return Judge(settings, read_source, lambda model: _load(model, config.models_on))


class _Worker:
    """The actor: models and metrics, loaded once."""

    def __init__(self, settings: Settings, config: EvaluationConfig) -> None:
        self.judge = _judge(settings, config)

    def __call__(self, items: list[Item]) -> list[list[Score]]:
        """Pictures in, the scores of each out."""
        return [self.judge.scores(item) for item in items]


def _look(settings: Settings, items: Sequence[Item], config: EvaluationConfig) -> Seen:
    """The models and examples, from one task with an actor's resources."""
    import ray

    task = ray.remote(num_cpus=config.actor_cpus, num_gpus=1 if config.gpu else 0)(_seen)
    try:
        seen: Seen = ray.get(task.remote(settings, items, config))
    except ray.exceptions.RayError as error:
        raise LinearSRError(f"the contact sheet failed: {last_line(error)}") from error
    return seen


def _seen(settings: Settings, items: Sequence[Item], config: EvaluationConfig) -> Seen:
    judge = _judge(settings, config)
    return Seen(judge.describe(), [judge.example(item) for item in items])
