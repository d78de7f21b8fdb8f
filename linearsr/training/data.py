"""Photographs -> numbered (HR, LR) training pairs.

Pair number n of a seed is the same wherever and whenever it is made, so the data order survives
restarts and other numbers of workers without any state. Knows nothing of where pictures are kept.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, Field, ValidationError, model_validator
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from linearsr.config import Config
from linearsr.errors import InputError, OptionError, one_line
from linearsr.imaging.degradation import PRESETS, Preset, degrade
from linearsr.imaging.files import read
from linearsr.imaging.listing import find_images
from linearsr.imaging.resample import resize
from linearsr.storage.walk import Notes
from linearsr.tags.encoder import EncodedTags

Tags = tuple[str, ...]

# Tags of a folder's photographs: `linearsr tag FOLDER --json > FOLDER/tags.jsonl`.
SIDECAR = "tags.jsonl"
# Below this scale a clean LR picture is almost its HR.
NEAR_ONE = 1.5


class Stored(NamedTuple):
    """Latents and embeddings of B pairs that were computed in advance.

    clean: (B, C, h, w), the clean latent z_0 of HR. condition: (B, C, h, w), the encoded LR
    picture, for models that take it. tags: the embedded tags; None if tags are still names.
    """

    clean: Tensor
    condition: Tensor | None = None
    tags: EncodedTags | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Stored:
        """Return the same with every tensor changed."""
        condition = None if self.condition is None else change(self.condition)
        tags = None if self.tags is None else EncodedTags(*map(change, self.tags))
        return Stored(change(self.clean), condition, tags)


class Batch(NamedTuple):
    """hr (B, 3, H, W) and lr (B, 3, H/s, W/s) in [-1, 1]; numbers (B,) int64 of the pairs.

    All pairs of a batch have one scale s. The numbers also seed timesteps and noise, so a step
    depends on nothing but its pairs. tags: B tuples, or none at all. stored: what was computed in
    advance, if anything; hr is (B, 3, 0, 0) then, unless the stage compares pictures.
    """

    hr: Tensor
    lr: Tensor
    numbers: Tensor
    tags: tuple[Tags, ...] = ()
    stored: Stored | None = None

    def to(self, device: torch.device) -> Batch:
        """Return the batch with pictures, latents and embeddings on a device; numbers stay."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        stored = None if self.stored is None else self.stored.each(move)
        return self._replace(hr=move(self.hr), lr=move(self.lr), stored=stored)

    def split(self, count: int) -> list[Batch]:
        """Return `count` batches of equal size, in order. Raises ValueError if they would differ.

        Then the mean of their means would not be the mean of the whole.
        """
        size, rest = divmod(len(self.numbers), count)
        if rest or not size:
            raise ValueError(f"{len(self.numbers)} pairs cannot be split into {count} equal parts")
        return [self._part(slice(at, at + size)) for at in range(0, len(self.numbers), size)]

    def _part(self, pairs: slice) -> Batch:
        stored = None if self.stored is None else self.stored.each(lambda tensor: tensor[pairs])
        return Batch(self.hr[pairs], self.lr[pairs], self.numbers[pairs], self.tags[pairs], stored)


class Photo(NamedTuple):
    """A photograph (3, H, W) uint8, and its tags."""

    pixels: Tensor
    tags: Tags = ()


class Pair(NamedTuple):
    """hr (3, patch, patch) and lr (3, patch/s, patch/s), uint8; the photograph's tags."""

    hr: Tensor
    lr: Tensor
    tags: Tags = ()


