"""Scores as a Markdown report, as a Parquet table, and as a sheet of examples."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from PIL import Image

from linearsr.evaluation.config import BICUBIC, NOTE, TRUTH, Score, Settings
from linearsr.evaluation.drawing import Row, sheet
from linearsr.evaluation.judge import DETAIL, Example
from linearsr.metrics.measure import conventions, has_reference, higher_is_better

# Pictures in a line of the contact sheet: more would be wider than a screen.
COLUMNS = 6
_DESCRIPTIONS = {
    "clean": "made from HR by antialiased bicubic, rounded to 8 bits",
    "mixed": "made from HR with blur, noise and JPEG, each on half of the pictures (`mild`)",
    "degraded": "made from HR with blur of sigma 0.5 to 2, noise of 2 to 8 levels and JPEG of "
    "quality 60 to 90 on every picture",
}


@dataclass(frozen=True)
class Report:
    """All results of an evaluation, once every picture has been judged.

    scores: in the order of pictures and methods. alone: why a picture was left out, by its name.
    skipped: why a metric was not measured, by its name. models: descriptions by name.
    """

    title: str
    settings: Settings
    scores: Sequence[Score]
    alone: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)

    @property
    def failures(self) -> list[str]:
        """A line for each picture, or method on a picture, that failed or was left out."""
        failed = (s for s in self.scores if s.failed)
        lines = [f"{s.id}{f' ({s.method})' if s.method else ''}: {s.error}" for s in failed]
        return [*(f"{name}: left out: {why}" for name, why in self.alone.items()), *lines]

    def values(self, method: str, metric: str) -> dict[str, float]:
        """Return the metric's values by picture, without pictures that have none."""
        return {
            s.id: s.value
            for s in self.scores
            if s.method == method and s.metric == metric and s.value is not None
        }

    def methods(self) -> list[str]:
        """Return the methods that worked on at least one picture, even if no metric has a value."""
        return list(dict.fromkeys(s.method for s in self.scores if s.method and not s.failed))

    def notes(self) -> list[str]:
        """Return what a user must know about the files that were read, a line for each."""
        return list(dict.fromkeys(s.error for s in self.scores if s.metric == NOTE))


def table(report: Report) -> str:
    """Return Markdown with a row per method: number of pictures, and the mean of each metric.

    A mean over fewer pictures is followed by their number.
    """
    metrics = report.settings.metrics
    heads = [f"{m} {'↑' if higher_is_better(m) else '↓'}" for m in metrics]
    rows = [[report.title, "n", *heads]]
    for method in report.methods():
        values = [report.values(method, metric) for metric in metrics]
        judged = {s.id for s in report.scores if s.method == method and not s.failed}
        rows.append([method, str(len(judged)), *(_mean(v, len(judged)) for v in values)])
    widths = [max(2, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]
    rows.insert(1, ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])])
    return "\n".join(f"| {' | '.join(_aligned(row, widths))} |" for row in rows)


def _mean(values: Mapping[str, float], judged: int) -> str:
    # Summed in the order of names, so that every order of arrival gives the same digits.
    ordered = [values[id] for id in sorted(values)]
    count = f" (n={len(ordered)})" if len(ordered) != judged else ""
    return f"{sum(ordered) / len(ordered):.4f}{count}" if ordered else ""


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    first, *rest = zip(row, widths, strict=True)
    return [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]


def markdown(report: Report) -> str:
    """Return the whole report as Markdown."""
    parts = [
        f"# {report.title}, x{report.settings.scale}",
        table(report),
        _section("Conventions", _conventions(report)),
        _section("Models", [f"{name}: {text}" for name, text in report.models.items()]),
        _section("Metrics skipped", [f"{name}: {why}" for name, why in report.skipped.items()]),
        _section("Pictures that a metric could not measure", _gaps(report.scores)),
        _section("Notes", report.notes()),
        _section("Failed", report.failures),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"## {title}", "", *(f"- {line}" for line in lines)]) if lines else ""


def _conventions(report: Report) -> list[str]:
    settings = report.settings
    referenced = any(has_reference(metric) for metric in settings.metrics)
    lines = [
        f"{conventions()}. All other metrics: on whole RGB pictures, with their defaults. All run "
        "on the CPU.",
        "Values are means over n pictures, or over the number beside the value. Results are "
        "rounded to 8 bits before they are measured.",
        "↑: higher is better. ↓: lower is better. For metrics without a reference, values beyond "
        "those of HR are no gain.",
    ]
    if referenced:
        lines.append("HR is cut at the right and bottom to whole LR pixels.")
    lines += _about_lr(report)
    return lines


