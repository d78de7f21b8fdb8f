"""Latents in advance: what training pairs become if they are cut, degraded and encoded only once.

A row of a shard has one HR picture and some variants of it. A variant is a pair of the recipe's
data, cut and degraded at random but fixed, with its latents. Knows nothing of files or of Ray.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from linearsr.config import Config, LatentConfig, ModelConfig, TagEncoderConfig
from linearsr.errors import WeightsError
from linearsr.imaging.resample import resize
from linearsr.latent import Autoencoder
from linearsr.tags.encoder import pad
from linearsr.training.data import Batch, DataConfig, Pair, Stored, Tags, collate

Precision = Literal["float16", "bfloat16"]
# Fields of the recipe's data that have no part in a stored pair.
FREE = ("batch", "tag_dropout", "latents")


class LatentsConfig(Config):
    """Latents that shards hold beside pictures: training then neither degrades nor encodes."""

    latent: LatentConfig
    """Autoencoder of the latents."""
    condition: bool = False
    """Whether the encoded LR picture is stored too, for models with condition_latent."""
    tags: TagEncoderConfig | None = None
    """Encoder of the tags that are given to the shards later; None for a model without tags."""
    tag_dim: int | None = None
    """Number of channels of a tag embedding."""
    data: DataConfig
    """Pairs that are stored; batch, tag_dropout and latents have no part in them."""
    variants: int = Field(default=4, ge=1, le=64)
    """Number of pairs that are cut from each HR crop, with other places, flips and degradations.
    Training takes one of them at a time, so an epoch differs from the one before."""
    precision: Precision = "float16"
    """Precision of the stored latents; float16 is eight times as exact as bfloat16, and
    bfloat16 holds values above 65504."""
    digest: str = ""
    """Digest of the encoder's weights; `build-shards` computes it."""

    @classmethod
    def of(cls, model: ModelConfig, data: DataConfig, **changes: object) -> LatentsConfig:
        """Return the settings for a recipe's model and data. Raises OptionError."""
        fields = {
            "latent": model.latent,
            "condition": model.denoiser.condition_latent,
            "tags": model.tags,
            "tag_dim": model.denoiser.tag_dim,
            "data": data.model_copy(update={n: DataConfig.model_fields[n].default for n in FREE}),
        }
        return cls.parse(**{**fields, **changes})

    @model_validator(mode="after")
    def _cells_are_whole(self) -> LatentsConfig:
        if self.data.patch % self.latent.factor:
            raise ValueError(
                f"patch {self.data.patch} must be a multiple of the latent's factor "
                f"{self.latent.factor}"
            )
        return self

    @property
    def scales(self) -> list[float]:
        """Return the scale of each variant; it is the same for all rows."""
        return self.data.scales_of(self.variants)

    def shape(self, channels: int) -> tuple[int, int, int]:
        """Return the shape (C, h, w) of a latent with so many channels."""
        cells = self.data.patch // self.latent.factor
        return channels, cells, cells

    def differences(self, model: ModelConfig, data: DataConfig) -> list[str]:
        """Return where these pairs differ from those of a recipe, as "patch 64, not 32".

        Whether the weights of the encoder differ is not known without them: see `digest`.
        """
        wanted = LatentsConfig.of(model, data)
        pairs = [
            (name, getattr(self.latent, name), getattr(wanted.latent, name))
            for name in ("kind", "factor", "scale")
        ]
        names = [name for name in DataConfig.model_fields if name not in FREE]
        pairs += [(n, getattr(self.data, n), getattr(wanted.data, n)) for n in names]
        if wanted.condition:
            pairs.append(("condition_latent", self.condition, True))
        return [f"{name} {ours}, not {theirs}" for name, ours, theirs in pairs if ours != theirs]


class StoredPair(NamedTuple):
    """A variant of a row. lr: (3, patch/s, patch/s) uint8; clean, condition: (C, h, w) float32.

    tags: names. embedded: (T, tag_dim) float32, T is 0 without tags; None if the shards have no
    embeddings. hr: (3, patch, patch) uint8; None if the stage does not need it.
    """

    lr: Tensor
    clean: Tensor
    condition: Tensor | None = None
    tags: Tags = ()
    embedded: Tensor | None = None
    hr: Tensor | None = None


@torch.no_grad()
def encode(
    pair: Pair, autoencoder: Autoencoder, device: str | torch.device, *, condition: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the clean latent (C, h, w) of HR and, if asked for, that of the enlarged LR picture.

    This is what a training step does with a batch, for one pair.
    """
    batch = collate([pair], [0]).to(torch.device(device))
    lr_picture = resize(batch.lr, *batch.hr.shape[-2:])
    clean = autoencoder.encode(batch.hr, lr_picture)[0]
    return clean, autoencoder.condition(lr_picture)[0] if condition else None


def pack(tensor: Tensor, precision: Precision) -> bytes:
    """Return the bytes of a tensor in this precision. Raises WeightsError if one is not finite."""
    rounded = tensor.to(getattr(torch, precision)).cpu().contiguous()
    if not torch.isfinite(rounded).all():
        raise WeightsError(
            f"a latent or an embedding is not finite in {precision}; choose another --precision, "
            "or other weights if they are at fault"
        )
    return rounded.view(torch.int16).numpy().tobytes()


def unpack(data: bytes, precision: Precision, shape: Sequence[int]) -> Tensor | None:
    """Return the float32 tensor that `pack` made bytes of; None for other bytes than it makes.

    One side of the shape may be -1.
    """
    known = 2 * math.prod(side for side in shape if side >= 0)
    fits = len(data) % known == 0 if -1 in shape else len(data) == known
    if not fits:
        return None
    numbers = torch.from_numpy(np.frombuffer(data, np.int16).copy())
    tensor = numbers.view(getattr(torch, precision)).view(*shape).float()
    return tensor if torch.isfinite(tensor).all() else None


def collate_stored(pairs: Sequence[StoredPair], numbers: Sequence[int]) -> Batch:
    """Join stored pairs of equal sizes to one batch."""
    lr = torch.stack([pair.lr for pair in pairs]).float() / 127.5 - 1
    hrs = [pair.hr for pair in pairs if pair.hr is not None]
    hr = torch.stack(hrs).float() / 127.5 - 1 if hrs else torch.empty(len(pairs), 3, 0, 0)
    conditions = [pair.condition for pair in pairs if pair.condition is not None]
    embedded = [pair.embedded for pair in pairs if pair.embedded is not None]
    stored = Stored(
        torch.stack([pair.clean for pair in pairs]),
        torch.stack(conditions) if conditions else None,
        pad(embedded) if embedded else None,
    )
    return Batch(hr, lr, torch.tensor(numbers), tuple(pair.tags for pair in pairs), stored)
