"""Training data on a cluster: a folder of pictures or a shard dataset -> batches, by Ray Data.

Each rank streams its own part of every numbered global batch, made by an actor of its own beside
it. Pair number n is the same whoever makes it, so neither restarts nor another number of ranks
change the data order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from linearsr.distributed.train.shards import Notes, Wanted, open_rows, read_notes
from linearsr.errors import InputError, LinearSRError, StorageError
from linearsr.imaging.files import read
from linearsr.imaging.sources import choose
from linearsr.storage.location import Location, locate
from linearsr.training.data import (
    SIDECAR,
    Batch,
    DataConfig,
    Pair,
    Photo,
    Photos,
    Tags,
    as_bytes,
    collate,
    read_tags,
)
from linearsr.training.latents import StoredPair, collate_stored

# Decoded photographs that one actor keeps.
PHOTOS_KEPT = 64
# Number of pictures that are checked before a run may start.
CHECKED = 32
# Small blocks: a rank waits for its first one, and prefetches by blocks.
STEPS_PER_BLOCK, MAX_BLOCKS, BLOCK_BYTES = 8, 512, 8 << 20


class Source(Protocol):
    """Numbered training pairs."""

    def pair(self, number: int) -> Pair | StoredPair:
        """Return pair `number`."""
        ...


def open_source(path: str, config: DataConfig, seed: int, wanted: Wanted | None = None) -> Source:
    """Open a folder of pictures or of Parquet shards, local or s3://.

    Tags come from the folder's tags.jsonl, or from the shards' column `tags`, if there is one.
    wanted: what the stage takes from shards with latents; without it, pairs are cut from their HR.
    Raises InputError, with the reason, if there is nothing to train on, and OptionError for latents
    that do not fit.
    """
    folder = locate(path)
    pictures, shards = choose(folder, "hr")
    if shards:
        return open_rows(shards, config, seed, wanted)
    if not pictures:
        raise InputError(f"{path}: no pictures and no .parquet shards to train on")
    decodable = (p for p in pictures[:CHECKED] if _decoded(p, config.needs) is not None)
    usable = tuple(islice(decodable, 3))
    if not usable:
        raise InputError(
            f"{path}: none of the first {CHECKED} pictures can be decoded and is at least "
            f"{config.needs} px on its shorter side (patch plus margins)"
        )
    tags = _tags(folder, pictures)
    photos = [partial(_photo, p, config.needs, usable, tags) for p in pictures]
    return Photos(photos, config, seed)


def notes_about(path: str, config: DataConfig) -> Notes | None:
    """Return the notes about the latents that a stage takes from this folder; None without some."""
    _, shards = choose(locate(path), "hr") if config.latents else ([], [])
    return read_notes(shards[0]) if shards else None


def _tags(folder: Location, pictures: list[Location]) -> Mapping[str, Tags]:
    """Return tags by the whole path of a picture."""
    sidecar = folder / SIDECAR
    if not sidecar.exists():
        return {}
    names = [picture.relative_to(folder) for picture in pictures]
    listed = read_tags(sidecar.read(), sidecar.path, names)
    return {(folder / name).path: tags for name, tags in listed.items()}


@lru_cache(maxsize=PHOTOS_KEPT)
def _decoded(picture: Location, needs: int) -> Tensor | None:
    """Return pixels (3, H, W) uint8, or None if the picture is damaged or too small."""
    try:
        photo = as_bytes(read(picture.read(), name=picture.path).pixels)
    except StorageError:
        raise  # nothing is wrong with the picture
    except LinearSRError:
        return None
    return photo if min(photo.shape[1:]) >= needs else None


def _photo(
    picture: Location, needs: int, instead: tuple[Location, ...], tags: Mapping[str, Tags]
) -> Photo:
    """Return the picture, or another one if it is unusable: a bad file must not end a run."""
    for candidate in (picture, *instead):
        pixels = _decoded(candidate, needs)
        if pixels is not None:
            return Photo(pixels, tags.get(candidate.path, ()))
    raise InputError(
        f"{picture.path}: cannot be used, and nor can the pictures that could be read at the "
        "start; check the folder"
    )


class Share(NamedTuple):
    """The part of each global batch that a rank takes, and the CPUs of its data actor."""

    rank: int
    world: int
    cpus: float


class _PairMaker:
    """Actor beside a rank that turns step numbers into that rank's pairs of those steps."""

    def __init__(
        self,
        path: str,
        config: DataConfig,
        seed: int,
        wanted: Wanted | None,
        first_step: int,
        share: Share,
    ) -> None:
        self.source = open_source(path, config, seed, wanted)
        self.first_step = first_step
        self.batch, self.count = config.batch, config.batch // share.world
        self.offset = share.rank * self.count

    def __call__(self, steps: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        firsts = [(self.first_step + int(n)) * self.batch + self.offset for n in steps["step"]]
        numbers = [n for first in firsts for n in range(first, first + self.count)]
        pairs = [self.source.pair(n) for n in numbers]
        columns: dict[str, np.ndarray] = {
            "number": np.array(numbers),
            # LR as bytes, since its size differs between steps; tags as text, since a column cannot
            # hold lists of different lengths.
            "lr": _bytes(pair.lr for pair in pairs),
            "tags": np.array([json.dumps(pair.tags) for pair in pairs]),
        }
        for name in ("hr", "clean", "condition"):
            if parts := _present(pairs, name):
                columns[name] = np.stack([part.numpy() for part in parts])
        if embedded := _present(pairs, "embedded"):
            columns["embedded"] = _bytes(embedded)
            columns["tag_dim"] = np.array([rows.shape[1] for rows in embedded])
        return columns


def _present(pairs: Sequence[Pair | StoredPair], name: str) -> list[Tensor]:
    """Return this part of all pairs, or nothing if they do not have it."""
    parts = (getattr(pair, name, None) for pair in pairs)
    return [part for part in parts if part is not None]


def _bytes(tensors: Iterable[Tensor]) -> np.ndarray:
    return np.array([tensor.numpy().tobytes() for tensor in tensors], dtype=object)


def _batch(columns: dict[str, np.ndarray]) -> Batch:
    """Return the batch of the pairs that a `_PairMaker` made."""
    numbers = columns["number"].tolist()
    side = math.isqrt(len(columns["lr"][0]) // 3)
    lrs = [torch.from_numpy(np.frombuffer(lr, np.uint8).copy()) for lr in columns["lr"]]
    lrs = [lr.view(3, side, side) for lr in lrs]
    tags = [tuple(json.loads(names)) for names in columns["tags"]]
    tensors: dict[str, list[Tensor]] = {
        name: [torch.from_numpy(np.array(part)) for part in columns[name]]
        for name in ("hr", "clean", "condition")
        if name in columns
    }
    if "clean" not in tensors:
        return collate(list(map(Pair, tensors["hr"], lrs, tags)), numbers)
    if "embedded" in columns:
        rows = zip(columns["embedded"], columns["tag_dim"], strict=True)
        tensors["embedded"] = [torch.from_numpy(_rows(data, dim)) for data, dim in rows]
    stored = [
        StoredPair(lr, tags=names, **{name: parts[i] for name, parts in tensors.items()})
        for i, (lr, names) in enumerate(zip(lrs, tags, strict=True))
    ]
    return collate_stored(stored, numbers)


def _rows(data: bytes, length: int) -> np.ndarray:
    return np.frombuffer(data, np.float32).reshape(-1, length).copy()


def batches(
    path: str,
    config: DataConfig,
    seed: int,
    seen: int,
    steps: int,
    share: Share,
    wanted: Wanted | None = None,
) -> Generator[Batch, None, None]:
    """Yield a rank's part of `steps` global batches from pair number `seen` on, in order.

    It must run inside a Ray worker. Pairs are made a few steps ahead. wanted: see `open_source`.
    """
    import ray

    ray.data.DataContext.get_current().enable_progress_bars = False
    # In memory: reading a range would start tasks of a whole CPU each, which nobody has reserved.
    blocks = min(MAX_BLOCKS, max(1, steps // STEPS_PER_BLOCK))
    tables = [pa.table({"step": part}) for part in np.array_split(np.arange(steps), blocks)]
    dataset = ray.data.from_blocks(tables)
    dataset.context.target_max_block_size = BLOCK_BYTES
    dataset.context.execution_options.preserve_order = True
    pairs = dataset.map_batches(
        _PairMaker,
        fn_constructor_args=(path, config, seed, wanted, seen // config.batch, share),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=share.cpus,
    )
    for columns in pairs.iter_batches(batch_size=config.batch // share.world, prefetch_batches=2):
        yield _batch(columns)
