"""Weights: bundles of safetensors with their config inside, and conversion from Sana."""

from linearsr.weights.bundle import Bundle, available, expert_names, find, load, read_config, save

__all__ = ["Bundle", "available", "expert_names", "find", "load", "read_config", "save"]
