"""The knee of real Ray Train runs with an artificial metric: detection, retention, stopping."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import ray.train
from ray.cluster_utils import Cluster
from ray.train import Checkpoint, CheckpointConfig, RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.validation_config import ValidationConfig

from linearsr.distributed.train.knee import (
    Knee,
    KneePointCallback,
    Validated,
    _merge,
    last_checkpoint,
    read_knee,
    start_from_knee,
    summary,
)
from linearsr.errors import InputError, WeightsError
from linearsr.storage.location import locate
from linearsr.training.knee import detect
from tests.helpers.runs import checkpoints

UP = {"score@1": True}
KNEE, LAST, EVERY, KEEP = 5, 16, 100, 8


def _score(step: int) -> float:
    """Return a score that rises straight to the knee, then oscillates and slowly falls."""
    nth = step // EVERY
    return min(nth, KNEE) - (0.15 * (-1) ** nth + 0.05 * (nth - KNEE)) * (nth > KNEE)


def _train(config: dict[str, int]) -> None:
    """Report a checkpoint every `EVERY` steps, each after the last one has been validated."""
    history: list[dict[str, float]] = []
    for nth in range(1, config["last"] + 1):
        step = nth * EVERY
        point = {"loss": 1 / nth, "gradient_norm": 1.0, "learning_rate": 1e-3}
        history.append({"step": step, **point})
        with tempfile.TemporaryDirectory() as folder:
            progress = {"step": step, "seen": 4 * step, "history": history}
            (Path(folder) / "progress.json").write_text(json.dumps(progress))
            (Path(folder) / "ema.bin").write_bytes(str(step).encode())
            ray.train.report(
                {"step": step, "seen": 4 * step, "loss": 1 / nth},
                checkpoint=Checkpoint.from_directory(folder),
                validation=True,
            )
        ray.train.get_all_reported_checkpoints(
            consistency_mode=ray.train.CheckpointConsistencyMode.VALIDATED
        )


def _validate(checkpoint: Checkpoint) -> dict[str, Any]:
    with checkpoint.as_directory() as folder:
        step = json.loads((Path(folder) / "progress.json").read_text())["step"]
    return {"score@1": _score(step)}


def _fit(storage: Path, name: str, last: int) -> Path:
    callback = KneePointCallback(locate(storage) / name, UP, patience=3)
    DataParallelTrainer(
        _train,
        train_loop_config={"last": last},
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 0.5}),
        run_config=RunConfig(
            name=name,
            storage_path=str(storage),
            checkpoint_config=CheckpointConfig(num_to_keep=KEEP),
            callbacks=[callback],
        ),
        validation_config=ValidationConfig(fn=_validate, ray_remote_kwargs={"num_cpus": 0.25}),
    ).fit()
    return storage / name


@pytest.fixture(scope="module")
def finished(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _fit(tmp_path_factory.mktemp("knee"), "finished", LAST)


@pytest.fixture(scope="module")
def short(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended while its metric still rose."""
    return _fit(tmp_path_factory.mktemp("knee"), "short", 3)


def test_a_run_ends_with_its_knee_confirmed_at_the_right_checkpoint(finished: Path) -> None:
    knee = read_knee(locate(finished))
    assert knee.status == "confirmed" and knee.step is not None
    assert abs(knee.step - KNEE * EVERY) <= EVERY
    # The last report knows all validations but the last.
    assert [v.step for v in knee.history] == [EVERY * n for n in range(1, LAST)]
    assert [v.metrics["score@1"] for v in knee.history] == [_score(v.step) for v in knee.history]
    assert f"confirmed at step {knee.step}" in summary(knee)


def test_the_knees_checkpoint_outlives_retention(finished: Path) -> None:
    knee = read_knee(locate(finished))
    original = next(v.path for v in knee.history if v.step == knee.step)
    assert not Path(original).exists()
    assert len(checkpoints(finished)) == KEEP
    kept = Path(str(knee.checkpoint))
    assert (kept / "ema.bin").read_bytes() == str(knee.step).encode()
    assert json.loads((kept / "progress.json").read_text())["step"] == knee.step
    # Earlier candidates are gone.
    assert {p.parent for p in finished.glob("knee/*/*")} == {kept}


