"""Checkpoint folders -> weights bundles, on one CPU. The exported weights are always the EMA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from linearsr import weights
from linearsr.config import ModelConfig
from linearsr.denoiser import LinearSR
from linearsr.errors import WeightsError, one_line
from linearsr.training.ema import load_average


def load(checkpoint: Path, config: ModelConfig) -> LinearSR:
    """Load the averaged weights of a checkpoint folder as a model in float32.

    Raises WeightsError for an incomplete checkpoint, and for one of another config.
    """
    tensors = load_average(checkpoint)
    with torch.device("meta"):
        model = LinearSR(config.denoiser)
    try:
        model.load_state_dict(tensors, assign=True)  # the tensors themselves, not copies
    except RuntimeError as error:
        raise WeightsError(
            f"{checkpoint}: the weights of this checkpoint do not fit the config of {config.name}: "
            f"{one_line(error)}"
        ) from error
    return model


def average(checkpoint: Path, config: ModelConfig) -> dict[str, Tensor]:
    """Return the state dict of `load`. Raises WeightsError as it does."""
    return load(checkpoint, config).state_dict()


def bundle(
    folder: Path, config: ModelConfig, checkpoints: Sequence[Path], provenance: Mapping[str, str]
) -> None:
    """Write a bundle with one expert from each checkpoint folder, highest noise first.

    One expert is in memory at a time. Raises WeightsError as `load` does, and OutputError.
    """
    weights.save(folder, config, _Averages(checkpoints, config), provenance)


class _Averages(Sequence[Mapping[str, Tensor]]):
    """The averaged weights of checkpoints; each access reads one anew, since all may not fit."""

    def __init__(self, checkpoints: Sequence[Path], config: ModelConfig) -> None:
        self.checkpoints, self.config = checkpoints, config

    def __len__(self) -> int:
        return len(self.checkpoints)

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Tensor]: ...
    @overload
    def __getitem__(self, index: slice) -> _Averages: ...
    def __getitem__(self, index: int | slice) -> Mapping[str, Tensor] | _Averages:
        if isinstance(index, slice):
            return _Averages(self.checkpoints[index], self.config)
        return average(self.checkpoints[index], self.config)


def single(config: ModelConfig) -> ModelConfig:
    """Return the same model without experts: one denoiser for all timesteps."""
    return with_boundaries(config, ())


def with_boundaries(config: ModelConfig, boundaries: tuple[float, ...]) -> ModelConfig:
    """Return the same model with other boundaries between its experts."""
    sampling = config.sampling.model_copy(update={"boundaries": boundaries})
    return config.model_copy(update={"sampling": sampling})
