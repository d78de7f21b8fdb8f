"""The names and shapes of a denoiser's tensors in each layout, and how they become LinearSR's.

A layout lists, for each of our layers and bare parameters, the source's tensors that are joined
for it. `{}` is a block's number. Sana: arXiv 2410.10629.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from linearsr.config import LINEARSR_1_6B, DenoiserConfig
from linearsr.denoiser import LinearSR
from linearsr.denoiser.conditioning import LRStem
from linearsr.errors import WeightsError, one_line

Layout = Mapping[str, tuple[str, ...]]

DIFFUSERS: Layout = {
    "embed": ("patch_embed.proj",),
    "time.hidden": ("time_embed.emb.timestep_embedder.linear_1",),
    "time.embed": ("time_embed.emb.timestep_embedder.linear_2",),
    "time.modulation": ("time_embed.linear",),
    "tags.hidden": ("caption_projection.linear_1",),
    "tags.out": ("caption_projection.linear_2",),
    "tags.norm": ("caption_norm",),
    "blocks.{}.modulation": ("transformer_blocks.{}.scale_shift_table",),
    "blocks.{}.attention.qkv": (
        "transformer_blocks.{}.attn1.to_q",
        "transformer_blocks.{}.attn1.to_k",
        "transformer_blocks.{}.attn1.to_v",
    ),
    "blocks.{}.attention.norm_q": ("transformer_blocks.{}.attn1.norm_q",),
    "blocks.{}.attention.norm_k": ("transformer_blocks.{}.attn1.norm_k",),
    "blocks.{}.attention.out": ("transformer_blocks.{}.attn1.to_out.0",),
    "blocks.{}.tag_attention.q": ("transformer_blocks.{}.attn2.to_q",),
    "blocks.{}.tag_attention.kv": (
        "transformer_blocks.{}.attn2.to_k",
        "transformer_blocks.{}.attn2.to_v",
    ),
    "blocks.{}.tag_attention.norm_q": ("transformer_blocks.{}.attn2.norm_q",),
    "blocks.{}.tag_attention.norm_k": ("transformer_blocks.{}.attn2.norm_k",),
    "blocks.{}.tag_attention.out": ("transformer_blocks.{}.attn2.to_out.0",),
    "blocks.{}.ffn.expand": ("transformer_blocks.{}.ff.conv_inverted",),
    "blocks.{}.ffn.depthwise": ("transformer_blocks.{}.ff.conv_depth",),
    "blocks.{}.ffn.project": ("transformer_blocks.{}.ff.conv_point",),
    "modulation": ("scale_shift_table",),
    "out": ("proj_out",),
}

SANA: Layout = {
    "embed": ("x_embedder.proj",),
    "time.hidden": ("t_embedder.mlp.0",),
    "time.embed": ("t_embedder.mlp.2",),
    "time.modulation": ("t_block.1",),
    "tags.hidden": ("y_embedder.y_proj.fc1",),
    "tags.out": ("y_embedder.y_proj.fc2",),
    "tags.norm": ("attention_y_norm",),
    "blocks.{}.modulation": ("blocks.{}.scale_shift_table",),
    "blocks.{}.attention.qkv": ("blocks.{}.attn.qkv",),
    "blocks.{}.attention.norm_q": ("blocks.{}.attn.q_norm",),
    "blocks.{}.attention.norm_k": ("blocks.{}.attn.k_norm",),
    "blocks.{}.attention.out": ("blocks.{}.attn.proj",),
    "blocks.{}.tag_attention.q": ("blocks.{}.cross_attn.q_linear",),
    "blocks.{}.tag_attention.kv": ("blocks.{}.cross_attn.kv_linear",),
    "blocks.{}.tag_attention.norm_q": ("blocks.{}.cross_attn.q_norm",),
    "blocks.{}.tag_attention.norm_k": ("blocks.{}.cross_attn.k_norm",),
    "blocks.{}.tag_attention.out": ("blocks.{}.cross_attn.proj",),
    "blocks.{}.ffn.expand": ("blocks.{}.mlp.inverted_conv.conv",),
    "blocks.{}.ffn.depthwise": ("blocks.{}.mlp.depth_conv.conv",),
    "blocks.{}.ffn.project": ("blocks.{}.mlp.point_conv.conv",),
    "modulation": ("final_layer.scale_shift_table",),
    "out": ("final_layer.linear",),
}

OURS: Layout = {name: (name,) for name in SANA}

LAYOUTS: dict[str, Layout] = {"NVlabs": SANA, "diffusers": DIFFUSERS, "LinearSR": OURS}

# Reasons why options of Sana's family are refused.
WHY = {
    "interpolation_scale": "sincos positions (2K and 4K models); LinearSR has no positions",
    "guidance_embeds": "a guidance embedding (Sana-Sprint); LinearSR has none",
    "patch_size": "patches; LinearSR takes each latent pixel as one token",
}

# The word for tensors, and columns of `embed`, that are left out on purpose.
DROP = "drop"

_SHOWN = 8


class Conversion(NamedTuple):
    """Converted weights of one expert.

    config: the denoiser's shape.
    tensors: a full float32 state dict of `LinearSR(config)`.
    dropped: the source's keys that LinearSR does not use.
    fresh: our keys that the source has no tensors for, with new values.
    """

    config: DenoiserConfig
    tensors: dict[str, Tensor]
    dropped: tuple[str, ...]
    fresh: tuple[str, ...]


class Place(NamedTuple):
    """The place of a source's tensor in LinearSR.

    key: our key, with `{}` for a block's number.
    part: which of the tensors that are joined for the key.
    shape: the tensor's shape, without a 1x1 kernel.
    """

    key: str
    part: int
    shape: tuple[int, ...]


Recipe = Mapping[str, Sequence[str]]
"""For each of our keys the names of the source's tensors that are joined for it."""


