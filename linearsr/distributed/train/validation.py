"""Validation beside training: Ray Train hands each new checkpoint to a task of its own."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from ray.train import Checkpoint
from torch import Tensor

from linearsr import weights
from linearsr.denoiser import LinearSR
from linearsr.distributed.train.config import StageConfig
from linearsr.distributed.train.start import start_weights
from linearsr.errors import InputError
from linearsr.imaging.files import READ_SUFFIXES, read
from linearsr.storage.location import Location, locate
from linearsr.training import export
from linearsr.training.ema import load_average
from linearsr.training.recipes import ValidationConfig
from linearsr.training.validation import validate


def validation_pictures(path: str, config: ValidationConfig) -> list[tuple[str, Tensor]]:
    """The first `config.pictures` of a folder, local or s3://: names and pixels in [0, 1].

    Raises InputError when there is none, and for one that cannot be decoded.
    """
    files = locate(path).files()
    pictures = [f for f in files if f".{f.name.rsplit('.', 1)[-1].lower()}" in READ_SUFFIXES]
    if not pictures:
        raise InputError(f"{path}: no pictures to validate on")
    chosen = pictures[: config.pictures]
    return [(f.name, read(f.read(), name=f.path).pixels[:3]) for f in chosen]


def validate_checkpoint(checkpoint: Checkpoint, stage_json: str) -> dict[str, Any]:
    """Metrics of the averaged weights, as Ray Train's validation hook wants them.

    Also writes the strip of samples beside the checkpoints.
    """
    job = StageConfig.model_validate_json(stage_json)
    source = Location(checkpoint.filesystem, checkpoint.path)
    with source.local(".safetensors") as folder:
        bundle = _bundle(job, load_average(folder))
    config = job.recipe.validation
    # Ray shows all GPUs to a task that reserved none: those are the workers'.
    device = "cuda" if job.cluster.validation_gpus else "cpu"
    with torch.inference_mode():
        pictures = validation_pictures(job.cluster.validation, config)
        metrics, strip = validate(bundle, pictures, config, device)
    (job.run / "samples" / f"{source.name}.png").write(_png(strip))
    return metrics


def _bundle(job: StageConfig, average: dict[str, Tensor]) -> weights.Bundle:
    """The checkpoint as users would meet it: an expert among the others it was started with."""
    model = LinearSR(job.recipe.model.denoiser)
    model.load_state_dict(average)
    model.requires_grad_(False).eval()
    if job.expert is None:
        return weights.Bundle(export.single(job.recipe.model), [model], {})
    experts = [LinearSR(job.recipe.model.denoiser) for _ in job.recipe.experts]
    for other, tensors in zip(experts, start_weights(job), strict=True):
        other.load_state_dict(tensors)
        other.requires_grad_(False).eval()
    experts[job.expert] = model
    return weights.Bundle(job.recipe.model, experts, {})


def _png(strip: Tensor) -> bytes:
    pixels = (strip * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
    return buffer.getvalue()
