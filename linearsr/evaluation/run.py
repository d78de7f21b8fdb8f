"""An evaluation from a request to its report; who judges the pictures, and where, is given."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field

from linearsr.config import Config, Solver
from linearsr.errors import OptionError
from linearsr.evaluation import report as reports
from linearsr.evaluation.config import Item, Score, Settings, Steps
from linearsr.evaluation.judge import DEGRADATIONS, Example
from linearsr.evaluation.pairs import Listing, pair
from linearsr.evaluation.report import Report
from linearsr.metrics import measure as metrics


class Request(Config):
    """What a command line asks for. Folders hold pictures, or Parquet shards where Ray is.

    lr: a folder, or a name of DEGRADATIONS; None is the shards' own column, or else "clean".
    every: only every n-th picture. rank: the metric that the contact sheet is sorted by, with
    `examples` pictures at each end.
    """

    hr: str | None = None
    lr: str | None = None
    results: dict[str, str] = Field(default_factory=dict)
    models: dict[str, str] = Field(default_factory=dict)
    steps: Steps = (1, 2)
    solvers: tuple[Solver, ...] = ()
    metrics: tuple[str, ...] | None = None
    scale: Literal[2, 3, 4] = 4
    seed: int = Field(default=0, ge=0, lt=2**63)
    every: int = Field(default=1, ge=1)
    rank: str | None = None
    examples: int = Field(default=3, ge=1)


@dataclass(frozen=True)
class Plan:
    """What is to be judged, and what is known without looking at a pixel."""

    title: str
    settings: Settings
    items: Sequence[Item]
    alone: Mapping[str, str]
    skipped: Mapping[str, str]
    rank: str | None
    examples: int


class Seen(NamedTuple):
    """What only whoever has the models can tell."""

    models: dict[str, str]
    examples: list[Example]


def plan(request: Request, list_pictures: Callable[..., Listing]) -> Plan:
    """List, pair and check. `list_pictures(folder, *columns)`: pictures by id, of shards those in
    the first of the columns that they have.

    Raises OptionError for unknown metrics or degradations and when nothing is asked for,
    InputError for folders without pictures.
    """
    wanted = tuple(dict.fromkeys(request.metrics or metrics.DEFAULT))
    metrics.check_names(wanted)
    if request.rank and request.rank not in wanted:
        raise OptionError(f"--rank {request.rank}: not among the metrics; add it to --metrics")
    hr = list_pictures(request.hr, "hr") if request.hr else {}
    degradation, lr = _low(request, hr, list_pictures)
    # What upscale_dataset writes has "image".
    listed = request.results.items()
    results = {name: list_pictures(folder, "hr", "image") for name, folder in listed}
    if not (hr or lr or results):
        raise OptionError("nothing to evaluate: give --hr, --lr, --results or a folder")
    items, alone = pair(hr, lr, results)
    skipped = _skipped(wanted, referenced=bool(hr), asked=request.metrics is not None)
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
    return Plan(title, settings, items[:: request.every], alone, skipped, rank, request.examples)


def _low(
    request: Request, hr: Listing, list_pictures: Callable[..., Listing]
) -> tuple[str | None, Listing]:
    """The degradation LR is made by, or the LR pictures."""
    if request.lr in DEGRADATIONS:
        if not hr:
            raise OptionError(f"--lr {request.lr} makes LR from HR: give --hr")
        return request.lr, {}
    if request.lr is None:
        shards = any(source.column for source in hr.values())
        if shards and request.hr:
            return None, list_pictures(request.hr, "lr")
        return "clean" if hr else None, {}
    if "://" not in request.lr and not os.path.isdir(request.lr):
        names = ", ".join(DEGRADATIONS)
        raise OptionError(f"--lr {request.lr}: neither a folder nor one of {names}")
    return None, list_pictures(request.lr, "lr")


def _skipped(wanted: Sequence[str], *, referenced: bool, asked: bool) -> dict[str, str]:
    """Metrics that cannot be measured here, with the reason.

    asked: the user has named the metrics, so that a large download is no surprise.
    """
    blind = [name for name in wanted if metrics.has_reference(name) and not referenced]
    skipped = dict.fromkeys(blind, "compares with the true pictures; give them with --hr")
    if not asked:
        skipped |= metrics.without_download([name for name in wanted if name not in skipped])
    return skipped | metrics.unavailable([name for name in wanted if name not in skipped])


def finish(
    made: Plan,
    scores: Sequence[Score],
    look: Callable[[Sequence[Item]], Seen],
    write: Callable[[str, bytes], None],
) -> Report:
    """Write metrics.parquet, report.md and contact.jpg; scores may come in any order of pictures.

    `look` describes the models, and cuts examples of the pictures at the ends of the ranking.
    """
    places = {item.id: place for place, item in enumerate(made.items)}
    ordered = sorted(scores, key=lambda score: places[score.id])
    report = Report(made.title, made.settings, ordered, made.alone, made.skipped)
    ranking = reports.rank(report, made.rank)
    ends = ranking.ends(made.examples) if ranking else {}
    models, examples = look([made.items[places[id]] for id in ends])
    report = dataclasses.replace(report, models=models)
    write("metrics.parquet", reports.parquet(report))
    if ranking:
        write("contact.jpg", reports.contact(report, ranking, examples, made.examples))
    write("report.md", reports.markdown(report).encode())
    return report