def test_the_report_of_a_finished_run_is_drawn(finished: Path) -> None:
    assert (finished / "report.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_training_may_stop_once_the_patience_after_the_knee_is_spent(finished: Path) -> None:
    history = [(v.step, v.metrics) for v in read_knee(locate(finished)).history]
    confirmed = next(n for n in range(1, LAST) if detect(history[:n], UP).status == "confirmed")
    assert read_knee(locate(finished)).stop
    for patience, stop in ((LAST - confirmed, True), (LAST - confirmed + 1, False)):
        callback = KneePointCallback(locate(finished), UP, patience)
        assert callback.update().stop == stop
    assert not KneePointCallback(locate(finished), UP).update().stop


def test_a_restarted_controller_finds_the_same_knee(finished: Path) -> None:
    """Retention has deleted most of the checkpoints that the knee was found from."""
    before = read_knee(locate(finished))
    after = KneePointCallback(locate(finished), UP, patience=3).update()
    assert (after.status, after.step, after.checkpoint) == (
        before.status,
        before.step,
        before.checkpoint,
    )
    assert after.history[: len(before.history)] == before.history
    assert after.history[-1].step == LAST * EVERY


def test_the_next_stage_starts_from_a_confirmed_knee_only(finished: Path, short: Path) -> None:
    folder, step = start_from_knee(locate(finished))
    assert folder.path == read_knee(locate(finished)).checkpoint and step == KNEE * EVERY
    with pytest.raises(WeightsError, match=r"not confirmed.*--i-know-this-is-not-the-knee"):
        start_from_knee(locate(short))
    folder, step = start_from_knee(locate(short), anyway=True)
    assert (Path(folder.path) / "ema.bin").read_bytes() == b"300" and step == 300


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="--i-know-this-is-not-the-knee"):
        start_from_knee(locate(tmp_path))
    for call in (last_checkpoint, lambda run: start_from_knee(run, anyway=True)):
        with pytest.raises(WeightsError, match="no checkpoint of a training run"):
            call(locate(tmp_path))


def test_a_knee_whose_checkpoint_is_gone_ends_nothing_but_is_no_start(short: Path) -> None:
    """Retention may have deleted it before it was known to be the knee."""
    run = locate(short)
    lost = [
        Validated(step=n, seen=n, path=f"{run.path}/gone-{n}", metrics={"score@1": _score(n)})
        for n in range(EVERY, EVERY * LAST, EVERY)
    ]
    callback = KneePointCallback(run, UP)
    assert callback._keep(Knee(step=KNEE * EVERY, history=lost)) is None
    knee = read_knee(run).model_copy(update={"status": "confirmed", "step": 500})
    before = (run / "knee.json").read()
    (run / "knee.json").write(knee.model_dump_json().encode())
    try:
        with pytest.raises(WeightsError, match=r"step 500.*no longer there.*--keep"):
            start_from_knee(run)
    finally:
        (run / "knee.json").write(before)


def _validated(step: int, pairs: int) -> Validated:
    return Validated(step=step, seen=pairs, path=f"{step}-{pairs}", metrics={"score@1": 1.0})


def test_merge_drops_steps_that_a_divergence_discarded() -> None:
    first = [_validated(100, 100), _validated(200, 200), _validated(300, 300)]
    again = [_validated(200, 420), _validated(300, 520)]
    assert [(v.step, v.seen) for v in _merge(first, again)] == [(100, 100), (200, 420), (300, 520)]
    assert _merge(first, first[1:]) == first
    # A divergence leads back to the start.
    assert [v.step for v in _merge(first, [_validated(100, 400)])] == [100]


def test_metrics_that_were_never_measured_do_not_hide_the_knee() -> None:
    history = [
        (n, {"score@1": _score(n), "undeclared@1": 0.0}) for n in range(EVERY, EVERY * LAST, EVERY)
    ]
    assert detect(history, {**UP, "absent@1": True}).step == KNEE * EVERY
    assert detect(history, {"absent@1": True}).status == "rising"


@pytest.mark.parametrize("content", [b"", b"{", b'{"status": "rising", "unknown": 1}', b"[]"])
def test_a_damaged_knee_json_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "knee.json").write_bytes(content)
    with pytest.raises(InputError, match=r"knee\.json: is damaged, or was not written by LinearSR"):
        read_knee(locate(tmp_path))
