"""Train the adapters of an expert on a frozen base, with peft's layers (LoRA).

peft computes W x + alpha / rank * B (A x): the gradient of W, which is frozen, is never made. In
float32 and up to rounding this is `linearsr.denoiser.lora.adapt`. Knows nothing of Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from linearsr.config import LoRAConfig
from linearsr.denoiser import LinearSR
from linearsr.denoiser.lora import Adapters, adapt, layer_names
from linearsr.errors import require

# The name that peft gives to the adapters of a layer that has only one set of them.
_NAME = ".default."


class Origin(NamedTuple):
    """The adapters' shape, the digest of their base, and the folder that has the base."""

    config: LoRAConfig
    digest: str
    source: str

    @classmethod
    def of(cls, note: Mapping[str, str]) -> Origin | None:
        """Return what a checkpoint's file says in its metadata; None if it has whole weights.

        Raises KeyError or ValueError for a note that `note` has not written.
        """
        if "lora" not in note:
            return None
        config = LoRAConfig.model_validate_json(note["lora"])
        return cls(config, note["base"], note["source"])

    def note(self) -> dict[str, str]:
        """Return the metadata that `of` reads."""
        config = self.config.model_dump_json()
        return {"lora": config, "base": self.digest, "source": self.source}


def inject(base: LinearSR, config: LoRAConfig, adapters: Adapters | None = None) -> LinearSR:
    """Freeze a model, add adapters that can be trained to it in place, and return it.

    adapters: those to start from. By default A is random and B is zero, so that the model computes
    what the base does. Adapters that are all zero could never be trained, and count as none.
    Raises MissingExtra without peft.
    """
    require("train", "peft")
    from peft import LoraConfig, inject_adapter_in_model

    base.requires_grad_(False).train()
    # `cpu_block` would read the weights of peft's layers, which are those of the base alone.
    base.use_strips = False
    names = layer_names(base.config, config)
    settings = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=names)  # type: ignore[arg-type]
    inject_adapter_in_model(settings, base)
    if adapters is not None and any(tensor.any() for tensor in adapters.values()):
        with torch.no_grad():
            for name, parameter in trained(base).items():
                parameter.copy_(adapters[plain_name(name)])
    return base


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by their names: all of them without adapters."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def plain_name(name: str) -> str:
    """Return the name of an adapter in a bundle, for its name in a model with peft's layers."""
    return name.replace(_NAME, ".")


def sharing(
    model: LinearSR, config: LoRAConfig, adapters: Callable[[int], Adapters | None]
) -> Callable[[int], LinearSR]:
    """Return a function that makes other experts on the base of a model that is in training.

    The experts hold only their adapters. adapters: returns those of an expert by its number; None
    for one that is the base itself.
    """

    def load(expert: int) -> LinearSR:
        base, own = _base(model), adapters(expert)
        return base if own is None else adapt(base, own, config)

    return load


def _base(model: LinearSR) -> LinearSR:
    """Return the frozen base of a model with peft's layers, with the same tensors."""
    with torch.device("meta"):
        base = LinearSR(model.config)
    tensors: Mapping[str, Tensor] = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name
    }
    base.load_state_dict(tensors, assign=True)
    return base.requires_grad_(False).eval()
