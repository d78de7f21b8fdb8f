"""Whole small training runs on real workers: undisturbed, killed, and diverging."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

from linearsr.distributed.train.config import StageConfig
from linearsr.distributed.train.knee import read_knee
from linearsr.distributed.train.trainer import Outcome, check, train
from linearsr.errors import LinearSRError, OptionError, OutputError
from linearsr.storage.location import locate
from linearsr.training import loop
from linearsr.training.recipes import Recipe, override
from tests.helpers.processes import until
from tests.helpers.runs import checkpoints, losses, reported, stage_of

pytestmark = pytest.mark.usefixtures("cluster")

STEPS = [6, 12, 18, 24]


def test_a_run_leaves_checkpoints_a_knee_samples_and_curves(whole: Outcome) -> None:
    run = Path(whole.run.path)
    assert [m["step"] for m in reported(run)] == STEPS
    assert [m["seen"] for m in reported(run)] == [4 * step for step in STEPS]
    assert all(m["psnr@1"] > 5 for m in reported(run))
    assert len(losses(run)) == 24
    for folder in checkpoints(run):
        assert len(list(folder.glob("ema-*-of-00002.safetensors"))) == 2
        strip = Image.open(run / "samples" / f"{folder.name}.png")
        assert strip.size == (3 * 64, 64)  # LR, result, HR
    knee = read_knee(whole.run)
    assert knee == whole.knee and [v.step for v in knee.history] == STEPS
    assert knee.status == "rising" and knee.higher_is_better == {"psnr@1": True}
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")
    assert whole.metrics["step"] == 24


def _workers(cluster: Cluster) -> list[psutil.Process]:
    """Return the process ids of the training workers of the tests' cluster."""
    raylet = cluster.head_node.all_processes["raylet"][0].process.pid
    children = psutil.Process(raylet).children(recursive=True)
    return [p for p in children if _name(p).startswith("ray::RayTrainWorker")]


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture(scope="module")
def killed(
    cluster: Cluster, recipe: Recipe, photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run in which a worker was killed after the first checkpoint."""
    runs = tmp_path_factory.mktemp("runs")
    ended: list[int] = []

    def kill() -> None:
        until(lambda: bool(reported(runs / "killed")), "a first checkpoint")
        worker = _workers(cluster)[-1]
        worker.kill()
        ended.append(len(reported(runs / "killed")))

    killer = threading.Thread(target=kill)
    killer.start()
    train(stage_of(recipe, photos, runs, "killed"))
    killer.join()
    assert ended and ended[0] < len(STEPS), "the run was over before a worker could be killed"
    return runs / "killed"


def test_a_killed_worker_costs_no_more_than_the_steps_since_the_checkpoint(
    killed: Path, whole: Outcome
) -> None:
    """A run that started again from nothing would have reported its first steps twice."""
    assert [m["step"] for m in reported(killed)] == STEPS
    assert losses(killed) == pytest.approx(losses(Path(whole.run.path)), rel=1e-3)


@pytest.mark.thorough
def test_a_run_that_has_ended_goes_on_with_more_steps(
    killed: Path, recipe: Recipe, photos: Path
) -> None:
    """This is the advice when no knee has been confirmed at the end."""
    more = override(recipe, ["pretrain.steps=30"])
    outcome = train(stage_of(more, photos, killed.parent, killed.name))
    assert [m["step"] for m in reported(killed)] == [*STEPS, 30]
    assert len(losses(killed)) == 30
    assert [v.step for v in outcome.knee.history][-2:] == [24, 30]


def _wild(recipe: Recipe, **guard: object) -> Recipe:
    """Return the recipe with a thousand times the learning rate."""
    settings = [f"pretrain.guard.{name}={value}" for name, value in guard.items()]
    rate = 1000 * recipe.pretrain.learning_rate
    longer = ["pretrain.steps=60", "pretrain.report_every=5", "pretrain.checkpoint_every=15"]
    return override(recipe, [f"pretrain.learning_rate={rate}", *longer, *settings])


@pytest.fixture(scope="module")
def diverged(recipe: Recipe, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose rate is a thousand times too high until the guard lowers it."""
    runs = tmp_path_factory.mktemp("runs")
    wild = _wild(recipe, window=3, slow_down=0.001, restarts=1)
    train(stage_of(wild, photos, runs, "diverged"))
    return runs / "diverged"


@pytest.mark.thorough
def test_a_diverged_run_goes_back_and_ends_well_at_a_lower_rate(diverged: Path) -> None:
    divergences = [m for m in reported(diverged) if "diverged" in m]
    assert len(divergences) == 1 and divergences[0]["attempt"] == 1 and divergences[0]["step"] == 0
    assert "step" in divergences[0]["diverged"]
    last = reported(diverged)[-1]
    assert last["step"] == 60 and last["attempt"] == 1
    # No pair is used twice, since the batch that diverged may have been the cause.
    assert last["seen"] == divergences[0]["seen"] + 60 * 4
    history = loop.read_progress(checkpoints(diverged)[-1]).history
    assert {point["attempt"] for point in history} == {1}
    assert max(point["learning_rate"] for point in history) < 2e-3
    assert [v.step for v in read_knee(locate(diverged)).history] == [15, 30, 45, 60]


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


@pytest.mark.thorough
def test_no_stored_checkpoint_holds_a_weight_that_is_not_finite(diverged: Path) -> None:
    folders = checkpoints(diverged)
    assert len(folders) >= 5
    for folder in folders:
        shares = [load_file(file) for file in folder.glob("ema-*.safetensors")]
        states = [torch.load(f, weights_only=False) for f in folder.glob("zero-of-*/*.pt")]
        tensors = [t for t in _tensors([shares, states]) if t.is_floating_point()]
        assert len(shares) == 2 and len(states) >= 3
        assert all(torch.isfinite(t).all() for t in tensors)


@pytest.mark.thorough
def test_a_run_that_diverges_too_often_ends_with_one_clear_error(
    recipe: Recipe, photos: Path, tmp_path: Path
) -> None:
    wild = _wild(recipe, window=3, restarts=0)
    stage = stage_of(wild, photos, tmp_path, "spent", workers=1, max_failures=0)
    with pytest.raises(LinearSRError, match=r"gave up after 0 restarts: lower learning_rate"):
        train(stage)


def test_a_batch_that_workers_cannot_share_is_refused(
    recipe: Recipe, photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=r"data\.batch 4 .* 3 workers"):
        check(stage_of(recipe, photos, tmp_path, "x", workers=3))


@pytest.mark.parametrize(
    ("changes", "kind"), [({"validation_cpus": 0.51}, "CPU"), ({"gpu": True}, "GPU")]
)
def test_a_request_for_more_than_the_cluster_has_is_refused(
    changes: dict[str, object], kind: str, recipe: Recipe, photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=rf"needs [\d.]+ {kind}, the cluster has"):
        check(stage_of(recipe, photos, tmp_path, "x", **changes))


def test_places_that_cannot_be_used_are_refused(
    recipe: Recipe, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OutputError, match="storage cannot be written to"):
        check(stage_of(recipe, photos, tmp_path / "file" / "runs", "x"))
    with pytest.raises(LinearSRError, match="to train on"):
        check(stage_of(recipe, tmp_path / "empty", tmp_path, "x"))
    with pytest.raises(LinearSRError, match="to validate on"):
        check(stage_of(recipe, photos, tmp_path, "x", validation=str(tmp_path / "empty")))


def test_start_weights_of_another_config_are_refused(
    recipe: Recipe, photos: Path, small_bundle: Path, tmp_path: Path
) -> None:
    wider = override(recipe, ["model.denoiser.width=48"])
    stage = stage_of(wider, photos, tmp_path, "x").model_dump()
    differs = "denoiser config of these weights differs"
    for start, message in ((small_bundle, differs), (tmp_path / "no", "no")):
        with pytest.raises(LinearSRError, match=message):
            check(StageConfig.model_validate({**stage, "start": str(start)}))


def test_a_run_of_another_model_is_refused(recipe: Recipe, photos: Path, tmp_path: Path) -> None:
    check(stage_of(recipe, photos, tmp_path, "x"))
    deeper = override(recipe, ["model.denoiser.depth=3"])
    with pytest.raises(OptionError, match="a different model config; choose another --name"):
        check(stage_of(deeper, photos, tmp_path, "x"))
