"""Experts that share a base and differ by random adapters."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from linearsr import weights
from linearsr.config import LoRAConfig, ModelConfig
from linearsr.denoiser import LinearSR
from linearsr.denoiser.lora import empty_adapters
from tests.helpers.experts import random_experts

LORA = LoRAConfig(rank=4, alpha=8)


def random_base(config: ModelConfig) -> LinearSR:
    """Return a denoiser in which no layer is zero, frozen."""
    return random_experts(config, 1)[0].requires_grad_(False).eval()


def random_adapters(config: ModelConfig, seed: int, lora: LoRAConfig = LORA) -> dict[str, Tensor]:
    """Return adapters that change each of their layers by about a third."""
    generator = torch.Generator().manual_seed(seed)
    empty = empty_adapters(config.denoiser, lora)
    return {
        name: 0.15 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in empty.items()
    }


def save_adapted(
    folder: Path,
    config: ModelConfig,
    lora: LoRAConfig = LORA,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a bundle of a random base and the random adapters of all experts; return its folder."""
    base = random_base(config).state_dict()
    experts = [random_adapters(config, n, lora) for n in range(len(weights.expert_names(config)))]
    weights.save_adapted(folder, config, base, lora, experts, {"licence": "test"}, dtype)
    return folder
