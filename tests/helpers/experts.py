"""Experts with random weights."""

from __future__ import annotations

import torch

from linearsr.config import ModelConfig
from linearsr.denoiser import LinearSR


def random_experts(config: ModelConfig, count: int) -> list[LinearSR]:
    """Return different denoisers in which no layer is zero, so that every weight matters."""
    torch.manual_seed(1)
    models = [LinearSR(config.denoiser) for _ in range(count)]
    for model in models:
        torch.nn.init.normal_(model.out.weight, std=0.05)
        torch.nn.init.normal_(model.out.bias, std=0.05)
        for attention in model._tag_attentions():
            torch.nn.init.normal_(attention.out.weight, std=0.5)
    return models