def _about_lr(report: Report) -> list[str]:
    methods, settings = report.methods(), report.settings
    if BICUBIC not in methods:
        return []
    kind = settings.degradation
    lr = _DESCRIPTIONS.get(kind, f"made from HR by the preset `{kind}`") if kind else "as given"
    seeded = f"; seeded by the CRC-32 of the file name ({kind})" if kind else ""
    lines = [f"LR: {lr}{seeded}.", f"{BICUBIC}: antialiased, a = -0.5."]
    return lines + ([f"Models start from seed {settings.seed}."] if settings.models else [])


def _gaps(scores: Iterable[Score]) -> list[str]:
    """A line for each metric that has no value for some picture, with the first reason."""
    missing: dict[str, list[Score]] = {}
    for score in scores:
        if score.metric not in ("", NOTE) and score.value is None:
            missing.setdefault(score.metric, []).append(score)
    return [
        f"{scores[0].error}: {scores[0].id} ({len({s.id for s in scores})} in all)"
        for scores in missing.values()
    ]


def parquet(report: Report) -> bytes:
    """Return a Parquet table of all values: id, method, metric, value, better (higher or lower).

    The file's metadata holds the settings as JSON under "linearsr".
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            **{"id": s.id, "method": s.method, "metric": s.metric, "value": s.value},
            "better": "higher" if higher_is_better(s.metric) else "lower",
        }
        for s in report.scores
        if s.value is not None
    ]
    names = ("id", "method", "metric", "value", "better")
    kinds = {name: pa.float64() if name == "value" else pa.string() for name in names}
    about = {"title": report.title, "models": dict(report.models), "conventions": conventions()}
    note = json.dumps({**about, "settings": report.settings.model_dump(mode="json")})
    schema = pa.schema(kinds, metadata={"linearsr": note})
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer)
    return buffer.getvalue()


@dataclass(frozen=True)
class Ranking:
    """One method's results, sorted from best to worst by one metric."""

    method: str
    metric: str
    values: Mapping[str, float]

    def ends(self, count: int) -> dict[str, str]:
        """Return ranks by id, as "1 of 9", of the `count` best and worst pictures, or of all."""
        ids = list(self.values)
        chosen = range(len(ids))
        if len(ids) > 2 * count:
            chosen = [*range(count), *range(len(ids) - count, len(ids))]  # type: ignore[assignment]
        return {ids[i]: f"{i + 1} of {len(ids)}" for i in chosen}


def rank(report: Report, metric: str | None = None) -> Ranking | None:
    """Rank pictures by `metric`, or else by the first metric that has values.

    This is done for the first method with values; HR and bicubic come last. None if there is no
    value.
    """
    metrics = [metric] if metric else list(report.settings.metrics)
    methods = sorted(report.methods(), key=lambda m: (m == BICUBIC, m == TRUTH))
    for candidate in metrics:
        for method in methods:
            values = report.values(method, candidate)
            if values:
                sign = -1 if higher_is_better(candidate) else 1
                ordered = sorted(values.items(), key=lambda v: (sign * v[1], v[0]))
                return Ranking(method, candidate, dict(ordered))
    return None


def contact(report: Report, ranking: Ranking, examples: Sequence[Example], count: int) -> bytes:
    """Return a JPEG of the best and worst pictures: a detail by every method, its value above.

    Details have their original size, in lines of at most COLUMNS, HR last.
    """
    ranks = ranking.ends(count)
    rows = []
    for example in examples:
        heading = f"{ranks[example.id]} by {ranking.metric} of {ranking.method}: {example.id}"
        rows.append(Row([heading], [Image.new("RGB", (1, 1), "white")]))
        lines = math.ceil(len(example.details) / COLUMNS)
        columns = math.ceil(len(example.details) / lines)
        for first in range(0, len(example.details), columns):
            names, pictures = zip(*example.details[first : first + columns], strict=True)
            labels = [_label(report, ranking.metric, example.id, name) for name in names]
            rows.append(Row(labels, pictures))
    buffer = io.BytesIO()
    sheet(rows, DETAIL).save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()


def _label(report: Report, metric: str, id: str, method: str) -> str:
    value = report.values(method, metric).get(id)
    return method if value is None else f"{method}  {value:.3f}"
