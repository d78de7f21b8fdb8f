"""The settings of a shard dataset, and the random numbers that follow from them."""

from __future__ import annotations

import hashlib

import numpy as np
from pydantic import Field, ValidationInfo, field_validator

from linearsr.config import Config
from linearsr.distributed.datasets.shards.filters import MAX_DISTANCE
from linearsr.imaging.degradation import Preset
from linearsr.imaging.files import DEFAULT_MAX_PIXELS
from linearsr.storage.location import locate, url
from linearsr.training.latents import LatentsConfig


class ShardConfig(Config):
    """A shard dataset, built from folders of pictures into a folder of its own."""

    inputs: tuple[str, ...] = Field(min_length=1)
    """Folders of pictures, local or s3://."""
    output: str
    """Folder for the shards, local or s3://; it must not hold another job's shards."""
    scale: int = Field(default=4, ge=1, le=16)
    """How many times smaller LR is than HR."""
    degradation: Preset = "seesr"
    """Degradation that makes LR from HR (docs/guides/datasets.md)."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed for crop positions, shuffling and degradation."""
    crop: int = Field(default=512, ge=0)
    """Side of the square HR crops in pixels; 0 takes whole pictures."""
    crops_per_picture: int = Field(default=4, ge=1)
    """Maximum number of crops per picture."""
    min_size: int = Field(default=0, ge=0)
    """Minimum shorter side of a picture in pixels; the crop must fit in any case."""
    min_sharpness: float = Field(default=20.0, ge=0)
    """Minimum sharpness of a crop (variance of its Laplacian); 0 accepts any."""
    duplicate_distance: int = Field(default=4, ge=-1, le=MAX_DISTANCE)
    """Maximum number of different bits, of 64, between the perceptual hashes of two pictures that
    count as duplicates, of which one is kept; -1 keeps all pictures."""
    max_pixels: int = Field(default=DEFAULT_MAX_PIXELS, ge=1)
    """Maximum number of pixels of a picture; larger ones are refused."""
    rows_per_shard: int = Field(default=256, ge=1)
    """Maximum number of rows in a shard."""
    cpus: float = Field(default=1.0, gt=0)
    """Logical CPUs that each task reserves."""
    max_cpus: float = Field(default=128, gt=0)
    """Maximum number of logical CPUs to request from an autoscaling cluster; the CPU workers of
    cluster.yaml have 128 in all."""
    latents: LatentsConfig | None = None
    """Latents that are stored beside the pictures, for training."""
    gpus: float = Field(default=0.0, ge=0, le=1)
    """GPUs, or the share of one, that each task reserves to encode latents; with 0, its CPUs
    encode."""

    @field_validator("inputs")
    @classmethod
    def _absolute(cls, paths: tuple[str, ...]) -> tuple[str, ...]:
        """Make paths absolute, since workers have working folders of their own."""
        folders = tuple(url(locate(path)) for path in paths)
        for i, folder in enumerate(folders):
            if any(_overlap(folder, other) for other in folders[:i]):
                raise ValueError(f"{folder} would be read twice; give each folder once")
        return folders

    @field_validator("output")
    @classmethod
    def _apart(cls, path: str, info: ValidationInfo) -> str:
        output = url(locate(path))
        for folder in info.data.get("inputs", ()):
            if _overlap(folder, output):
                raise ValueError(f"must be neither the input {folder} nor inside or around it")
        return output

    @field_validator("crop")
    @classmethod
    def _fits(cls, crop: int, info: ValidationInfo) -> int:
        if crop % info.data.get("scale", 1):
            raise ValueError(f"must be a multiple of the scale {info.data['scale']}")
        return crop

    @field_validator("latents")
    @classmethod
    def _holds_pairs(
        cls, latents: LatentsConfig | None, info: ValidationInfo
    ) -> LatentsConfig | None:
        crop = info.data.get("crop", 0)
        if latents is not None and 0 < crop < latents.data.needs:
            raise ValueError(
                f"a crop of {crop} px is too small for pairs of {latents.data.patch} px with their "
                f"margins; --crop must be at least {latents.data.needs}"
            )
        return latents

    @property
    def least(self) -> int:
        """Return the shortest side that a picture must have, in pixels."""
        needs = 0 if self.latents is None else self.latents.data.needs
        return max(self.min_size, self.crop, self.scale, needs)

    def roots(self) -> dict[str, str]:
        """Return the input folders by name; the sources of their pictures begin with that name."""
        names = [locate(path).name or "pictures" for path in self.inputs]
        if len(set(names)) < len(names):
            names = [f"{i}-{name}" for i, name in enumerate(names, 1)]
        return dict(zip(names, self.inputs, strict=True))

    def rng(self, name: str) -> np.random.Generator:
        """Return a random generator whose numbers depend on the seed and `name` alone."""
        return np.random.default_rng(self.seed_of(name))

    def seed_of(self, name: str) -> int:
        """Return a seed of 63 bits for a name."""
        digest = hashlib.blake2b(f"{self.seed}:{name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1


def _overlap(one: str, other: str) -> bool:
    first, second = (f"{path.rstrip('/')}/" for path in (one, other))
    return first.startswith(second) or second.startswith(first)
