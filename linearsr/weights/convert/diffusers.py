"""Convert a folder of diffusers' `SanaTransformer2DModel`, whose config says its shape."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from linearsr.config import DenoiserConfig
from linearsr.errors import WeightsError
from linearsr.weights.convert.files import read_json, read_safetensors, read_shards
from linearsr.weights.convert.layout import (
    DIFFUSERS,
    WHY,
    Conversion,
    assemble,
    check_shapes,
    denoiser_config,
    fresh_keys,
    places,
    recipe_of,
    some,
)

# For each option diffusers' default, and the values that LinearSR can represent.
_FIXED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "patch_size": (1, (1,)),
    "guidance_embeds": (False, (False, None)),
    "interpolation_scale": (None, (None,)),
    "attention_bias": (False, (False,)),
    "norm_elementwise_affine": (False, (False,)),
    "norm_eps": (1e-6, (1e-6,)),
    "qk_norm": (None, (None, "rms_norm_across_heads")),
}
_SIZES: dict[str, Any] = {
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
_IDLE = {"sample_size", "dropout", "guidance_embeds_scale"}


def from_diffusers(folder: str | Path) -> Conversion:
    """Convert a diffusers `SanaTransformer2DModel` folder, or a pipeline's with `transformer/`.

    Weights may be one safetensors file or shards with an index. LinearSR's t in [0, 1] stands for
    diffusers' timesteps 0 to 1000.

    Raises WeightsError for missing or damaged files, for a config that LinearSR cannot represent,
    and, by name, for keys that are missing, unexpected, of another shape or not finite.
    """
    folder = find_folder(Path(folder)) or Path(folder)
    config = _config(folder / "config.json")
    source = _read(folder)
    recipe = recipe_of(places(config, DIFFUSERS), config.depth)
    _check_keys(folder, source, {name for names in recipe.values() for name in names})
    check_shapes(folder, source, recipe, config)
    tensors = assemble(folder, source, recipe, config)
    return Conversion(config, tensors, (), fresh_keys(recipe, config, ("latent",)))


def find_folder(folder: Path) -> Path | None:
    """Return the folder of the transformer in a folder of diffusers, or None if it is none."""
    for place in (folder / "transformer", folder):
        if any(place.glob("diffusion_pytorch_model*")):
            return place
    return None


def _config(path: Path) -> DenoiserConfig:
    options = read_json(path)
    if options.get("_class_name", "SanaTransformer2DModel") != "SanaTransformer2DModel":
        raise WeightsError(
            f"{path}: describes a {options['_class_name']}, not a SanaTransformer2DModel"
        )
    _refuse_unlike(path, options)
    c = {**_SIZES, **{k: v for k, v in options.items() if k in _SIZES}}
    try:
        width = c["num_attention_heads"] * c["attention_head_dim"]
        cross = c["num_cross_attention_heads"] * c["cross_attention_head_dim"]
        scale = 1000.0 * c["timestep_scale"]
    except TypeError:
        wrong = [key for key in c if key != "out_channels" and not isinstance(c[key], int | float)]
        raise WeightsError(
            f"{path}: {some(wrong)} must be a number; models without cross-attention are not "
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
    return denoiser_config(
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


def _refuse_unlike(path: Path, options: Mapping[str, Any]) -> None:
    for key, (default, allowed) in _FIXED.items():
        value = options.get(key, default)
        if value not in allowed:
            why = WHY.get(key, f"LinearSR has {' or '.join(map(str, allowed))} only")
            raise WeightsError(f"{path}: {key} is {value}: {why}")
    known = {*_FIXED, *_SIZES, *_IDLE}
    unknown = sorted(key for key in options if key not in known and not key.startswith("_"))
    if unknown:
        # With an option unknown to us, a newer diffusers may compute something else.
        raise WeightsError(f"{path}: unknown options {some(unknown)}; update linearsr")


def _read(folder: Path) -> dict[str, Tensor]:
    path = _weights_file(folder)
    return read_shards(path) if path.name.endswith(".json") else read_safetensors(path)


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
    names = some(sorted(path.name for path in variants)) or "none"
    raise WeightsError(
        f"{folder}: needs {stem}.safetensors, its index, or a single variant of them such as fp16; "
        f"variants found: {names}"
    )


def _check_keys(where: Path, source: Mapping[str, Tensor], needed: set[str]) -> None:
    missing, unexpected = sorted(needed - set(source)), sorted(set(source) - needed)
    kinds = [("missing", missing), ("unexpected", unexpected)]
    complaints = [f"{len(keys)} {kind}: {some(keys)}" for kind, keys in kinds if keys]
    if complaints:
        raise WeightsError(
            f"{where}: its keys differ from those of a Sana model of this size: "
            f"{'; '.join(complaints)}"
        )
