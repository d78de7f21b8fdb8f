"""Convert Sana's weights to LinearSR's, from diffusers' layout or from Sana's own.

    python -m linearsr.weights.convert SOURCE --out FOLDER [--name NAME]

SOURCE is a folder (diffusers' `SanaTransformer2DModel`, or a pipeline with `transformer/` inside)
or a file (NVlabs' .pth, or the same as .safetensors). The result computes the source's function:
its LR stem is new and has no effect before training. Sana: arXiv 2410.10629. Knows nothing of
training.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from linearsr.config import LINEARSR_1_6B, DenoiserConfig, ModelConfig, SamplingConfig
from linearsr.denoiser import LinearSR
from linearsr.denoiser.conditioning import LRStem
from linearsr.errors import LinearSRError, OutputError, WeightsError, one_line
from linearsr.weights.bundle import expert_names, save

# Each of our layers and bare parameters, and those whose tensors are concatenated for it; {} is a
# block's number. Weights and biases have these names in every layout.
_DIFFUSERS: dict[str, tuple[str, ...]] = {
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

_SANA: dict[str, tuple[str, ...]] = {
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

# Keys of Sana's layout that no output depends on: the position buffer (all zeros unless positions
# are used, which is refused), the caption of classifier-free guidance, training's loss weighting.
_SANA_DROPPED = (
    "pos_embed",
    "y_embedder.y_embedding",
    "logvar_linear.weight",
    "logvar_linear.bias",
)

# Shapes do not show the heads of cross-attention, so this has them by width for every model that
# NVlabs released.
_SANA_TAG_HEADS = {1152: 16, 2240: 20}
_SANA_HEAD_DIM = 32

# For each option diffusers' default, and the values that LinearSR can represent.
_DIFFUSERS_FIXED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "patch_size": (1, (1,)),
    "guidance_embeds": (False, (False, None)),
    "interpolation_scale": (None, (None,)),
    "attention_bias": (False, (False,)),
    "norm_elementwise_affine": (False, (False,)),
    "norm_eps": (1e-6, (1e-6,)),
    "qk_norm": (None, (None, "rms_norm_across_heads")),
}
_DIFFUSERS_SIZES: dict[str, Any] = {
    "in_channels": 32,
    "out_channels": 32,
    "num_attention_heads": 70,
    "attention_head_dim": 32,
    "num_layers": 20,
    "num_cross_attention_heads": 20,
    "cross_attention_head_dim": 112,
    "cross_attention_dim": 2240,
    "caption_channels": 2304,
    "mlp_ratio": 2.5,
    "timestep_scale": 1.0,
}
_DIFFUSERS_IDLE = {"sample_size", "dropout", "guidance_embeds_scale"}
_WHY = {
    "interpolation_scale": "sincos positions (2K and 4K models); LinearSR has no positions",
    "guidance_embeds": "a guidance embedding (Sana-Sprint); LinearSR has none",
    "patch_size": "patches; LinearSR takes each latent pixel as one token",
}

_SHOWN = 8


class Conversion(NamedTuple):
    """Converted weights.

    config: the denoiser's shape.
    tensors: a full float32 state dict of `LinearSR(config)`.
    dropped: the source's keys that LinearSR does not use.
    fresh: our keys that the source has no tensors for, with new values.
    """

    config: DenoiserConfig
    tensors: dict[str, Tensor]
    dropped: tuple[str, ...]
    fresh: tuple[str, ...]


def from_diffusers(folder: str | Path) -> Conversion:
    """Convert a diffusers `SanaTransformer2DModel` folder, or a pipeline's with `transformer/`.

    Weights may be one safetensors file or shards with an index. LinearSR's t in [0, 1] stands for
    diffusers' timesteps 0 to 1000.

    Raises WeightsError for missing or damaged files, for a config that LinearSR cannot represent,
    and, by name, for keys that are missing, unexpected, of another shape or not finite.
    """
    folder = Path(folder)
    if (folder / "transformer").is_dir():
        folder = folder / "transformer"
    config = _diffusers_config(folder / "config.json")
    return _convert(folder, _read_diffusers(folder), _DIFFUSERS, config, ())


def from_sana(path: str | Path, config: DenoiserConfig | None = None) -> Conversion:
    """Convert weights in Sana's own layout (github.com/NVlabs/Sana): .pth or .safetensors.

    Without `config` the shape is read off the tensors, with 32-channel heads and as many
    cross-attention heads as NVlabs uses for that width; another width needs `config`.
    Raises WeightsError if the file is missing, damaged or holds more than tensors; for patches
    larger than one cell, position embeddings and guidance embeddings, which LinearSR does not have;
    and, by name, for keys that are missing, unexpected, of another shape or not finite.
    """
    path = Path(path)
    source, dropped = _read_sana(path)
    _refuse_unlike_sana(path, source)
    if config is None:
        config = _sana_config(path, source)
    if config.prediction != "velocity":
        raise WeightsError(f"{path}: Sana predicts velocity, the config says {config.prediction}")
    dropped += [key for key in _SANA_DROPPED if source.pop(key, None) is not None]
    return _convert(path, source, _SANA, config, dropped)


# Conversion, the same for both layouts


def _convert(
    where: Path,
    source: Mapping[str, Tensor],
    table: Mapping[str, tuple[str, ...]],
    config: DenoiserConfig,
    dropped: Iterable[str],
) -> Conversion:
    with torch.device("meta"):
        expected = {key: tuple(x.shape) for key, x in LinearSR(config).state_dict().items()}
    stem = _fresh_stem(config)
    recipe = {key: _sources(key, table) for key in expected if key not in stem}
    _check_keys(where, source, {part for parts in recipe.values() for part in parts})
    _check_values(where, source)
    tensors, wrong = dict(stem), []
    for key, parts in recipe.items():
        shape = _source_shape(key, expected[key], len(parts), config)
        fitting = (shape, (*shape, 1, 1)) if len(shape) == 2 else (shape,)
        misfits = [part for part in parts if tuple(source[part].shape) not in fitting]
        wrong += [f"{part} is {tuple(source[part].shape)}, not {shape}" for part in misfits]
        if not wrong:
            joined = torch.cat([source[part].float().reshape(shape) for part in parts])
            # Zero columns, so that `embed` at first ignores the stem and the encoded LR picture.
            tensors[key] = F.pad(joined, (0, expected[key][-1] - joined.shape[-1]))
    if wrong:
        raise WeightsError(f"{where}: {len(wrong)} tensors of a wrong shape: {_some(wrong)}")
    fresh = (*stem, "embed.weight: zeros for what joins the latent")
    return Conversion(config, tensors, tuple(dropped), fresh)


def _sources(key: str, table: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Return the source's keys for our `key`: a layer's weight or bias, or a bare parameter."""
    layer, dot, end = key.rpartition(".") if key.endswith((".weight", ".bias")) else (key, "", "")
    number = re.search(r"\d+", layer)
    parts = table[re.sub(r"\d+", "{}", layer, count=1)]
    return [part.format(number and number[0]) + dot + end for part in parts]


