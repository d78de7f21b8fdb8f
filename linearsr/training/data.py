"""A folder of photographs -> an endless stream of (HR, LR) batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from linearsr.config import Config
from linearsr.errors import InputError
from linearsr.imaging.degrade import PRESETS, degrade
from linearsr.imaging.files import find_images, read
from linearsr.imaging.resample import resize


class Batch(NamedTuple):
    """hr (B, 3, H, W) and lr (B, 3, H/scale, W/scale), both in [-1, 1]."""

    hr: Tensor
    lr: Tensor


class DataConfig(Config):
    """How photographs become training pairs."""

    patch: int = 96
    batch: int = 8
    scale: int = 4
    # Photographs are shrunk by a random factor first: it sharpens soft ones and multiplies few.
    shrink: tuple[float, float] = (0.25, 1.0)
    # How often each degradation preset is drawn; must sum to one.
    degradations: dict[str, float] = Field(
        default={"clean": 0.45, "mild": 0.25, "camera": 0.25, "seesr": 0.05}
    )
    # Pixels around the patch that blur and resize may look at.
    margin: int = 16

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if self.patch % self.scale or self.margin % self.scale:
            raise ValueError(f"patch and margin must be multiples of the scale {self.scale}")
        if abs(sum(self.degradations.values()) - 1) > 1e-6 or set(self.degradations) - set(PRESETS):
            raise ValueError(f"degradations must be of {list(PRESETS)} and sum to one")
        return self


class Patches(IterableDataset[Batch]):
    """Endless seeded batches; worker `i` draws its own stream."""

    def __init__(self, folder: Path, config: DataConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.photos = [_as_bytes(path) for path in find_images(folder)]
        self.photos = [
            p for p in self.photos if min(p.shape[1:]) >= config.patch + 2 * config.margin
        ]
        if not self.photos:
            raise InputError(f"{folder}: no photograph of at least {config.patch} px to train on")

    def __iter__(self) -> Iterator[Batch]:
        info = torch.utils.data.get_worker_info()
        rng = np.random.default_rng([self.seed, info.id if info else 0])
        while True:
            pairs = [self._pair(rng) for _ in range(self.config.batch)]
            hr, lr = (torch.stack(side) * 2 - 1 for side in zip(*pairs, strict=True))
            yield Batch(hr, lr)

    def _pair(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        c = self.config
        hr = _augment(self._crop(rng, c.patch + 2 * c.margin), rng)
        preset = rng.choice(list(c.degradations), p=list(c.degradations.values()))
        lr = degrade(hr, c.scale, PRESETS[preset], rng)
        inner = c.margin // c.scale
        return _centre(hr, c.margin, c.patch), _centre(lr, inner, c.patch // c.scale)

    def _crop(self, rng: np.random.Generator, size: int) -> Tensor:
        """(3, size, size) in [0, 1]; half the time the busier of two crops."""
        crops = [self._random_crop(rng, size) for _ in range(1 if rng.random() < 0.5 else 2)]
        return max(crops, key=lambda crop: crop.diff(dim=-1).abs().mean().item())

    def _random_crop(self, rng: np.random.Generator, size: int) -> Tensor:
        photo = self.photos[rng.integers(len(self.photos))]
        low, high = np.log(self.config.shrink)
        shrink = max(np.exp(rng.uniform(low, high)), size / min(photo.shape[1:]))
        source = min(round(size / shrink), *photo.shape[1:])
        top, left = (int(rng.integers(n - source + 1)) for n in photo.shape[1:])
        crop = photo[:, top : top + source, left : left + source].float()[None] / 255
        return resize(crop, size, size)[0].clamp(0, 1)


def _as_bytes(path: Path) -> Tensor:
    return (read(path).pixels * 255).round().byte()


def _centre(picture: Tensor, margin: int, size: int) -> Tensor:
    return picture[:, margin : margin + size, margin : margin + size]


def _augment(hr: Tensor, rng: np.random.Generator) -> Tensor:
    """Eight symmetries, channel order, and a mild change of exposure."""
    hr = torch.rot90(hr, int(rng.integers(4)), (1, 2))
    if rng.random() < 0.5:
        hr = hr.flip(2)
    if rng.random() < 0.3:
        hr = hr[torch.from_numpy(rng.permutation(3))]
    if rng.random() < 0.3:
        hr = hr ** rng.uniform(0.7, 1.4)
    return hr.contiguous()


def stream(folder: Path, config: DataConfig, seed: int, workers: int = 1) -> Iterator[Batch]:
    """Batches made in `workers` background processes (0: in this one)."""
    return iter(DataLoader(Patches(folder, config, seed), batch_size=None, num_workers=workers))
