"""Experts that share the tensors of one base and differ by low-rank adapters (LoRA).

    W + alpha / rank * B A    (Hu et al. 2021, arXiv 2106.09685, equation 3)

Adapters have peft's names, as in `blocks.0.attention.qkv.lora_A.weight`. Training them is the
business of `linearsr.training.lora`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linearsr.config import DenoiserConfig, LoRAConfig
from linearsr.denoiser.model import LinearSR

Adapters = Mapping[str, Tensor]


class AdaptedLinear(nn.Module):
    """A linear layer whose `weight` is that of a shared base plus its own low-rank product.

    The sum is made when `weight` is read, and kept nowhere. So all code that reads weights
    (`cpu_block`, compiled blocks) gets the adapted one, and an expert holds no more than its
    adapters. Reading changes nothing: threads may run experts of one base at the same time.
    """

    bias: Tensor | None

    def __init__(self, base: nn.Linear, down: Tensor, up: Tensor, scale: float) -> None:
        """down: A (rank, inputs). up: B (outputs, rank). scale: alpha / rank."""
        super().__init__()
        self.base = base.weight
        self.register_parameter("bias", base.bias)
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.scale = scale

    @property
    def weight(self) -> Tensor:
        """The weight (outputs, inputs) of the expert."""
        return adapted_weight(self.base, self.down, self.up, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., inputs) to (..., outputs)."""
        return F.linear(x, self.weight, self.bias)


def adapted_weight(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Return weight + scale * up @ down, in the dtype of `weight`, rounded once."""
    return torch.addmm(weight, up.to(weight), down.to(weight), alpha=scale)


def layer_names(shape: DenoiserConfig, lora: LoRAConfig) -> list[str]:
    """Return the names of the layers of a `LinearSR` that get adapters."""
    layers = [x for x in lora.layers if shape.tag_dim is not None or "tag" not in x]
    return [f"blocks.{block}.{layer}" for block in range(shape.depth) for layer in layers]


def empty_adapters(shape: DenoiserConfig, lora: LoRAConfig) -> dict[str, Tensor]:
    """Return all adapters of an expert, as tensors on the "meta" device."""
    with torch.device("meta"):
        model, empty = LinearSR(shape), {}
        for name in layer_names(shape, lora):
            outputs, inputs = cast(nn.Linear, model.get_submodule(name)).weight.shape
            empty[f"{name}.lora_A.weight"] = torch.empty(lora.rank, inputs)
            empty[f"{name}.lora_B.weight"] = torch.empty(outputs, lora.rank)
    return empty


def adapt(base: LinearSR, adapters: Adapters, lora: LoRAConfig) -> LinearSR:
    """Return an expert that shares the tensors of `base` and adds its adapters to them.

    The adapters get the device and the dtype of the base.
    """
    with torch.device("meta"):
        expert = LinearSR(base.config)
    expert.load_state_dict(base.state_dict(), assign=True)
    for name, layer, down, up in _pairs(expert, adapters, lora):
        down, up = down.to(layer.weight), up.to(layer.weight)
        expert.set_submodule(name, AdaptedLinear(layer, down, up, lora.alpha / lora.rank))
    return expert.requires_grad_(False).eval()


@torch.no_grad()
def merge_(base: LinearSR, adapters: Adapters, lora: LoRAConfig) -> LinearSR:
    """Add adapters to the weights of `base` in place and return it.

    The result computes the same bits as that of `adapt`.
    """
    for _, layer, down, up in _pairs(base, adapters, lora):
        layer.weight.copy_(adapted_weight(layer.weight, down, up, lora.alpha / lora.rank))
    return base


def _pairs(
    model: LinearSR, adapters: Adapters, lora: LoRAConfig
) -> Iterator[tuple[str, nn.Linear, Tensor, Tensor]]:
    """Yield each adapted layer's name, the layer itself, A and B."""
    for name in layer_names(model.config, lora):
        layer = cast(nn.Linear, model.get_submodule(name))
        yield name, layer, adapters[f"{name}.lora_A.weight"], adapters[f"{name}.lora_B.weight"]
