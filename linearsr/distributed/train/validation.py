"""Validation beside training: Ray Train hands each new checkpoint to a task of its own."""

from __future__ import annotations

from typing import Any

import torch
from ray.train import Checkpoint
from torch import Tensor

from linearsr.denoiser import LinearSR
from linearsr.distributed.train.config import StageConfig
from linearsr.distributed.train.start import Start
from linearsr.errors import InputError
from linearsr.imaging.files import Picture, encode, read
from linearsr.imaging.sources import list_pictures
from linearsr.storage.location import Location, locate
from linearsr.storage.walk import Notes
from linearsr.training import export
from linearsr.training.recipes import ValidationConfig
from linearsr.training.validation import validate


def validation_pictures(path: str, config: ValidationConfig) -> list[tuple[str, Tensor]]:
    """Return names and pixels, (3, H, W) in [0, 1], of the first pictures of a folder.

    path: a local or s3:// folder, of which `config.pictures` are read.
    Raises InputError if there is no picture, and for one that cannot be decoded.
    """
    notes, folder = Notes(), locate(path)
    pictures = list_pictures(folder.files(notes), folder, notes)
    if not pictures:
        raise InputError(f"{path}: no pictures to validate on")
    chosen = pictures[: config.pictures]
    return [(f.name, read(f.read(), name=f.path).pixels[:3]) for f in chosen]


def validate_checkpoint(checkpoint: Checkpoint, stage_json: str) -> dict[str, Any]:
    """Return the metrics of a checkpoint's averaged weights, for Ray Train's validation hook.

    An expert is validated among the others as they were when its stage started, since users run all
    of them. One expert is in memory at a time. Also writes a picture of samples beside the
    checkpoints.
    """
    job = StageConfig.model_validate_json(stage_json)
    config, model = job.recipe.validation, job.recipe.model
    if job.expert is None:
        model = export.single(model)
    # Ray shows all GPUs to a task that reserved none: those are the workers'.
    device = "cuda" if job.cluster.validation_gpus else "cpu"
    source = Location(checkpoint.filesystem, checkpoint.path)
    pictures = validation_pictures(job.cluster.validation, config)
    with (
        torch.inference_mode(),
        source.local(".safetensors") as folder,
    ):
        others = Start(job)

        def load(number: int) -> LinearSR:
            trained = number == (job.expert or 0)
            return export.load(folder, model, others.base) if trained else others.expert(number)

        metrics, strip = validate(model, load, pictures, config, device)
    (job.run / "samples" / f"{source.name}.png").write(encode(Picture(strip), "png"))
    return metrics
