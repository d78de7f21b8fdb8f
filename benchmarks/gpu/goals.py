"""The goals on an H100 or H200, and what a run has measured of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu.stage import Row, read_rows
from benchmarks.markdown import markdown
from linearsr.config import LINEARSR_1_6B

NAME = LINEARSR_1_6B.name
SIDE = 1024
HEAD = ("1.6B on an H100 or H200", "goal", "the paper", "measured")


class Goal(NamedTuple):
    """A number to reach. rows: the stage's rows that count, of which the least `key` is taken."""

    what: str
    goal: str
    paper: str
    stage: str
    key: str
    counts: Callable[[Row], bool]


def _forward(row: Row) -> bool:
    return row["what"].startswith(f"{NAME}: LinearSR") and row.get("side") == SIDE


def _picture(*steps: int) -> Callable[[Row], bool]:
    return lambda row: row.get("side") == SIDE and row.get("steps") in steps


GOALS = (
    Goal("a forward at 1024 px", "9 ms", "36 ms", "forward", "ms", _forward),
    Goal("a picture of 1024 px in 20 steps", "250 ms", "830 ms", "picture", "ms", _picture(20)),
    Goal("a picture of 1024 px in 2 steps", "40 ms", "", "picture", "ms", _picture(2)),
    Goal("a picture of 1024 px in 1 step", "40 ms", "", "picture", "ms", _picture(1)),
    Goal(
        "log-log slope of a forward's time over pixels, 512 to 4096 px",
        "1.05",
        "",
        "forward",
        "value",
        lambda row: row["what"].startswith(f"{NAME}: log-log"),
    ),
)


def goals(out: Path) -> str:
    """Return the table of all goals, with what the rows in `out` say of them.

    A run at toy sizes measures none of them.
    """
    real = any(_forward(row) for row in read_rows(out, "forward"))
    lines = []
    for goal in GOALS:
        rows = [row for row in read_rows(out, goal.stage) if goal.counts(row) and goal.key in row]
        unit = " ms" if goal.key == "ms" else ""
        best = min((row[goal.key] for row in rows), default=None)
        measured = f"{best:.3g}{unit}" if real and best is not None else "not measured"
        lines.append((goal.what, goal.goal, goal.paper, measured))
    return markdown(HEAD, lines)
