"""The pictures, settings and scores of an evaluation, as plain data without torch or pyiqa."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from linearsr.config import Config, Solver

Steps = Annotated[tuple[Annotated[int, Field(ge=1, le=50)], ...], Field(min_length=1)]
TRUTH, BICUBIC = "HR", "bicubic"
# The metric of a Score that holds a note about a picture.
NOTE = "note"


class Source(Config):
    """The place of an encoded picture: a file, or one row of a Parquet shard's `column`.

    file: path relative to `folder`. group, row: row group and row in a shard; -1 for a file.
    """

    folder: str
    file: str
    group: int = -1
    row: int = -1
    column: str = ""


class Item(Config):
    """One picture to evaluate: HR (the truth), LR, and results of other programs.

    Each may be missing. A missing LR is made from HR, seeded by the last part of the id.
    """

    id: str
    hr: Source | None = None
    lr: Source | None = None
    results: dict[str, Source] = Field(default_factory=dict)


class Settings(Config):
    """Everything that decides the numbers, besides the pictures.

    models: bundled names, folders of weights or checkpoints of other programs, by their names in
    tables. solvers: those to try on each model; none means the model's own. degradation: how LR is
    made, a name in `linearsr.evaluation.judge.DEGRADATIONS`; None if LR is given or not needed.
    """

    scale: Literal[2, 3, 4] = 4
    degradation: str | None = None
    models: dict[str, str] = Field(default_factory=dict)
    steps: Steps = (1, 2)
    solvers: tuple[Solver, ...] = ()
    seed: int = Field(default=0, ge=0, lt=2**63)
    metrics: tuple[str, ...]


class Score(NamedTuple):
    """The value of one metric for one picture by one method, or the reason why there is none.

    An empty metric means that the whole method failed on the picture. If the method is empty too,
    the whole picture failed, or a worker could not load a metric that others have. With the metric
    NOTE, `error` is what a user must know about a file that was read.
    """

    id: str
    method: str
    metric: str
    value: float | None
    error: str = ""

    @property
    def failed(self) -> bool:
        """Whether this is a failure; a metric that cannot measure a picture is not."""
        return not self.metric


def result_label(model: str, steps: int, solver: Solver | None = None) -> str:
    """Return the name of a model's results in tables, with the solver if one was chosen."""
    return f"{model}, {steps} {f'{solver} ' if solver else ''}step{'s' if steps > 1 else ''}"
