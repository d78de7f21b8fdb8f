"""Checkpoint folders -> weights bundles, on one CPU: what is exported is always the EMA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from linearsr import weights
from linearsr.config import ModelConfig
from linearsr.denoiser import LinearSR
from linearsr.errors import WeightsError, one_line
from linearsr.training.ema import load_average


def average(checkpoint: Path, config: ModelConfig) -> dict[str, Tensor]:
    """The averaged weights of a checkpoint, checked to fit `config`.

    Raises WeightsError for an incomplete checkpoint, and for one of another config.
    """
    tensors = load_average(checkpoint)
    try:
        LinearSR(config.denoiser).load_state_dict(tensors)
    except RuntimeError as error:
        raise WeightsError(
            f"{checkpoint}: a checkpoint of another config than {config.name}'s: {one_line(error)}"
        ) from error
    return tensors


def bundle(
    folder: Path, config: ModelConfig, checkpoints: Sequence[Path], provenance: Mapping[str, str]
) -> None:
    """Write a bundle with one expert from each checkpoint folder, highest noise first."""
    weights.save(folder, config, [average(c, config) for c in checkpoints], provenance)


def single(config: ModelConfig) -> ModelConfig:
    """The same model without experts: one denoiser for all timesteps."""
    return with_boundaries(config, ())


def with_boundaries(config: ModelConfig, boundaries: tuple[float, ...]) -> ModelConfig:
    """The same model with other boundaries between its experts."""
    sampling = config.sampling.model_copy(update={"boundaries": boundaries})
    return config.model_copy(update={"sampling": sampling})
