"""The knee of a Ray Train run: found while it trains, written down, and saved from deletion.

The controller follows the checkpoints that Ray Train records and writes `knee.json` beside them:
for users, for the next stage, and for the controller of a restarted run. `linearsr.training.knee`
alone decides which step is the knee.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import Field, ValidationError
from ray.train import Checkpoint, Result, UserCallback

from linearsr.config import Config
from linearsr.distributed.compat import quiet_checkpoint_manager
from linearsr.errors import InputError, LinearSRError, WeightsError, one_line
from linearsr.storage.location import Location
from linearsr.training import plot
from linearsr.training.knee import KneeState, detect
from linearsr.training.loop import PROGRESS

KNEE, KEPT, REPORT = "knee.json", "knee", "report.png"


class Validated(Config):
    """A validated checkpoint: `seen` orders checkpoints across restarts, `path` is its folder."""

    step: int
    seen: int
    path: str
    metrics: dict[str, float]


class Knee(Config):
    """The content of `knee.json`.

    checkpoint: folder with a copy of the knee's checkpoint; None while the metrics still rise.
    stop: whether the knee is confirmed and the patience after it is used up.
    """

    status: str = "rising"
    step: int | None = None
    checkpoint: str | None = None
    since: int = 0
    stop: bool = False
    evidence: dict[str, float] = Field(default_factory=dict)
    higher_is_better: dict[str, bool] = Field(default_factory=dict)
    history: list[Validated] = Field(default_factory=list)


def advance(
    before: Knee,
    reported: Iterable[tuple[Checkpoint, Mapping[str, Any]]],
    higher_is_better: Mapping[str, bool],
    patience: int | None = None,
) -> Knee:
    """Return the knee, updated by the checkpoints that Ray Train reports, validated or not.

    before: the knee so far. Its history counts too, since Ray reports no checkpoint that retention
    has deleted. Its `checkpoint` stays while the knee does not move, and becomes None otherwise.
    """
    history = _merge(before.history, _validated(reported, set(higher_is_better)))
    if (history, higher_is_better) == (before.history, before.higher_is_better):
        return before.model_copy(update={"stop": _spent(before, patience)})
    state = detect([(v.step, v.metrics) for v in history], higher_is_better)
    if before.status == "confirmed" and state.status != "confirmed":
        # A divergence has shortened the history; a confirmed knee is final all the same.
        state = KneeState("confirmed", before.step, before.since + 1, before.evidence)
    return Knee(
        status=state.status,
        step=state.step,
        checkpoint=before.checkpoint if state.step == before.step else None,
        since=state.since,
        stop=_spent(state, patience),
        evidence=state.evidence,
        higher_is_better=dict(higher_is_better),
        history=history,
    )


class KneePointCallback(UserCallback):  # type: ignore[misc]
    """Keeps the knee of a run, its checkpoint and its plot, in the controller.

    `knee.json` is read once, when a controller starts; from then on the knee is kept in memory and
    follows what Ray Train has recorded.
    """

    def __init__(
        self, run: Location, higher_is_better: Mapping[str, bool], patience: int | None = None
    ) -> None:
        self.run = run
        self.higher_is_better = dict(higher_is_better)
        self.patience = patience
        self.knee: Knee | None = None

    def after_report(
        self,
        run_context: Any,  # noqa: ARG002
        metrics: list[dict[str, Any]],  # noqa: ARG002
        checkpoint: Checkpoint | None,  # noqa: ARG002
    ) -> None:
        """Update the knee. Validations end between reports: each report sees those before it.

        Storage that fails for a moment must not end the run: the next report does it all again.
        """
        try:
            self.update()
        except (OSError, LinearSRError) as error:
            logging.getLogger(__name__).warning("knee not updated this time: %s", error)

    def update(self) -> Knee:
        """Find the knee in what was validated so far; write `knee.json` and the plot; return it."""
        before = self.knee or read_knee(self.run)
        result = last_result(self.run)
        reported = (result.best_checkpoints if result else None) or []
        knee = advance(before, reported, self.higher_is_better, self.patience)
        knee = knee.model_copy(update={"checkpoint": self._keep(knee)})
        (self.run / KNEE).write(knee.model_dump_json(indent=1).encode())
        self.knee = knee
        for file in (self.run / KEPT).files():  # of former knees, now that the new one is named
            if knee.checkpoint is not None and not file.path.startswith(f"{knee.checkpoint}/"):
                file.delete_file()
        self._draw(knee, result)
        return knee

    def _keep(self, knee: Knee) -> str | None:
        """Copy the knee's checkpoint out of retention's reach, unless this is done.

        Returns the copy's folder; None while rising, and if retention was faster.
        """
        if knee.step is None or knee.checkpoint is not None:
            return knee.checkpoint
        source = next(v.path for v in knee.history if v.step == knee.step)
        original = Location(self.run.filesystem, source)
        if not original.exists():
            return None
        kept = self.run / KEPT / f"step-{knee.step:08d}"
        original.copy_to(kept)
        return kept.path

    def _draw(self, knee: Knee, result: Result | None) -> None:
        if result is None or result.checkpoint is None:
            return
        progress = Location(self.run.filesystem, result.checkpoint.path) / PROGRESS
        training = json.loads(progress.read())["history"]
        points = [{"step": v.step, **v.metrics} for v in knee.history]
        (self.run / REPORT).write(
            plot.report(self.run.name, training, points, knee.step, knee.status)
        )


def read_knee(run: Location) -> Knee:
    """Read a run's `knee.json`, or return an empty Knee. Raises InputError if it is damaged."""
    file = run / KNEE
    if not file.exists():
        return Knee()
    try:
        return Knee.model_validate_json(file.read())
    except ValidationError as error:
        raise InputError(
            f"{file.path}: is damaged, or was not written by LinearSR ({one_line(error)}); "
            "restore it"
        ) from error


