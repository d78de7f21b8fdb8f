"""What is evaluated and how, as plain data; imports neither torch nor pyiqa."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from linearsr.config import Config, Solver

Steps = Annotated[tuple[Annotated[int, Field(ge=1, le=50)], ...], Field(min_length=1)]
TRUTH, BICUBIC = "HR", "bicubic"


class Source(Config):
    """Where an encoded picture lies: a file, or one row of a Parquet shard's `column`.

    file: path below `folder`. group, row: the place inside a shard; -1 for a picture file.
    """

    folder: str
    file: str
    group: int = -1
    row: int = -1
    column: str = ""


class Item(Config):
    """One picture to evaluate: the truth, its low resolution, results of other programs.

    Each may be missing. Without `lr`, it is made from `hr`, seeded by the id's last part.
    """

    id: str
    hr: Source | None = None
    lr: Source | None = None
    results: dict[str, Source] = Field(default_factory=dict)


class Settings(Config):
    """What decides the numbers, besides the pictures.

    models: bundled names, folders of weights or checkpoints of other programs, by the names they
    get in tables. solvers: by which each takes its steps; none is the model's own. degradation: how
    LR is made, a name of `linearsr.evaluation.judge.DEGRADATIONS`; None where it is given, or
    needed for nothing.
    """

    scale: Literal[2, 3, 4] = 4
    degradation: str | None = None
    models: dict[str, str] = Field(default_factory=dict)
    steps: Steps = (1, 2)
    solvers: tuple[Solver, ...] = ()
    seed: int = Field(default=0, ge=0, lt=2**63)
    metrics: tuple[str, ...]


class Score(NamedTuple):
    """One metric of one picture by one method, or why there is none.

    metric: empty where the method, or with an empty method the picture, failed as a whole, or where
    a worker could not load a metric that others have.
    """

    id: str
    method: str
    metric: str
    value: float | None
    error: str = ""

    @property
    def failed(self) -> bool:
        """Whether this tells of a failure; a metric that cannot measure a picture is none."""
        return not self.metric


def result_label(model: str, steps: int, solver: Solver | None = None) -> str:
    """A model's name in tables; with the solver's where one was asked for."""
    return f"{model}, {steps} {f'{solver} ' if solver else ''}step{'s' if steps > 1 else ''}"
