"""Small training runs on a cluster: their recipes, stages and reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from linearsr.distributed.train.config import ClusterConfig, StageConfig
from linearsr.distributed.train.knee import last_result
from linearsr.storage.location import locate
from linearsr.training import loop
from linearsr.training.recipes import Recipe

# Changes to `tiny_cpu` after which a step takes far less time than starting a process.
SMALL = (
    "model.denoiser.depth=2",
    "model.denoiser.width=32",
    "model.denoiser.head_dim=16",
    "model.denoiser.stem_channels=[8, 8, 8]",
    "data.patch=32",
    "data.batch=4",
    "data.margin=8",
    "validation.pictures=1",
    "validation.size=64",
    'validation.metrics=["psnr@1"]',
    'validation.knee={"psnr@1": true}',
)
STEPS = (
    "pretrain.steps=24",
    "pretrain.warmup=2",
    "pretrain.report_every=1",
    "pretrain.checkpoint_every=6",
    # Losses of interrupted runs are compared up to the rounding of float32.
    "pretrain.bfloat16=false",
)


def stage_of(
    recipe: Recipe, photos: Path, storage: Path, name: str, **changes: object
) -> StageConfig:
    """Return a pretraining stage of two workers that reserves all four CPUs of the cluster."""
    places = {"data": str(photos), "validation": str(photos), "storage": str(storage)}
    cpus = {"worker_cpus": 1.25, "data_cpus": 0.5, "validation_cpus": 0.5}
    fields = {**places, **cpus, "name": name, "workers": 2, **changes}
    cluster = ClusterConfig.model_validate(fields)
    return StageConfig(recipe=recipe, cluster=cluster, kind="pretrain")


def checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoint folders, oldest first."""
    return sorted(p.parent for p in run.glob("checkpoint_*/progress.json"))


def reported(run: Path | str) -> list[dict[str, Any]]:
    """Return the metrics of every checkpoint that Ray Train knows, in order of report."""
    result = last_result(locate(run))
    return [metrics for _, metrics in (result.best_checkpoints if result else None) or []]


def losses(run: Path) -> list[float]:
    """Return the loss of every step, from the history in the last checkpoint."""
    history = loop.read_progress(checkpoints(run)[-1]).history
    return [point["loss"] for point in history]