def places(config: DenoiserConfig, layout: Layout) -> dict[str, Place]:
    """Return the place of each of the layout's names, `{}` for the number of a block.

    The LR stem has no place, because no layout but ours has it.
    """
    found = {}
    for key, shape in shapes(config.model_copy(update={"depth": 1})).items():
        if not key.startswith("stem."):
            key = key.replace("blocks.0.", "blocks.{}.")
            layer, dot, leaf = key.rpartition(".") if _has_leaf(key) else (key, "", "")
            names = layout[layer]
            first = (config.latent_channels,) if key == "embed.weight" else shape[1:]
            part_shape = (shape[0] // len(names), *first)
            for part, name in enumerate(names):
                found[f"{name}{dot}{leaf}"] = Place(key, part, part_shape)
    return found


def _has_leaf(key: str) -> bool:
    return key.endswith((".weight", ".bias"))


def recipe_of(found: Mapping[str, Place], depth: int) -> dict[str, list[str]]:
    """Return the recipe of a source that has all names of `places` as they are."""
    recipe: dict[str, list[str]] = {}
    for number in range(depth):
        for name, place in found.items():
            if "{}" in name or number == 0:
                recipe.setdefault(place.key.format(number), []).append(name.format(number))
    return recipe


def shapes(config: DenoiserConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of `LinearSR(config)`."""
    with torch.device("meta"):
        return {key: tuple(x.shape) for key, x in LinearSR(config).state_dict().items()}


def squeezed(tensor: Tensor) -> tuple[int, ...]:
    """Return a tensor's shape without a 1x1 kernel."""
    shape = tuple(tensor.shape)
    return shape[:2] if shape[2:] == (1, 1) else shape


# From a source's tensors to ours


def column_sizes(config: DenoiserConfig) -> dict[str, int]:
    """Return the inputs that `embed` may join, in our order, with the channels of each."""
    latent = config.latent_channels
    return {"latent": latent, "stem": config.stem_channels[-1], "lr_latent": latent}


def _columns(weight: Tensor, config: DenoiserConfig, inputs: Sequence[str]) -> int:
    """Return the number of columns that `embed` must have, where the last input may be DROP."""
    sizes = column_sizes(config)
    used = sum(sizes[name] for name in inputs if name != DROP)
    return weight.shape[1] if DROP in inputs and weight.shape[1] > used else used


def check_shapes(
    where: str | Path,
    source: Mapping[str, Tensor],
    recipe: Recipe,
    config: DenoiserConfig,
    inputs: Sequence[str] = ("latent",),
) -> None:
    """Raise WeightsError, by name, unless the shapes of all tensors of the recipe are right."""
    expected = shapes(config)
    wrong = []
    for key, names in recipe.items():
        shape = (expected[key][0] // len(names), *expected[key][1:])
        if key == "embed.weight":
            shape = (shape[0], _columns(source[names[0]], config, inputs))
        wrong += [
            f"{name} is {tuple(source[name].shape)}, not {shape}"
            for name in names
            if squeezed(source[name]) != shape
        ]
    if wrong:
        raise WeightsError(f"{where}: {len(wrong)} tensors of a wrong shape: {some(wrong)}")


def assemble(
    where: str | Path,
    source: Mapping[str, Tensor],
    recipe: Recipe,
    config: DenoiserConfig,
    inputs: Sequence[str] = ("latent",),
) -> dict[str, Tensor]:
    """Return a full float32 state dict of `LinearSR(config)` from tensors of checked shapes.

    A missing stem is new. `embed` gets zero columns for each input that the source lacks, so that
    it at first ignores them. Raises WeightsError, by name, for integers, NaN and infinity.
    """
    expected = shapes(config)
    _check_values(where, {name: source[name] for names in recipe.values() for name in names})
    tensors = {} if "stem.convs.0.weight" in recipe else _fresh_stem(config)
    for key, names in recipe.items():
        joined = torch.cat([source[name].float() for name in names])
        if key == "embed.weight":
            joined = _in_our_order(joined.flatten(1), config, inputs)
        tensors[key] = joined.reshape(expected[key])
    return tensors


def _in_our_order(weight: Tensor, config: DenoiserConfig, inputs: Sequence[str]) -> Tensor:
    """Return the columns of the `inputs` in our order, zeros for those that are not there."""
    sizes = column_sizes(config)
    kept = [name for name in inputs if name != DROP]
    parts = weight[:, : sum(sizes[name] for name in kept)].split([sizes[name] for name in kept], 1)
    given = dict(zip(kept, parts, strict=True))
    wanted = [name for name in sizes if name != "lr_latent" or config.condition_latent]
    absent = {name: weight.new_zeros(len(weight), sizes[name]) for name in wanted}
    return torch.cat([given.get(name, absent[name]) for name in wanted], dim=1)


def fresh_keys(recipe: Recipe, config: DenoiserConfig, inputs: Sequence[str]) -> tuple[str, ...]:
    """Return what `assemble` makes new."""
    stem = [] if "stem.convs.0.weight" in recipe else list(_fresh_stem(config))
    silent = "stem" not in inputs or (config.condition_latent and "lr_latent" not in inputs)
    return (*stem, *["embed.weight: zeros for what joins the latent"][: int(silent)])


def _fresh_stem(config: DenoiserConfig) -> dict[str, Tensor]:
    # With its own seed, so that a source always gives the same bundle.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stem = LRStem(config.stem_channels, config.stem_strides)
    return {f"stem.{key}": tensor.detach() for key, tensor in stem.state_dict().items()}


def _check_values(where: str | Path, source: Mapping[str, Tensor]) -> None:
    integers = [key for key, tensor in source.items() if not tensor.is_floating_point()]
    if integers:
        raise WeightsError(
            f"{where}: {some(integers)} holds integers; quantised weights are not supported"
        )
    bad = [key for key, tensor in source.items() if not torch.isfinite(tensor.float()).all()]
    if bad:
        raise WeightsError(f"{where}: {some(bad)} holds NaN or infinity; this file is not usable")


def some(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def denoiser_config(where: str | Path, **fields: Any) -> DenoiserConfig:
    """Return the config of a model on DC-AE latents, whose stem is that of `linearsr-1.6b` unless
    the fields say otherwise. Raises WeightsError for a shape that LinearSR cannot have.
    """
    stem = LINEARSR_1_6B.denoiser
    fields = {"stem_channels": stem.stem_channels, "stem_strides": stem.stem_strides, **fields}
    try:
        return DenoiserConfig(**fields)
    except ValidationError as error:
        raise WeightsError(
            f"{where}: LinearSR cannot have this shape: {one_line(error)}"
        ) from error


def ratio(hidden: int, width: int) -> float:
    """Return a ratio for which int(width * ratio) is exactly `hidden`."""
    quotient = hidden / width
    return quotient if int(width * quotient) == hidden else (hidden + 0.5) / width