def _source_shape(
    key: str, shape: tuple[int, ...], parts: int, config: DenoiserConfig
) -> tuple[int, ...]:
    """Return the shape, without 1x1 kernels, of each of the `parts` tensors for our `key`."""
    if key == "embed.weight":
        return (shape[0], config.latent_channels)
    return (shape[0] // parts, *shape[1:])


def _fresh_stem(config: DenoiserConfig) -> dict[str, Tensor]:
    # With its own seed, so that a source always gives the same bundle.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stem = LRStem(config.stem_channels, config.stem_strides)
    return {f"stem.{key}": tensor.detach() for key, tensor in stem.state_dict().items()}


def _check_keys(where: Path, source: Mapping[str, Tensor], needed: set[str]) -> None:
    missing, unexpected = sorted(needed - set(source)), sorted(set(source) - needed)
    kinds = [("missing", missing), ("unexpected", unexpected)]
    complaints = [f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in kinds if keys]
    if complaints:
        raise WeightsError(
            f"{where}: its keys differ from those of a Sana model of this size: "
            f"{'; '.join(complaints)}"
        )


def _check_values(where: Path, source: Mapping[str, Tensor]) -> None:
    integers = [key for key, tensor in source.items() if not tensor.is_floating_point()]
    if integers:
        raise WeightsError(
            f"{where}: {_some(integers)} holds integers; quantised weights are not supported"
        )
    bad = [key for key, tensor in source.items() if not torch.isfinite(tensor.float()).all()]
    if bad:
        raise WeightsError(f"{where}: {_some(bad)} holds NaN or infinity; this file is not usable")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _denoiser_config(where: Path, **fields: Any) -> DenoiserConfig:
    # The stem of every model on DC-AE latents: its strides multiply to 32.
    stem = LINEARSR_1_6B.denoiser
    try:
        return DenoiserConfig(
            stem_channels=stem.stem_channels, stem_strides=stem.stem_strides, **fields
        )
    except ValidationError as error:
        raise WeightsError(
            f"{where}: LinearSR cannot have this shape: {one_line(error)}"
        ) from error


# Diffusers' layout


def _diffusers_config(path: Path) -> DenoiserConfig:
    options = _read_json(path)
    if options.get("_class_name", "SanaTransformer2DModel") != "SanaTransformer2DModel":
        raise WeightsError(
            f"{path}: describes a {options['_class_name']}, not a SanaTransformer2DModel"
        )
    _refuse_unlike_diffusers(path, options)
    c = {**_DIFFUSERS_SIZES, **{k: v for k, v in options.items() if k in _DIFFUSERS_SIZES}}
    try:
        width = c["num_attention_heads"] * c["attention_head_dim"]
        cross = c["num_cross_attention_heads"] * c["cross_attention_head_dim"]
        scale = 1000.0 * c["timestep_scale"]
    except TypeError:
        wrong = [key for key in c if key != "out_channels" and not isinstance(c[key], int | float)]
        raise WeightsError(
            f"{path}: {_some(wrong)} must be a number; models without cross-attention are not "
            "supported"
        ) from None
    if not width == cross == c["cross_attention_dim"]:
        raise WeightsError(
            f"{path}: self-attention has {width} channels, cross-attention {cross} and its "
            f"captions {c['cross_attention_dim']}; LinearSR needs all three equal"
        )
    if (c["out_channels"] or c["in_channels"]) != c["in_channels"]:
        raise WeightsError(
            f"{path}: in_channels is {c['in_channels']} and out_channels {c['out_channels']}; "
            "LinearSR needs them equal"
        )
    return _denoiser_config(
        path,
        latent_channels=c["in_channels"],
        depth=c["num_layers"],
        width=width,
        head_dim=c["attention_head_dim"],
        ffn_ratio=c["mlp_ratio"],
        qk_norm=options.get("qk_norm") is not None,
        tag_dim=c["caption_channels"],
        tag_heads=c["num_cross_attention_heads"],
        timestep_scale=scale,
    )


def _refuse_unlike_diffusers(path: Path, options: Mapping[str, Any]) -> None:
    for key, (default, allowed) in _DIFFUSERS_FIXED.items():
        value = options.get(key, default)
        if value not in allowed:
            why = _WHY.get(key, f"LinearSR has {' or '.join(map(str, allowed))} only")
            raise WeightsError(f"{path}: {key} is {value}: {why}")
    known = {*_DIFFUSERS_FIXED, *_DIFFUSERS_SIZES, *_DIFFUSERS_IDLE}
    unknown = sorted(key for key in options if key not in known and not key.startswith("_"))
    if unknown:
        # With an option unknown to us, a newer diffusers may compute something else.
        raise WeightsError(f"{path}: unknown options {_some(unknown)}; update linearsr")


def _read_diffusers(folder: Path) -> dict[str, Tensor]:
    path = _weights_file(folder)
    if not path.name.endswith(".json"):
        return _read_safetensors(path)
    shards = _read_json(path).get("weight_map")
    if not isinstance(shards, dict):
        raise WeightsError(f"{path}: this index has no weight_map")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(shards.values())):
        tensors |= _read_safetensors(folder / shard)
    lost = sorted(set(shards) - set(tensors))
    if lost:
        raise WeightsError(
            f"{path}: no weights file holds these tensors of the index: {_some(lost)}"
        )
    return tensors


