"""Read the tensors of other programs' files; code inside a file is never run."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from linearsr.errors import WeightsError, one_line
from linearsr.weights.convert.layout import some

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")

# Entries of a training checkpoint that hold the state of training and no weights.
_TRAINING = ("optimizer", "scheduler", "loss_scaler", "grad_scaler", "rng_state", "callbacks")


class Read(NamedTuple):
    """The content of a file.

    tensors: in the order of the file, under dotted names.
    dropped: entries that are no weights: plain values, and the state of training.
    ordered: whether the order is that of the model's layers; safetensors sorts by name.
    """

    tensors: dict[str, Tensor]
    dropped: list[str]
    ordered: bool


def read_file(path: Path) -> Read:
    """Read a .safetensors file, or a pickle that holds tensors in plain containers alone.

    Tensors of either stay on disk until they are used, where the format allows it. Raises
    WeightsError if the file is missing or damaged, holds no tensors, or asks for code to be run.
    """
    if path.suffix == ".safetensors":
        return Read(read_safetensors(path), [], ordered=False)
    loaded = _read_pickle(path)
    tensors, dropped = {}, []
    for name, value in _entries(loaded if isinstance(loaded, dict) else {}):
        training = name.split(".")[0].startswith(_TRAINING)
        if training or not isinstance(value, Tensor):
            dropped.append(name.split(".")[0] if training else name)
        else:
            tensors[name] = value
    if not tensors:
        raise WeightsError(f"{path}: holds no state dict")
    return Read(tensors, list(dict.fromkeys(dropped)), ordered=True)


def _entries(container: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested dicts under dotted names."""
    for key, value in container.items():
        if isinstance(value, dict) and value:
            yield from _entries(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read_pickle(path: Path) -> Any:
    try:
        mapped = zipfile.is_zipfile(path)  # the format before PyTorch 1.6 cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {one_line(error)}") from error
    except pickle.UnpicklingError as error:
        # torch's own message advises weights_only=False, which would run whatever is inside.
        code = _code_of(path, error)
        raise WeightsError(
            f"{path}: this pickle calls {some(code)}; nothing of it was run or loaded. Get the "
            "weights as safetensors"
            if code
            else f"{path}: damaged, or holds more than tensors; not loaded"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise WeightsError(f"{path}: damaged: {one_line(error)}") from error


def _code_of(path: Path, error: Exception) -> list[str]:
    """Return the names of functions and classes that a refused pickle wants, without loading it."""
    try:
        return get_unsafe_globals_in_checkpoint(path)
    except (ValueError, RuntimeError, pickle.UnpicklingError):  # no zip file
        return re.findall(r"GLOBAL ([\w.]+)", str(error))


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Raises WeightsError if the file is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: cannot be read: {one_line(error)}") from error


def read_shards(index: Path) -> dict[str, Tensor]:
    """Read the shards that an index of safetensors names. Raises WeightsError for a missing one."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict):
        raise WeightsError(f"{index}: this index has no weight_map")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(shards.values())):
        tensors |= read_safetensors(index.parent / shard)
    lost = sorted(set(shards) - set(tensors))
    if lost:
        raise WeightsError(
            f"{index}: no weights file holds these tensors of the index: {some(lost)}"
        )
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file of JSON. Raises WeightsError if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{path}: is missing; give a complete diffusers folder") from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: is not a JSON object")
    return content
