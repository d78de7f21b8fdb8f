"""Checkpoint folders -> weights bundles, on one CPU. The exported weights are always the EMA.

A checkpoint of adapters (LoRA) needs the base that they were trained on, which has the digest that
the checkpoint names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from linearsr import weights
from linearsr.config import ModelConfig
from linearsr.denoiser import LinearSR
from linearsr.denoiser.lora import empty_adapters, merge_
from linearsr.digests import digest_tensors
from linearsr.errors import WeightsError, one_line
from linearsr.training.ema import load_average, read_origin
from linearsr.training.lora import Origin, plain_name

Base = Callable[[], LinearSR]


def load(checkpoint: Path, config: ModelConfig, base: Base | None = None) -> LinearSR:
    """Load the averaged weights of a checkpoint folder as a model in float32.

    base: returns a model in float32, to which a checkpoint's adapters are added in place.
    Raises WeightsError for an incomplete checkpoint, for one of another config, and for adapters of
    another base.
    """
    origin = read_origin(checkpoint)
    if origin is not None:
        model = _base_of(checkpoint, origin, base)
        return merge_(model, _tensors(checkpoint, config, origin), origin.config)
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


def adapters(checkpoint: Path, config: ModelConfig, origin: Origin) -> dict[str, Tensor] | None:
    """Return a checkpoint's averaged adapters on the base of `origin`; None if it is that base.

    Raises WeightsError for adapters of another shape or another base, and for whole weights that
    are not the base.
    """
    theirs = read_origin(checkpoint)
    if theirs is None:
        if digest_tensors(average(checkpoint, config)) == origin.digest:
            return None
        raise WeightsError(
            f"{checkpoint}: has whole weights, and not adapters on the base of the others; train "
            "all experts with the same `lora`, from the same weights"
        )
    if theirs[:2] != origin[:2]:
        part = "shape" if theirs.digest == origin.digest else "base"
        raise WeightsError(
            f"{checkpoint}: its adapters (LoRA) have another {part} than those of the other "
            "experts; train all experts with the same `lora`, from the same weights"
        )
    return _tensors(checkpoint, config, origin)


def bundle(
    folder: Path,
    config: ModelConfig,
    checkpoints: Sequence[Path],
    provenance: Mapping[str, str],
    base: Base | None = None,
) -> None:
    """Write a bundle with one expert from each checkpoint folder, highest noise first.

    Checkpoints of adapters become a bundle of adapters, with their base once; a checkpoint of the
    base itself becomes adapters of zeros. base: see `load`.
    One expert is in memory at a time. Raises WeightsError as `load` does, and OutputError.
    """
    origins = [(checkpoint, read_origin(checkpoint)) for checkpoint in checkpoints]
    adapted = next((one for one in origins if one[1] is not None), None)
    if adapted is None:
        experts = weights.LazyExperts(
            len(checkpoints), lambda number: average(checkpoints[number], config)
        )
        weights.save(folder, config, experts, provenance)
        return
    checkpoint, origin = adapted
    assert origin is not None
    tensors = _base_of(checkpoint, origin, base).state_dict()
    own = [
        adapters(checkpoint, config, origin) or _zeros(config, origin) for checkpoint in checkpoints
    ]
    weights.save_adapted(folder, config, tensors, origin.config, own, provenance)


def _base_of(checkpoint: Path, origin: Origin, base: Base | None) -> LinearSR:
    if base is None:
        raise WeightsError(
            f"{checkpoint}: has only adapters (LoRA); the base that they need is in {origin.source}"
        )
    model = base()
    if digest_tensors(model.state_dict()) != origin.digest:
        raise WeightsError(
            f"{checkpoint}: its adapters (LoRA) were trained on another base than this one; it was "
            f"in {origin.source}"
        )
    return model


def _tensors(checkpoint: Path, config: ModelConfig, origin: Origin) -> dict[str, Tensor]:
    tensors = {plain_name(name): tensor for name, tensor in load_average(checkpoint).items()}
    expected = empty_adapters(config.denoiser, origin.config)
    if {k: v.shape for k, v in tensors.items()} != {k: v.shape for k, v in expected.items()}:
        raise WeightsError(
            f"{checkpoint}: the adapters of this checkpoint do not fit the config of {config.name}"
        )
    return tensors


def _zeros(config: ModelConfig, origin: Origin) -> dict[str, Tensor]:
    empty = empty_adapters(config.denoiser, origin.config)
    return {name: torch.zeros(tensor.shape) for name, tensor in empty.items()}


def single(config: ModelConfig) -> ModelConfig:
    """Return the same model without experts: one denoiser for all timesteps."""
    return with_boundaries(config, ())


def with_boundaries(config: ModelConfig, boundaries: tuple[float, ...]) -> ModelConfig:
    """Return the same model with other boundaries between its experts."""
    sampling = config.sampling.model_copy(update={"boundaries": boundaries})
    return config.model_copy(update={"sampling": sampling})