def _weights_file(folder: Path) -> Path:
    """Return the index or the single file; a variant (fp16, bf16) only if there is just one."""
    stem = "diffusion_pytorch_model"
    for name in (f"{stem}.safetensors.index.json", f"{stem}.safetensors"):
        if (folder / name).is_file():
            return folder / name
    patterns = (f"{stem}.safetensors.index.*.json", f"{stem}.*.safetensors")
    paths = [path for pattern in patterns for path in folder.glob(pattern)]
    variants = [path for path in paths if "-of-" not in path.name]
    if len(variants) == 1:
        return variants[0]
    names = _some(sorted(path.name for path in variants)) or "none"
    raise WeightsError(
        f"{folder}: needs {stem}.safetensors, its index, or a single variant of them such as fp16; "
        f"variants found: {names}"
    )


# Sana's own layout


def _read_sana(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Return the state dict, and the names of all else in the file (left over from training)."""
    loaded = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    beside: list[str] = []
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        beside = sorted(key for key in loaded if key != "state_dict")
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(x, Tensor) for x in loaded.values()):
        raise WeightsError(f"{path}: holds no state dict")
    return dict(loaded), beside


def _read_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {one_line(error)}") from error
    except pickle.UnpicklingError as error:
        # torch's own message advises weights_only=False, which would run whatever is inside.
        raise WeightsError(f"{path}: damaged, or holds more than tensors; not loaded") from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise WeightsError(f"{path}: damaged: {one_line(error)}") from error


def _refuse_unlike_sana(path: Path, source: Mapping[str, Tensor]) -> None:
    if "patch_embed.proj.weight" in source:
        raise WeightsError(
            f"{path}: this file has diffusers' layout; give its folder, config.json included"
        )
    if any(key.startswith("cfg_embedder.") for key in source):
        raise WeightsError(f"{path}: cfg_embedder is {_WHY['guidance_embeds']}")
    patch = source.get("x_embedder.proj.weight")
    if patch is None or patch.ndim != 4:
        raise WeightsError(
            f"{path}: not Sana's layout: there is no convolution x_embedder.proj.weight"
        )
    if tuple(patch.shape[2:]) != (1, 1):
        raise WeightsError(f"{path}: x_embedder.proj.weight has {_WHY['patch_size']}")
    # Sana fills this buffer only in models that use it.
    if "pos_embed" in source and source["pos_embed"].any():
        raise WeightsError(f"{path}: pos_embed is {_WHY['interpolation_scale']}")


def _sana_config(path: Path, source: Mapping[str, Tensor]) -> DenoiserConfig:
    names = ("x_embedder.proj.weight", "y_embedder.y_proj.fc1.weight")
    ffn = "blocks.0.mlp.depth_conv.conv.weight"
    for name in (*names, ffn):
        if name not in source or source[name].ndim < 2:
            raise WeightsError(f"{path}: {name} is missing, which shows the shape of the model")
    width, latent = source[names[0]].shape[:2]
    if width not in _SANA_TAG_HEADS:
        raise WeightsError(
            f"{path}: width {width} is not one of NVlabs' Sana models "
            f"({', '.join(map(str, _SANA_TAG_HEADS))}), and the weights do not show the number of "
            "cross-attention heads; call from_sana with a config"
        )
    numbers = {key.split(".")[1] for key in source if key.startswith("blocks.")}
    return _denoiser_config(
        path,
        latent_channels=latent,
        depth=len(numbers),
        width=width,
        head_dim=_SANA_HEAD_DIM,
        ffn_ratio=_ratio(source[ffn].shape[0] // 2, width),
        qk_norm="blocks.0.attn.q_norm.weight" in source,
        tag_dim=source[names[1]].shape[1],
        tag_heads=_SANA_TAG_HEADS[width],
    )


def _ratio(hidden: int, width: int) -> float:
    """Return a ratio for which int(width * ratio) is exactly `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


# Files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{path}: is missing; give a complete diffusers folder") from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: is not a JSON object")
    return content


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: cannot be read: {one_line(error)}") from error


# Command line


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert one model into a bundle of a single expert and return the exit code."""
    parser = argparse.ArgumentParser(
        "linearsr.weights.convert", description="Convert Sana's weights to LinearSR's."
    )
    parser.add_argument(
        "source", type=Path, help="diffusers folder, or a .pth or .safetensors file of Sana's own"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write the bundle to")
    parser.add_argument("--name", help="name of the model (default: the source's name)")
    options = parser.parse_args(arguments)
    try:
        _bundle(options.source, options.out, options.name)
    except LinearSRError as error:
        print(f"linearsr.weights.convert: {error}", file=sys.stderr)
        return 1
    return 0


def _bundle(source: Path, out: Path, name: str | None) -> None:
    if any(out.glob("*.safetensors")):
        raise OutputError(f"{out}: already holds weights; choose an empty folder")
    layout, convert = ("diffusers", from_diffusers) if source.is_dir() else ("sana", from_sana)
    config, tensors, dropped, fresh = convert(source)
    latent = LINEARSR_1_6B.latent
    channels = LINEARSR_1_6B.denoiser.latent_channels
    if config.latent_channels != channels:
        raise WeightsError(
            f"{source}: these weights take latents of {config.latent_channels} channels, and DC-AE "
            f"f32c32 makes {channels}; convert a Sana model that was trained for it"
        )
    sampling = SamplingConfig(steps=LINEARSR_1_6B.sampling.steps, boundaries=())
    # A folder's name may hold dots ("SANA1.5"), a file's ends in one.
    name = name or (source.stem if source.is_file() else source.resolve().name)
    # Sana's own text encoder, if the captions have its width.
    tags = LINEARSR_1_6B.tags if config.tag_dim == LINEARSR_1_6B.denoiser.tag_dim else None
    model = ModelConfig(name=name, denoiser=config, latent=latent, tags=tags, sampling=sampling)
    provenance = {"source": source.resolve().name, "layout": layout, "dropped": ", ".join(dropped)}
    try:
        save(out, model, [tensors], provenance)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written: {one_line(error)}") from error
    print(f"{model.name}: {out / expert_names(model)[0]}.safetensors")
    print(f"dropped: {', '.join(dropped) or 'nothing'}")
    print(f"fresh: {', '.join(fresh)}")


if __name__ == "__main__":
    sys.exit(main())
