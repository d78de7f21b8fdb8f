"""Load weights by a bundled name, from a local folder, or from an s3:// one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection

from linearsr import weights
from linearsr.config import ModelConfig
from linearsr.errors import WeightsError
from linearsr.pipeline.upscaler import DEFAULT_TAGGER, Upscaler
from linearsr.storage.location import locate
from linearsr.storage.walk import Notes
from linearsr.tags.base import TaggerConfig


def load_upscaler(
    model: str,
    device: str,
    only: Collection[int] | None = None,
    *,
    compiled: bool = False,
    tagger: TaggerConfig = DEFAULT_TAGGER,
) -> Upscaler:
    """Load as `Upscaler.load` does, also from s3:// folders. Raises WeightsError or OptionError."""
    if not model.startswith("s3://"):
        return Upscaler.load(model, device, only, compiled=compiled, tagger=tagger)
    with locate(model).local(".safetensors") as folder:
        return Upscaler.load(folder, device, only, compiled=compiled, tagger=tagger)


def read_config(model: str) -> ModelConfig:
    """Read a model's config; a local model's tensors stay unread. Raises WeightsError."""
    if not model.startswith("s3://"):
        return weights.read_config(model)
    with locate(model).local(".safetensors") as folder:
        return weights.read_config(folder)


def absolute(model: str) -> str:
    """Return a model's folder as an absolute path, which workers need; keep a bundled name."""
    return os.path.abspath(model) if os.path.isdir(model) else model


def check_model(model: str) -> None:
    """Raise WeightsError for a path without a bundle; loads nothing, so any driver can run it."""
    if not model.startswith("s3://"):
        weights.read_config(model)
    elif not any(file.name.endswith(".safetensors") for file in locate(model).files()):
        raise WeightsError(f"{model}: no .safetensors file in this folder")


def fingerprint(model: str) -> str:
    """Return 12 hexadecimal digits that differ for weights of other names, sizes or beginnings.

    The first MiB of each file has its config, its provenance and the first tensors, which training
    changes. Raises WeightsError or InputError.
    """
    folder = locate(model if model.startswith("s3://") else weights.find(model))
    digest = hashlib.sha256()
    for file, size in folder.sizes(Notes()).items():
        name = file.relative_to(folder)
        if name.endswith(".safetensors") and "/" not in name:
            digest.update(f"{name} {size} ".encode() + file.head(1 << 20))
    return digest.hexdigest()[:12]