class DataConfig(Config):
    """How training pairs are made from photographs."""

    patch: int = 96
    """Side of the HR patch in pixels."""
    batch: int = 8
    """Number of pairs in a step, all workers together."""
    scale: int = Field(default=4, ge=1)
    """Largest scale: how many times smaller LR is than HR."""
    scales: tuple[float, float] = (4.0, 4.0)
    """Range of the scales of batches; its upper end is `scale`. A scale is used only if patch and
    margin are whole numbers of LR pixels at it."""
    at_largest: float = Field(default=0.6, ge=0, le=1)
    """Share of batches at the largest scale, if there are others; those are drawn evenly in the
    logarithm of the scale."""
    shrink: tuple[float, float] = (0.25, 1.0)
    """Range of the random factor that a photograph is resized by first. It sharpens soft
    photographs and gives more variety where there are few."""
    degradations: dict[Preset, float] = Field(
        default={"clean": 0.45, "mild": 0.25, "camera": 0.25, "seesr": 0.05}
    )
    """Share of pairs of each degradation preset (docs/guides/datasets.md); the shares must sum to
    one."""
    clean_near_one: float = Field(default=0.1, ge=0, le=1)
    """Largest share of the preset `clean` at scales below 1.5, where it leaves hardly anything to
    restore; the other presets, if there are any, share the rest."""
    margin: int = 16
    """Pixels around the patch that blur and resizing may use."""
    tag_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of pairs that lose their tags, so that the model learns to do without."""
    latents: bool = True
    """Whether latents are used that shards hold. If not, pairs are cut from the shards' HR and
    encoded at each step."""

    def micro_batch(self, workers: int, accumulation: int) -> int:
        """Return the number of pairs that a worker takes at once. Raises OptionError for a rest."""
        size, rest = divmod(self.batch, workers * accumulation)
        if rest:
            parts = f" with accumulation {accumulation}" * (accumulation > 1)
            raise OptionError(
                f"data.batch {self.batch} cannot be shared by {workers} workers evenly{parts}"
            )
        return size

    @property
    def needs(self) -> int:
        """Return the shortest side, in pixels, that a photograph must have."""
        return self.patch + 2 * self.margin

    def scale_of(self, seed: int, number: int) -> float:
        """Return the scale of pair `number`, which is that of its whole batch."""
        smaller = self._smaller
        if not smaller:
            return float(self.scale)
        rng = np.random.default_rng([seed, number // self.batch, 2])
        if rng.random() < self.at_largest:
            return float(self.scale)
        share = np.array(smaller) / sum(smaller)
        return float(rng.choice(smaller, p=share))

    def scales_of(self, count: int) -> list[float]:
        """Return `count` scales that stand for those of all batches.

        At least one is the largest, and in all the share `at_largest` of them. The others lie in
        the middle of equally likely parts of the smaller scales.
        """
        smaller = self._smaller
        others = min(count - round(self.at_largest * count), count - 1) if smaller else 0
        likely = np.cumsum(smaller) / sum(smaller) if smaller else np.ones(1)
        middles = (np.arange(others) + 0.5) / max(others, 1)
        chosen = [smaller[i] for i in np.searchsorted(likely, middles)]
        return [float(self.scale)] * (count - others) + chosen

    @property
    def _smaller(self) -> list[float]:
        """Return the scales below the largest.

        LR pixels that divide what divides patch and margin make both whole. As many of them lie
        between s and s + ds as 1 / s^2 says, so a weight of s makes the draw even in log s.
        """
        common = math.gcd(self.patch, self.margin)
        sides = range(common // self.scale + 1, math.floor(common / self.scales[0] + 1e-6) + 1)
        return [common / side for side in sides]

    def presets_at(self, scale: float) -> dict[Preset, float]:
        """Return the probability of each degradation preset for pairs of this scale."""
        clean = self.degradations.get("clean", 0.0)
        if scale >= NEAR_ONE or clean in (0.0, 1.0) or clean <= self.clean_near_one:
            return self.degradations
        kept = {"clean": self.clean_near_one / clean}
        others = (1 - self.clean_near_one) / (1 - clean)
        return {name: p * kept.get(name, others) for name, p in self.degradations.items()}

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        least, largest = self.scales
        if not 1 <= least <= largest == self.scale:
            raise ValueError(f"scales {self.scales} must lie from 1 to the scale, {self.scale}")
        if self.patch % self.scale or self.margin % self.scale:
            raise ValueError(f"patch and margin must be multiples of the scale {self.scale}")
        if unknown := set(self.degradations) - set(PRESETS):
            raise ValueError(
                f"unknown degradation {min(unknown)!r}; choose from {', '.join(PRESETS)}"
            )
        if abs((total := sum(self.degradations.values())) - 1) > 1e-6:
            raise ValueError(f"the shares of the degradations sum to {total:g}; they must sum to 1")
        return self


class Photos:
    """Pairs cut from photographs at random.

    photos: functions that return a photograph. They are called for every crop, so they decide what
    stays in memory.
    """

    def __init__(
        self, photos: Sequence[Callable[[], Photo]], config: DataConfig, seed: int
    ) -> None:
        self.photos = photos
        self.config = config
        self.seed = seed

    def pair(self, number: int) -> Pair:
        """Return pair `number`."""
        return cut_pair(self._photo, self.config, self.seed, number)

    def _photo(self, rng: np.random.Generator) -> Photo:
        return self.photos[int(rng.integers(len(self.photos)))]()


def cut_pair(
    photo: Callable[[np.random.Generator], Photo], config: DataConfig, seed: int, number: int
) -> Pair:
    """Return pair `number`, cut from a photograph. photo: returns one, at random if it likes."""
    rng = np.random.default_rng([seed, number])
    pair = make_pair(photo, config, config.scale_of(seed, number), rng)
    # Drawn last, so that pixels are the same with and without tags.
    dropped = rng.random() < config.tag_dropout
    return pair._replace(tags=()) if dropped else pair


def make_pair(
    photo: Callable[[np.random.Generator], Photo],
    config: DataConfig,
    scale: float,
    rng: np.random.Generator,
) -> Pair:
    """Return a pair of this scale, cut from a photograph at random and degraded at random."""
    crop = _cut_hr(photo, config, rng)
    presets = config.presets_at(scale)
    preset = rng.choice(list(presets), p=list(presets.values()))
    lr = degrade(crop.pixels, scale, PRESETS[preset], rng)
    inner, side = round(config.margin / scale), round(config.patch / scale)
    hr = as_bytes(_centre(crop.pixels, config.margin, config.patch))
    return Pair(hr, as_bytes(_centre(lr, inner, side)), crop.tags)


def make_hr(photo: Photo, config: DataConfig, rng: np.random.Generator) -> Tensor:
    """Return the HR of the pair that `make_pair` cuts from this photograph, without its LR."""
    crop = _cut_hr(lambda _: photo, config, rng)
    return as_bytes(_centre(crop.pixels, config.margin, config.patch))


def _cut_hr(
    photo: Callable[[np.random.Generator], Photo], config: DataConfig, rng: np.random.Generator
) -> Photo:
    """Return a random crop with its margins, (3, needs, needs) in [0, 1], and its tags."""
    # Half the time the busier of two crops.
    crops = [_random_crop(photo(rng), config, rng) for _ in range(1 if rng.random() < 0.5 else 2)]
    crop = max(crops, key=lambda crop: crop.pixels.diff(dim=-1).abs().mean().item())
    return Photo(_augment(crop.pixels, rng), crop.tags)


def _random_crop(photo: Photo, config: DataConfig, rng: np.random.Generator) -> Photo:
    """Return a crop (3, size, size) in [0, 1]."""
    pixels, size = photo.pixels, config.needs
    low, high = np.log(config.shrink)
    shrink = max(np.exp(rng.uniform(low, high)), size / min(pixels.shape[1:]))
    source = min(round(size / shrink), *pixels.shape[1:])
    top, left = (int(rng.integers(n - source + 1)) for n in pixels.shape[1:])
    crop = pixels[:, top : top + source, left : left + source].float()[None] / 255
    return Photo(resize(crop, size, size)[0].clamp(0, 1), photo.tags)


def collate(pairs: Sequence[Pair], numbers: Sequence[int]) -> Batch:
    """Join pairs of equal size to one batch of floats in [-1, 1]."""
    hrs, lrs, tags = zip(*pairs, strict=True)
    hr, lr = (torch.stack(side).float() / 127.5 - 1 for side in (hrs, lrs))
    return Batch(hr, lr, torch.tensor(numbers), tags)


class Batches(IterableDataset[Batch]):
    """Endless batches from pair number `start` on, in order; worker i of w makes every w-th."""

    def __init__(self, photos: Photos, start: int) -> None:
        self.photos = photos
        self.start = start

    def __iter__(self) -> Iterator[Batch]:
        info = torch.utils.data.get_worker_info()
        mine, workers = (info.id, info.num_workers) if info else (0, 1)
        size = self.photos.config.batch
        for first in itertools.count(self.start + mine * size, workers * size):
            numbers = range(first, first + size)
            yield collate([self.photos.pair(n) for n in numbers], numbers)


def load_photos(folder: Path, config: DataConfig, seed: int) -> Photos:
    """Decode the photographs of a local folder into memory, with the tags of its tags.jsonl.

    Raises InputError if none is large enough to cut a patch from, or for a wrong tags.jsonl.
    """
    notes = Notes()
    paths = find_images(folder, notes)
    notes.tell(str(folder))
    names = [path.relative_to(folder).as_posix() for path in paths]
    sidecar = folder / SIDECAR
    tags = read_tags(sidecar.read_bytes(), str(sidecar), names) if sidecar.is_file() else {}
    decoded = [
        Photo(as_bytes(read(path).pixels), tags.get(name, ()))
        for path, name in zip(paths, names, strict=True)
    ]
    large = [photo for photo in decoded if min(photo.pixels.shape[1:]) >= config.needs]
    if not large:
        raise InputError(
            f"{folder}: no photograph has a shorter side of at least {config.needs} px; add larger "
            "ones, or lower data.patch"
        )
    return Photos([partial(same, photo) for photo in large], config, seed)


def same(photo: Photo) -> Photo:
    """Return the photograph itself. With `partial` it becomes a function, as `Photos` needs."""
    return photo


class _Named(BaseModel):
    name: str


class _Line(BaseModel):
    """A line that `linearsr tag --json` prints; plain names are accepted as well."""

    file: PurePosixPath
    tags: list[_Named | str]


def read_tags(sidecar: bytes, where: str, names: Sequence[str]) -> Mapping[str, Tags]:
    """Return tags by `names`, the paths of the pictures in a folder, from its tags.jsonl.

    A line belongs to the picture that its `file` ends with, so the folder may have been tagged from
    anywhere. Raises InputError for another format, and if no picture is named.
    """
    known, tags = set(names), {}
    try:
        lines = [_Line.model_validate_json(line) for line in sidecar.splitlines() if line.strip()]
    except ValidationError as error:
        raise InputError(
            f"{where}: not made by `linearsr tag FOLDER --json`: {one_line(error)}"
        ) from error
    for line in lines:
        ends = ("/".join(line.file.parts[i:]) for i in range(len(line.file.parts)))
        name = next((end for end in ends if end in known), None)
        if name:
            tags[name] = tuple(t if isinstance(t, str) else t.name for t in line.tags)
    if not tags:
        example = f", for example {names[0]}" if names else ""
        raise InputError(
            f"{where}: lists none of the pictures in its folder{example}; make it again with "
            "`linearsr tag FOLDER --json`"
        )
    return tags


def as_bytes(pixels: Tensor) -> Tensor:
    """Return pixels (3, H, W) in [0, 1] as uint8."""
    return (pixels * 255).round().byte()


def _centre(picture: Tensor, margin: int, size: int) -> Tensor:
    return picture[:, margin : margin + size, margin : margin + size]


def _augment(hr: Tensor, rng: np.random.Generator) -> Tensor:
    """Apply one of eight symmetries, and sometimes another channel order and exposure."""
    hr = torch.rot90(hr, int(rng.integers(4)), (1, 2))
    if rng.random() < 0.5:
        hr = hr.flip(2)
    if rng.random() < 0.3:
        hr = hr[torch.from_numpy(rng.permutation(3))]
    if rng.random() < 0.3:
        hr = hr ** rng.uniform(0.7, 1.4)
    return hr.contiguous()


def stream(
    folder: Path, config: DataConfig, seed: int, start: int = 0, workers: int = 1
) -> Iterator[Batch]:
    """Return batches from pair `start` on, made in `workers` processes (0: in this one)."""
    batches = Batches(load_photos(folder, config, seed), start)
    # Torch's own collation would turn tags into lists.
    loader = DataLoader(batches, batch_size=None, num_workers=workers, collate_fn=_as_is)
    return iter(loader)


def _as_is(batch: Any) -> Any:
    return batch
