"""Weights by a bundled name, from a local folder, or an s3:// one."""

from __future__ import annotations

import os
from collections.abc import Collection

from torch import Tensor

from linearsr import weights
from linearsr.cluster.config import StageConfig
from linearsr.cluster.storage import locate
from linearsr.config import ModelConfig
from linearsr.errors import OptionError, WeightsError
from linearsr.upscaler import Upscaler


def load_bundle(path: str, only: Collection[int] | None = None) -> weights.Bundle:
    """A weights bundle, or `only` some of its experts. Raises WeightsError for what is none."""
    if path in weights.available():
        return weights.load(path, only=only)
    with locate(path).local(".safetensors") as folder:
        return weights.load(folder, only=only)


def load_upscaler(
    model: str, device: str, only: Collection[int] | None = None, *, compiled: bool = False
) -> Upscaler:
    """`Upscaler.load`, for s3:// folders as well. Raises WeightsError or OptionError."""
    if not model.startswith("s3://"):
        return Upscaler.load(model, device, only, compiled=compiled)
    with locate(model).local(".safetensors") as folder:
        return Upscaler.load(folder, device, only, compiled=compiled)


def read_config(model: str) -> ModelConfig:
    """A model's config, without its tensors where it lies on a disk. Raises WeightsError."""
    if not model.startswith("s3://"):
        return weights.read_config(model)
    with locate(model).local(".safetensors") as folder:
        return weights.read_config(folder)


def absolute(model: str) -> str:
    """A model's name, or its folder from any working folder: workers have their own."""
    return os.path.abspath(model) if os.path.isdir(model) else model


def check_model(model: str) -> None:
    """Raise WeightsError for what is no bundle: on the driver, where loading it might not fit."""
    if not model.startswith("s3://"):
        weights.read_config(model)
    elif not any(file.name.endswith(".safetensors") for file in locate(model).files()):
        raise WeightsError(f"{model}: no .safetensors file in this folder")


def start_weights(job: StageConfig, only: Collection[int] | None = None) -> list[dict[str, Tensor]]:
    """One state dict per expert; the one model's for each of them if the start has no experts.

    only: the experts that are needed, where not all are; the first always is, for it may be the
    one model. The others have no data.
    Raises OptionError when the start's denoiser is not the recipe's.
    """
    bundle = load_bundle(str(job.start), None if only is None else {0, *only})
    if bundle.config.denoiser != job.recipe.model.denoiser:
        raise OptionError(f"{job.start}: weights of another denoiser config than the recipe's")
    states = [model.state_dict() for model in bundle.experts]
    return states if len(states) > 1 else states * max(1, len(job.recipe.experts))
