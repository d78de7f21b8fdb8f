"""The models that are compared: one set of random weights at a real config, run in several ways."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from linearsr.config import DenoiserConfig, ModelConfig
from linearsr.denoiser import Condition, LinearSR
from linearsr.denoiser.blocks import LinearAttention
from linearsr.training.count import counted
from linearsr.weights.convert import from_diffusers

TAGS = 4
TAG_DIM = 32  # of a model that is shipped without: Sana always has cross-attention
Forward = Callable[[], Tensor]


class SoftmaxAttention(LinearAttention):
    """The attention that linear attention replaces, with the same weights and norms."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        b, h, w, c = x.shape
        q, k, v = self.qkv(x.reshape(b, h * w, c)).chunk(3, dim=-1)
        q, k, v = (self.heads(y).transpose(1, 2) for y in (self.norm_q(q), self.norm_k(k), v))
        o = F.scaled_dot_product_attention(q, k, v)
        return self.out(o.transpose(1, 2).reshape(b, h, w, c))


class Inputs(NamedTuple):
    """Inputs of one forward, for an output of a given side."""

    latent: Tensor
    t: Tensor
    tags: Tensor


class Contestants:
    """diffusers' `SanaTransformer2DModel` of a config, and our model with its weights."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        torch._dynamo.reset()  # what was compiled for other models counts against this one
        self.config, self.device, self.dtype = config, device, dtype
        sana = sana_of(config.denoiser)
        with tempfile.TemporaryDirectory() as folder:
            sana.save_pretrained(folder)
            converted = from_diffusers(Path(folder))
        ours = LinearSR(converted.config)
        ours.load_state_dict({**ours.state_dict(), **converted.tensors})
        self.sana = sana.to(device, dtype).eval()
        self.ours = ours.to(device, dtype).eval()
        self.compiled_sana: Any = torch.compile(self.sana, dynamic=False)
        self.compiled_ours: Any = torch.compile(_plain(self.ours), dynamic=False)

    def inputs(self, side: int) -> Inputs:
        """Return random inputs for a picture of side x side pixels, in the models' precision."""
        cells, channels = side // self.config.latent.factor, self.config.denoiser.latent_channels
        shapes = (1, channels, cells, cells), (1, TAGS, self.ours.config.tag_dim or 0)
        latent, tags = (
            torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in shapes
        )
        latent, tags = (x.to(self.device, self.dtype) for x in (latent, tags))
        return Inputs(latent, torch.tensor([0.5], device=self.device), tags)

    def condition(self, inputs: Inputs) -> Condition:
        """Return the condition of Sana: of a converted model whose LR stem has no effect yet."""
        embedded = self.ours.embed.bias.expand(1, *inputs.latent.shape[2:], -1)
        return Condition(embedded, self.ours.tag_keys(inputs.tags))

    def forwards(self, inputs: Inputs, compiled: bool) -> dict[str, Forward]:
        """Return functions for every way to compute the same, and softmax attention, by name."""
        condition = self.condition(inputs)
        last = inputs.latent.contiguous(memory_format=torch.channels_last)
        plain = _plain(self.ours)
        ways: dict[str, Forward] = {
            "diffusers": lambda: _theirs(self.sana, inputs),
            "LinearSR": lambda: self.ours(last, inputs.t, condition),
            "LinearSR, plain order": lambda: plain(last, inputs.t, condition),
        }
        if compiled:
            ways["diffusers, compiled"] = lambda: _theirs(self.compiled_sana, inputs)
            ways["LinearSR, compiled"] = lambda: self.compiled_ours(last, inputs.t, condition)
        other = softmax(self.ours)
        ways["softmax attention"] = lambda: other(last, inputs.t, condition)
        return ways

    def flops(self, side: int) -> int:
        """Return the counted operations of one forward, including the few of linear attention."""

        def forward() -> Forward:
            inputs = self.inputs(side)
            condition = self.condition(inputs)
            return lambda: _plain(self.ours)(inputs.latent, inputs.t, condition)

        return counted(forward)


def sana_of(config: DenoiserConfig) -> Any:
    """Return diffusers' Sana of this shape, with random weights."""
    from diffusers import SanaTransformer2DModel

    heads = config.tag_heads if config.tag_dim else config.width // config.head_dim
    return SanaTransformer2DModel(
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        num_attention_heads=config.width // config.head_dim,
        attention_head_dim=config.head_dim,
        num_layers=config.depth,
        num_cross_attention_heads=heads,
        cross_attention_head_dim=config.width // heads,
        cross_attention_dim=config.width,
        caption_channels=config.tag_dim or TAG_DIM,
        mlp_ratio=config.ffn_ratio,
        qk_norm="rms_norm_across_heads",
    )


def _theirs(sana: Any, inputs: Inputs) -> Tensor:
    """diffusers' forward, as a pipeline calls it: t on [0, 1000], channels first."""
    out: Tensor = sana(inputs.latent, inputs.tags, inputs.t * 1000, return_dict=False)[0]
    return out


def _plain(model: LinearSR) -> LinearSR:
    """The same parameters in the plain order of layers."""
    plain = copy.copy(model)
    plain.use_strips = False
    return plain


def softmax(model: LinearSR) -> LinearSR:
    """Return a model of the same parameters with softmax attention."""
    memo = {id(p): p for p in model.parameters()}
    other = copy.deepcopy(model, memo)
    other.use_strips = False
    for block in other.blocks:
        block.attention.__class__ = SoftmaxAttention
    return other
