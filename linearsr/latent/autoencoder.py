"""Convert pictures to latents and back. Knows nothing of noise or experts.

Pictures are (B, 3, H, W) in [-1, 1] with sides a multiple of `factor`; latents (B, C, H/f, W/f)
with a spread near one. `lr_picture` is always the LR picture upsampled to the HR picture's size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linearsr.config import LatentConfig
from linearsr.cuda_graph import Graphs
from linearsr.digests import digest_tensors
from linearsr.errors import WeightsError, one_line, require
from linearsr.hub import resolve, split_revision
from linearsr.imaging.tiles import Canvas, tile_grid

# In pixels. Neighbouring tiles fade into each other over the overlap.
DECODE_TILE = 2048
DECODE_OVERLAP = 256
# Shapes of tiles that are kept as CUDA graphs.
DECODE_GRAPHS = 2


class Autoencoder(Protocol):
    """The interface of a latent space for the upscaler and the training loop."""

    factor: int

    def encode(self, picture: Tensor, lr_picture: Tensor) -> Tensor:
        """Return the clean latent z_0 of `picture`."""
        ...

    def decode(self, latent: Tensor, lr_picture: Tensor) -> Tensor:
        """Return the picture of `latent`, not clamped."""
        ...

    def digest(self) -> str:
        """Return 16 hexadecimal digits that differ where `encode` or `condition` would differ."""
        ...

    def condition(self, lr_picture: Tensor) -> Tensor:
        """Return the encoded LR picture, for `LinearSR.condition(lr_latent=...)`."""
        ...


class SpaceToDepth:
    """A lossless latent: the residual over the LR picture, folded factor x factor into channels."""

    def __init__(self, config: LatentConfig) -> None:
        self.factor = config.factor
        self.scale = config.scale

    def encode(self, picture: Tensor, lr_picture: Tensor) -> Tensor:
        return F.pixel_unshuffle((picture - lr_picture) / self.scale, self.factor)

    def decode(self, latent: Tensor, lr_picture: Tensor) -> Tensor:
        return lr_picture + F.pixel_shuffle(latent, self.factor) * self.scale

    def condition(self, lr_picture: Tensor) -> Tensor:
        return F.pixel_unshuffle(lr_picture, self.factor)

    def digest(self) -> str:
        settings = ("space-to-depth", self.factor, self.scale)
        return digest_tensors({}, header=repr(settings))[:16]


class DCAutoencoder:
    """Deep-compression autoencoder f32c32 (arXiv 2410.10733) through diffusers' `AutoencoderDC`.

    The model works in its own precision; pictures and latents keep theirs. It decodes in tiles of
    DECODE_TILE pixels, because a picture's activations are 64 times as large as the picture.
    """

    def __init__(self, config: LatentConfig, model: nn.Module, *, graphs: bool = False) -> None:
        """graphs: decode tiles by CUDA graphs, one for each shape of a tile."""
        self.factor = config.factor
        self.scale = config.scale
        self.model = model.requires_grad_(False).eval()
        self._graphs = Graphs(self._decode, DECODE_GRAPHS) if graphs else None

    def encode(self, picture: Tensor, lr_picture: Tensor) -> Tensor:
        latent: Tensor = self.model.encode(picture.to(self._dtype)).latent  # type: ignore[operator]
        return latent.to(picture.dtype) * self.scale

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def decode(self, latent: Tensor, lr_picture: Tensor) -> Tensor:
        cells, overlap = DECODE_TILE // self.factor, DECODE_OVERLAP // self.factor
        tiles = tile_grid(latent.shape[-2], latent.shape[-1], cells, overlap)
        if len(tiles) == 1:
            return self._decode_tile(latent)
        pictures = []
        for one in latent.split(1):
            canvas = Canvas((t.scaled(self.factor) for t in tiles), 3, device=latent.device)
            for tile in tiles:
                canvas.add(tile.scaled(self.factor), self._decode_tile(tile.crop(one))[0])
            pictures.append(canvas.result())
        return torch.stack(pictures).to(latent.dtype)

    def _decode_tile(self, latent: Tensor) -> Tensor:
        return self._decode(latent) if self._graphs is None else self._graphs(latent)

    def _decode(self, latent: Tensor) -> Tensor:
        scaled = (latent / self.scale).to(self._dtype)
        picture: Tensor = self.model.decode(scaled).sample  # type: ignore[operator]
        return picture.to(latent.dtype)

    def condition(self, lr_picture: Tensor) -> Tensor:
        return self.encode(lr_picture, lr_picture)

    def digest(self) -> str:
        # The decoder has no part in a latent.
        encoder: nn.Module = self.model.encoder  # type: ignore[assignment]
        settings = ("dc-ae", self.factor, self.scale)
        return digest_tensors(encoder.state_dict(), header=repr(settings))[:16]


def load_autoencoder(
    config: LatentConfig,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    graphs: bool = False,
) -> Autoencoder:
    """Load the autoencoder of a config; DC-AE comes from a folder, an s3:// one or a hub id.

    graphs: let DC-AE decode tiles by CUDA graphs.
    Raises MissingExtra without diffusers, and WeightsError for a missing folder, an unreachable hub
    or wrong weights.
    """
    if config.kind == "space-to-depth":
        return SpaceToDepth(config)
    if config.source is None:
        raise WeightsError(
            "a dc-ae latent needs latent.source: a folder, s3://BUCKET/FOLDER or a hub id"
        )
    model = _load_dc_ae(config.source, config.factor, dtype)
    if config.decoder:
        _replace_decoder(model, _load_dc_ae(config.decoder, config.factor, dtype), config)
    model = model.to(device)
    if torch.device(device).type == "cuda":  # the layout in which its convolutions are fastest
        model = model.to(memory_format=torch.channels_last)
    return DCAutoencoder(config, model, graphs=graphs)


def _replace_decoder(model: Any, other: Any, config: LatentConfig) -> None:
    """Give a model the decoder of another. Raises WeightsError if their latents differ in shape."""
    ours, theirs = (m.config.latent_channels for m in (model, other))
    if ours != theirs:
        raise WeightsError(
            f"latent.decoder {config.decoder!r} decodes {theirs} channels, but latent.source "
            f"{config.source!r} encodes {ours}"
        )
    model.decoder = other.decoder


def sana_dc_ae(divisor: int = 1, **fields: Any) -> Any:
    """Return diffusers' `AutoencoderDC` with random weights, in the shape of Sana's DC-AE f32c32.

    Its channels inside are divided by `divisor`, a power of two up to 16; `fields` replace others
    of its config, such as `scaling_factor`. Raises MissingExtra without diffusers.
    Source: config.json of dc-ae-f32c32-sana-1.0.
    """
    require("sana", "diffusers")
    from diffusers import AutoencoderDC

    shape: dict[str, Any] = {
        "latent_channels": 32,
        "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
        "decoder_layers_per_block": (3,) * 6,
        "downsample_block_type": "Conv",
        "upsample_block_type": "interpolate",
    }
    for side in ("encoder", "decoder"):
        shape[f"{side}_block_types"] = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
        channels = (128, 256, 512, 512, 1024, 1024)
        shape[f"{side}_block_out_channels"] = tuple(n // divisor for n in channels)
        shape[f"{side}_qkv_multiscales"] = ((),) * 3 + ((5,),) * 3
    return AutoencoderDC(**shape | fields)


def without_weights(config: LatentConfig) -> Autoencoder:
    """Return the autoencoder of a config in its shape but with random weights, to count its cost.

    The shape comes from the local folder `source`; any other counts as Sana's DC-AE f32c32.
    Raises MissingExtra without diffusers, and WeightsError for a folder that is not DC-AE's.
    """
    if config.kind == "space-to-depth":
        return SpaceToDepth(config)
    model = _random_dc_ae(config.source)
    if config.decoder:
        _replace_decoder(model, _random_dc_ae(config.decoder), config)
    return DCAutoencoder(config, model)


def _random_dc_ae(name: str | None) -> Any:
    require("sana", "diffusers")
    from diffusers import AutoencoderDC

    source = Path(split_revision(name or "")[0])
    if not name or not source.is_dir():
        return sana_dc_ae()
    try:
        return AutoencoderDC.from_config(AutoencoderDC.load_config(source))
    except (OSError, ValueError, TypeError) as error:
        raise WeightsError(
            f"{source}: not a folder of an AutoencoderDC: {one_line(error)}"
        ) from error


def _load_dc_ae(name: str, expected: int, dtype: torch.dtype) -> Any:
    """Load a DC-AE that compresses `expected` times. Raises WeightsError."""
    require("sana", "diffusers")
    from diffusers import AutoencoderDC

    source, revision = resolve(name)
    try:
        model, report = AutoencoderDC.from_pretrained(
            source,
            revision=revision,
            use_safetensors=True,
            torch_dtype=dtype,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        where = "folder" if Path(source).is_dir() else "missing folder or unreachable hub id"
        raise WeightsError(f"cannot load DC-AE from {where} {name!r}: {one_line(error)}") from error
    # Diffusers only warns, and leaves missing tensors without data or with random values.
    for key in (*report["missing_keys"], *report["unexpected_keys"]):
        raise WeightsError(f"{name!r} is not an AutoencoderDC: {key} is missing or unexpected")
    for key, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise WeightsError(f"{name!r}: {key} holds NaN or infinity; not usable")
    factor = model.spatial_compression_ratio
    if factor != expected:
        raise WeightsError(f"{name!r} compresses {factor}x, but the config says {expected}x")
    return model
