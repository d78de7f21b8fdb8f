"""From the request for an evaluation to its report; the caller judges the pictures in between.

plan(request) -> Evaluation    list, pair and check
Judge.scores(item)             for each picture, here or on a cluster
finish(evaluation, scores)     write metrics.parquet, contact.jpg and report.md
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field

from linearsr.config import Config, Solver
from linearsr.errors import OptionError
from linearsr.evaluation import report as reports
from linearsr.evaluation.config import Item, Score, Settings, Steps
from linearsr.evaluation.judge import DEGRADATIONS, Example
from linearsr.evaluation.pairs import Listing, Pairs, pair
from linearsr.evaluation.report import Report
from linearsr.metrics import measure as metrics
from linearsr.storage.walk import Notes


class Request(Config):
    """The request of a command line. Folders hold pictures or Parquet shards."""

    hr: str | None = None
    """Folder of the true pictures."""
    lr: str | None = None
    """Folder of LR pictures, or a name of DEGRADATIONS; None means the column of the shards, or
    else "clean"."""
    results: dict[str, str] = Field(default_factory=dict)
    """Folders of finished pictures by their names in tables."""
    models: dict[str, str] = Field(default_factory=dict)
    """Models by their names in tables."""
    steps: Steps = (1, 2)
    """Numbers of steps to try on each model."""
    solvers: tuple[Solver, ...] = ()
    """Solvers to try on each model; none means the model's own."""
    metrics: tuple[str, ...] | None = None
    """Metrics to measure; None means the default ones."""
    scale: Literal[2, 3, 4] = 4
    """Scale from LR to HR."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed for the models' noise."""
    every: int = Field(default=1, ge=1)
    """N to evaluate only every N-th picture."""
    rank: str | None = None
    """Metric that orders the contact sheet; None means the first one."""
    examples: int = Field(default=3, ge=1)
    """Number of best, and of worst, pictures on the contact sheet."""


@dataclass(frozen=True)
class Evaluation:
    """A checked request: the pictures to judge, and all that is known before they are read.

    alone: why a picture is left out, by its name. skipped: why a metric is, by its name.
    """

    title: str
    settings: Settings
    items: Sequence[Item]
    alone: Mapping[str, str]
    skipped: Mapping[str, str]
    rank: str | None
    examples: int


class ModelViews(NamedTuple):
    """Descriptions of the models, and examples: only a process with loaded models makes them."""

    models: dict[str, str]
    examples: list[Example]


def plan(request: Request, list_pictures: Callable[..., Listing]) -> Evaluation:
    """List and pair the pictures, check the request, and return both as an Evaluation.

    list_pictures(folder, *columns, notes=notes): returns pictures by id; in shards, those of the
    first column that is there. Failures of `notes` are among the pictures that are left out, and
    the rest of it is printed.
    Raises OptionError for unknown metrics or degradations and for a request without pictures,
    InputError for folders without pictures.
    """
    wanted = tuple(dict.fromkeys(request.metrics or metrics.default_names()))
    metrics.check_names(wanted)
    if request.rank and request.rank not in wanted:
        raise OptionError(
            f"--rank {request.rank}: this metric is not measured; add it to --metrics"
        )
    notes = Notes()
    list_pictures = partial(list_pictures, notes=notes)
    hr = list_pictures(request.hr, "hr") if request.hr else {}
    degradation, lr = _low(request, hr, list_pictures)
    # The shards that upscale_dataset writes have a column "image".
    listed = request.results.items()
    results = {name: list_pictures(folder, "hr", "image") for name, folder in listed}
    notes.tell_left_out()
    if not (hr or lr or results):
        raise OptionError(
            "there is nothing to evaluate; give --hr, --lr, --results or a folder of finished "
            "pictures"
        )
    items, alone = pair(hr, lr, results) if hr or lr or any(results.values()) else Pairs([], {})
    alone = {**notes.failures, **alone}
    skipped = _skipped(wanted, referenced=bool(hr), chosen=request.metrics is not None)
    settings = Settings(
        scale=request.scale,
        degradation=degradation,
        models=request.models,
        steps=request.steps,
        solvers=request.solvers,
        seed=request.seed,
        metrics=tuple(name for name in wanted if name not in skipped),
    )
    title = Path(request.hr or request.lr or next(iter(request.results.values()))).name
    rank = request.rank if request.rank not in skipped else None
    return Evaluation(
        title,
        settings,
        items[:: request.every],
        alone,
        skipped,
        rank,
        request.examples,
    )


def _low(
    request: Request, hr: Listing, list_pictures: Callable[..., Listing]
) -> tuple[str | None, Listing]:
    """The name of the degradation that makes LR, or the LR pictures."""
    if request.lr in DEGRADATIONS:
        if not hr:
            raise OptionError(f"--lr {request.lr} makes LR from HR; give --hr")
        return request.lr, {}
    if request.lr is None:
        shards = any(source.column for source in hr.values())
        if shards and request.hr:
            # The folder is listed again, and its notes are known.
            return None, list_pictures(request.hr, "lr", notes=Notes())
        return "clean" if hr else None, {}
    if "://" not in request.lr and not os.path.isdir(request.lr):
        names = ", ".join(DEGRADATIONS)
        raise OptionError(f"--lr {request.lr} is neither a folder nor one of {names}")
    return None, list_pictures(request.lr, "lr")


def _skipped(wanted: Sequence[str], *, referenced: bool, chosen: bool) -> dict[str, str]:
    """Reasons, by metric, for those that cannot be measured here.

    chosen: the user has named the metrics, so that a large download is no surprise.
    """
    blind = [name for name in wanted if metrics.has_reference(name) and not referenced]
    skipped = dict.fromkeys(blind, "it compares with the true pictures; give them with --hr")
    if not chosen:
        skipped |= metrics.needing_download([name for name in wanted if name not in skipped])
    return skipped | metrics.unavailable([name for name in wanted if name not in skipped])


def finish(
    evaluation: Evaluation,
    scores: Sequence[Score],
    view: Callable[[Sequence[Item]], ModelViews],
    write: Callable[[str, bytes], None],
) -> Report:
    """Write metrics.parquet, contact.jpg and report.md, and return the report.

    scores: in any order of pictures. view: describes the models, and cuts examples of the best and
    worst pictures. write: writes a file of this name.
    """
    places = {item.id: place for place, item in enumerate(evaluation.items)}
    ordered = sorted(scores, key=lambda score: places[score.id])
    report = Report(
        evaluation.title, evaluation.settings, ordered, evaluation.alone, evaluation.skipped
    )
    ranking = reports.rank(report, evaluation.rank)
    ends = ranking.ends(evaluation.examples) if ranking else {}
    models, examples = view([evaluation.items[places[id]] for id in ends])
    report = dataclasses.replace(report, models=models)
    write("metrics.parquet", reports.parquet(report))
    if ranking:
        write("contact.jpg", reports.contact(report, ranking, examples, evaluation.examples))
    write("report.md", reports.markdown(report).encode())
    return report
