"""Weights that a stage starts from: a bundled name, a local folder, or an s3:// one."""

from __future__ import annotations

from torch import Tensor

from linearsr import weights
from linearsr.cluster.config import StageConfig
from linearsr.cluster.storage import locate
from linearsr.errors import OptionError


def load_bundle(path: str) -> weights.Bundle:
    """A weights bundle. Raises WeightsError for what is none."""
    if path in weights.available():
        return weights.load(path)
    with locate(path).local(".safetensors") as folder:
        return weights.load(folder)


def start_weights(job: StageConfig) -> list[dict[str, Tensor]]:
    """One state dict per expert; the one model's for each of them if the start has no experts.

    Raises OptionError when the start's denoiser is not the recipe's.
    """
    bundle = load_bundle(str(job.start))
    if bundle.config.denoiser != job.recipe.model.denoiser:
        raise OptionError(f"{job.start}: weights of another denoiser config than the recipe's")
    states = [model.state_dict() for model in bundle.experts]
    return states if len(states) > 1 else states * max(1, len(job.recipe.experts))