def start_from_knee(run: Location, *, anyway: bool = False) -> tuple[Location, int | None]:
    """Return the checkpoint folder that the stage after `run` starts from, and its step.

    That is the confirmed knee; `anyway` accepts the candidate, or else the last checkpoint.
    Raises WeightsError if there is no confirmed knee: fine-tuning collapses when it starts from
    anywhere else (LinearSR, ESGF).
    """
    knee = read_knee(run)
    if knee.checkpoint and (knee.status == "confirmed" or anyway):
        return Location(run.filesystem, knee.checkpoint), knee.step
    if knee.status == "confirmed" and not anyway:
        raise WeightsError(
            f"{run.path}: the checkpoint of its knee, step {knee.step}, is no longer there; train "
            "again with a larger --keep, or pass --i-know-this-is-not-the-knee"
        )
    if not anyway:
        raise WeightsError(
            f"{run.path}: its knee is not confirmed ({knee.status}"
            + (f" at step {knee.step}" if knee.step is not None else "")
            + "); train longer, or pass --i-know-this-is-not-the-knee"
        )
    return last_checkpoint(run)


def last_checkpoint(run: Location) -> tuple[Location, int | None]:
    """Return a run's last checkpoint folder and its step. Raises WeightsError if it has none."""
    latest = last_result(run)
    if latest is None or latest.checkpoint is None:
        raise WeightsError(f"{run.path}: no checkpoint of a training run here")
    return Location(run.filesystem, latest.checkpoint.path), (latest.metrics or {}).get("step")


def last_result(run: Location) -> Result | None:
    """Read what Ray Train has recorded of a run; None if the run never reported."""
    quiet_checkpoint_manager()
    try:
        return Result.from_path(run.path, storage_filesystem=run.filesystem)
    except RuntimeError:
        return None


def _validated(
    reported: Iterable[tuple[Checkpoint, Mapping[str, Any]]], names: set[str]
) -> list[Validated]:
    """Return the checkpoints that have any of these metrics, in the order of training."""
    validated = [
        Validated(
            step=metrics["step"],
            seen=metrics["seen"],
            path=checkpoint.path,
            metrics={k: v for k, v in metrics.items() if "@" in k and math.isfinite(v)},
        )
        for checkpoint, metrics in reported
        if names & metrics.keys()
    ]
    return sorted(validated, key=lambda v: v.seen)


def _merge(before: list[Validated], now: list[Validated]) -> list[Validated]:
    """Merge histories by `seen`, without what a divergence discarded: later steps, fewer seen."""
    merged: list[Validated] = []
    for validated in sorted({v.seen: v for v in [*before, *now]}.values(), key=lambda v: v.seen):
        merged = [v for v in merged if v.step < validated.step]
        merged.append(validated)
    return merged


def _spent(state: KneeState | Knee, patience: int | None) -> bool:
    return patience is not None and state.status == "confirmed" and state.since >= patience


def summary(knee: Knee) -> str:
    """Describe a knee in one line."""
    if knee.step is None:
        return f"no knee yet after {len(knee.history)} validated checkpoints: still rising"
    return f"knee {knee.status} at step {knee.step} ({json.dumps(knee.evidence)})"
