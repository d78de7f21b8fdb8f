"""Weights: bundles of safetensors with their config inside, and conversion from Sana."""

from linearsr.weights.bundle import (
    Bundle,
    LazyExperts,
    available,
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
    "LazyExperts",
    "available",
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
