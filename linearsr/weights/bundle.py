"""A model on disk: a folder with a safetensors file per expert.

The config and provenance are in the files' metadata, so loading needs nothing but the folder.
Knows nothing of training states or of Ray.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from linearsr.config import ModelConfig, explain
from linearsr.denoiser import LinearSR
from linearsr.diffusion.experts import EXPERTS
from linearsr.errors import OutputError, WeightsError, did_you_mean, one_line
from linearsr.storage import atomic

BUNDLED = Path(__file__).parent
_PROVENANCE: TypeAdapter[dict[str, str]] = TypeAdapter(dict[str, str])


class Bundle(NamedTuple):
    """A loaded model; `experts` from highest noise to lowest."""

    config: ModelConfig
    experts: list[LinearSR]
    provenance: dict[str, str]


def expert_names(config: ModelConfig) -> list[str]:
    """Return the experts' file stems, highest noise first; one expert without `boundaries`."""
    count = len(config.sampling.boundaries) + 1
    return list(EXPERTS) if count == len(EXPERTS) else [f"expert-{i}" for i in range(count)]


def available() -> list[str]:
    """Return the names of the models that come with the package."""
    return sorted(p.name for p in BUNDLED.iterdir() if any(p.glob("*.safetensors")))


def find(name_or_folder: str | Path) -> Path:
    """Return the folder of a bundled model, or a folder itself. Raises WeightsError for others."""
    if str(name_or_folder) in available():
        return BUNDLED / name_or_folder
    if os.path.isdir(name_or_folder):  # unlike Path.is_dir, False for a name that is too long
        return Path(name_or_folder)
    raise WeightsError(
        f"unknown model {str(name_or_folder)!r}: bundled are {', '.join(available()) or 'none'}; "
        "anything else must be a folder of safetensors"
        f"{did_you_mean(str(name_or_folder), available())}"
    )


def save(
    folder: Path,
    config: ModelConfig,
    experts: Sequence[Mapping[str, Tensor]],
    provenance: Mapping[str, str],
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write one safetensors per expert into `folder`; each is complete before it gets its name.

    Experts are taken one at a time, twice in all, and not kept, so the sequence may load them then.
    Raises WeightsError for a wrong number of experts or values that are not finite, and OutputError
    if a file cannot be written.
    """
    names = expert_names(config)
    if len(names) != len(experts):
        raise WeightsError(f"the config asks for {len(names)} experts, got {len(experts)}")
    for number, name in enumerate(names):
        _check_finite(experts[number], name)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"linearsr": config.model_dump_json(), "provenance": json.dumps(dict(provenance))}
    for number, name in enumerate(names):
        path = folder / f"{name}.safetensors"
        tensors = {k: v.detach().to(dtype).contiguous() for k, v in experts[number].items()}
        try:
            with atomic.replace_file(path) as temporary:
                save_file(tensors, temporary, metadata={**metadata, "expert": name})
        except (OSError, SafetensorError) as error:
            raise OutputError(f"{path}: cannot be written: {one_line(error)}") from error
        del tensors  # before the next expert is loaded


def load(
    name_or_folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    only: Collection[int] | None = None,
) -> Bundle:
    """Load a bundle.

    only: the numbers of the experts to load; the others are a `placeholder`. None loads all.

    Raises WeightsError naming a file that is missing, damaged, of a wrong shape or not finite.
    """
    config, provenance, files = _read_folder(find(name_or_folder))
    experts = [
        _load_expert(path, config).to(device, dtype)
        if only is None or number in only
        else placeholder(config)
        for number, path in enumerate(files)
    ]
    return Bundle(config, experts, provenance)


def placeholder(config: ModelConfig) -> LinearSR:
    """Return an expert on the "meta" device: it needs no memory and cannot be run."""
    with torch.device("meta"):
        return LinearSR(config.denoiser).requires_grad_(False).eval()


def read_config(name_or_folder: str | Path) -> ModelConfig:
    """Return a bundle's config without loading tensors.

    Raises WeightsError, also for a missing expert.
    """
    return _read_folder(find(name_or_folder))[0]


def _read_folder(folder: Path) -> tuple[ModelConfig, dict[str, str], list[Path]]:
    """Return the config, the provenance, and the file of each expert."""
    present = sorted(folder.glob("*.safetensors"))
    if not present:
        raise WeightsError(f"{folder}: no .safetensors file in this folder")
    config, provenance = _read_metadata(present[0])
    files = [folder / f"{name}.safetensors" for name in expert_names(config)]
    for path in files:
        if not os.path.isfile(path):
            raise WeightsError(
                f"{path}: this expert's file is missing; copy the whole folder again"
            )
    return config, provenance, files


def _read_metadata(path: Path) -> tuple[ModelConfig, dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        config = ModelConfig.model_validate_json(metadata["linearsr"])
        return config, _PROVENANCE.validate_json(metadata["provenance"])
    except KeyError:
        raise WeightsError(
            f"{path}: no LinearSR config inside; convert it first (linearsr.weights.convert)"
        ) from None
    except (SafetensorError, OSError, ValueError) as error:
        reason: Exception | str = error
        if isinstance(error, ValidationError):
            reason = ": ".join(filter(None, explain(error)))
        raise WeightsError(
            f"{path}: cannot be read as LinearSR weights: {one_line(reason)}"
        ) from error


def _load_expert(path: Path, config: ModelConfig) -> LinearSR:
    if _read_metadata(path)[0] != config:
        raise WeightsError(
            f"{path}: its config differs from that of the other files in this folder; do not mix "
            "files of different models"
        )
    try:
        with safe_open(path, "pt") as file:
            _check_shapes(file, config, path)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: damaged: {one_line(error)}") from error
    _check_finite(tensors, path)
    model = LinearSR(config.denoiser)
    model.load_state_dict(tensors)
    return model.float().requires_grad_(False).eval()


def _check_shapes(file: Any, config: ModelConfig, path: Path) -> None:
    """Raise WeightsError unless an open file has the tensors of the config, before any is read.

    A config may ask for more than fits into memory, so the model is made on "meta"; and for more
    blocks than the file has tensors, so these are counted first.
    """
    names = set(file.keys())
    if len(names) < config.denoiser.depth:
        raise WeightsError(
            f"{path}: does not fit its config: {len(names)} tensors for {config.denoiser.depth} "
            "blocks"
        )
    expected = placeholder(config).state_dict()
    odd = sorted(names ^ expected.keys())
    odd += [k for k in names & expected.keys() if _shape(file, k) != tuple(expected[k].shape)]
    if odd:
        raise WeightsError(
            f"{path}: does not fit its config: tensors that are missing, too many or of another "
            f"shape: {len(odd)}, such as {odd[0]}"
        )


def _shape(file: Any, name: str) -> tuple[int, ...]:
    return tuple(file.get_slice(name).get_shape())


def _check_finite(tensors: Mapping[str, Tensor], where: str | Path) -> None:
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise WeightsError(f"{where}: {key} holds NaN or infinity; this file is not usable")
