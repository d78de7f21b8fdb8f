"""Load weights by a bundled name, from a local folder, or from an s3:// one."""

from __future__ import annotations

import os
from collections.abc import Collection

from linearsr import weights
from linearsr.config import Acceleration, LoRAConfig, ModelConfig
from linearsr.errors import WeightsError
from linearsr.hub import on_this_machine
from linearsr.pipeline.upscaler import DEFAULT_TAGGER, PLAIN, Upscaler
from linearsr.storage.location import locate
from linearsr.tags.base import TaggerConfig


def local_folder(model: str) -> str:
    """Return a bundled name or a local folder as it is, and this machine's copy of an s3:// one.

    Raises WeightsError, as `linearsr.hub.on_this_machine` does.
    """
    return on_this_machine(model, ".safetensors")


def load_upscaler(
    model: str,
    device: str,
    only: Collection[int] | None = None,
    *,
    acceleration: Acceleration = PLAIN,
    tagger: TaggerConfig = DEFAULT_TAGGER,
) -> Upscaler:
    """Load as `Upscaler.load` does, also from s3:// folders. Raises WeightsError or OptionError."""
    folder = local_folder(model)
    return Upscaler.load(folder, device, only, acceleration=acceleration, tagger=tagger)


def read_config(model: str) -> ModelConfig:
    """Read a model's config; a local model's tensors stay unread. Raises WeightsError."""
    return weights.read_config(local_folder(model))


def read_lora(model: str) -> LoRAConfig | None:
    """Read the shape of a model's adapters as `read_config` does; None if it has none."""
    return weights.read_lora(local_folder(model))


def absolute(model: str) -> str:
    """Return a model's folder as an absolute path, which workers need; keep a bundled name."""
    return os.path.abspath(model) if os.path.isdir(model) else model


def check_model(model: str) -> None:
    """Raise WeightsError for a path without a bundle; loads nothing, so any driver can run it."""
    if not model.startswith("s3://"):
        weights.read_config(model)
    elif not locate(model).etags(".safetensors"):
        raise WeightsError(f"{model}: no .safetensors file in this folder")


def fingerprint(model: str) -> str:
    """Return 12 hexadecimal digits that differ for weights of other names, sizes or beginnings.

    The first MiB of each file has its config, its provenance and the first tensors, which training
    changes. Raises WeightsError or InputError.
    """
    folder = locate(model if model.startswith("s3://") else weights.find(model))
    return folder.fingerprint(".safetensors")[:12]
