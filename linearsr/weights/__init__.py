"""Weights: bundles of safetensors with their config inside, and conversion from Sana."""

from linearsr.weights.bundle import (
    Bundle,
    available,
    digest,
    expert_names,
    find,
    load,
    load_adapters,
    load_base,
    read_config,
    read_lora,
    save,
    save_adapted,
)

__all__ = [
    "Bundle",
    "available",
    "digest",
    "expert_names",
    "find",
    "load",
    "load_adapters",
    "load_base",
    "read_config",
    "read_lora",
    "save",
    "save_adapted",
]
