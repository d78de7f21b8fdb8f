"""Training data on a cluster: a folder of pictures or a shard dataset -> batches, by Ray Data.

Each rank streams its own part of every numbered global batch, made by an actor of its own beside
it. Pair number n is the same whoever makes it, so neither restarts nor another number of ranks
change the data order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Mapping
from functools import lru_cache, partial
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from linearsr.errors import InputError, LinearSRError, StorageError
from linearsr.imaging.files import read
from linearsr.imaging.sources import choose, map_files, open_shard
from linearsr.storage.location import Location, explained, locate
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
    cut_pair,
    read_tags,
)

# Decoded photographs, and row groups of encoded ones, that one actor keeps.
PHOTOS_KEPT = 64
GROUPS_KEPT = 4
# Number of unusable rows of a shard dataset, one after the other, that end a run.
MAX_SKIPPED = 100
# Number of pictures that are checked before a run may start.
CHECKED = 32
# Small blocks: a rank waits for its first one, and prefetches by blocks.
STEPS_PER_BLOCK, MAX_BLOCKS, BLOCK_BYTES = 8, 512, 8 << 20


class Source(Protocol):
    """Numbered training pairs."""

    def pair(self, number: int) -> Pair:
        """Return pair `number`."""
        ...


def open_source(path: str, config: DataConfig, seed: int) -> Source:
    """Open a folder of pictures or of Parquet shards, local or s3://.

    Tags come from the folder's tags.jsonl, or from the shards' column `tags`, if there is one.
    Raises InputError, with the reason, if there is nothing to train on.
    """
    folder = locate(path)
    pictures, shards = choose(folder, "hr")
    if shards:
        return Shards(shards, config, seed)
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


class _Group(NamedTuple):
    """One row group of one shard: pairs are drawn from whole groups, so each is read once."""

    file: Location
    number: int
    rows: int


class Shards:
    """HR pictures of a shard dataset; each epoch shuffles the groups, and the rows in a group."""

    def __init__(self, files: list[Location], config: DataConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self.groups = [group for groups in map_files(files, _groups) for group in groups]
        self.rows = sum(group.rows for group in self.groups)
        if not self.rows:
            raise InputError(f"{files[0].path}: the shards hold no rows")

    def pair(self, number: int) -> Pair:
        """Return pair `number`; unusable rows are skipped.

        Raises InputError after a whole epoch, or MAX_SKIPPED rows, of unusable ones.
        """
        candidates = range(number, number + min(self.rows, MAX_SKIPPED))
        rows = (self._photo(*divmod(candidate, self.rows)) for candidate in candidates)
        photo = next((row for row in rows if row is not None), None)
        if photo is None:
            raise InputError(
                f"{self.groups[0].file.path}: none of {len(candidates)} rows tried in this data "
                f"set can be decoded and is at least {self.config.needs} px on its shorter side; "
                "build shards with a larger --crop"
            )
        return cut_pair(lambda _: photo, self.config, self.seed, number)

    def _photo(self, epoch: int, position: int) -> Photo | None:
        group, row = self._find(epoch, position)
        columns = _columns(group).slice(row, 1).to_pylist()[0]
        if columns["hr"] is None:
            return None
        try:
            pixels = as_bytes(read(columns["hr"], name=f"{group.file.path}:{row}").pixels)
        except LinearSRError:
            return None
        if min(pixels.shape[1:]) < self.config.needs:
            return None
        return Photo(pixels, tuple(filter(None, columns.get("tags") or ())))

    def _find(self, epoch: int, position: int) -> tuple[_Group, int]:
        order, starts = _epoch_order(tuple(g.rows for g in self.groups), self.seed, epoch)
        nth = int(np.searchsorted(starts, position, side="right")) - 1
        group = self.groups[order[nth]]
        rows = np.random.default_rng([self.seed, epoch, nth]).permutation(group.rows)
        return group, int(rows[position - starts[nth]])


@lru_cache(maxsize=2)
def _epoch_order(rows: tuple[int, ...], seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the groups in the order of an epoch, and the position of each one's first row."""
    order = np.random.default_rng([seed, epoch]).permutation(len(rows))
    return order, np.concatenate([[0], np.cumsum(np.array(rows)[order])])


def _groups(file: Location) -> list[_Group]:
    shard = open_shard(file, "hr")
    metadata, schema = shard.metadata, shard.schema_arrow
    if "tags" in schema.names:
        kind = schema.field("tags").type
        lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        if not lists or str(kind.value_type).removeprefix("large_") != "string":
            raise InputError(
                f"{file.path}: column 'tags' must hold lists of strings; if it holds something "
                "else, rename it"
            )
    sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    return [_Group(file, number, size) for number, size in enumerate(sizes)]


@lru_cache(maxsize=GROUPS_KEPT)
def _columns(group: _Group) -> pa.Table:
    """Read the columns `hr` and, if there is one, `tags`."""
    shard = open_shard(group.file, "hr")
    names = [name for name in ("hr", "tags") if name in shard.schema_arrow.names]
    with explained(group.file):
        return shard.read_row_group(group.number, columns=names)


class Share(NamedTuple):
    """The part of each global batch that a rank takes, and the CPUs of its data actor."""

    rank: int
    world: int
    cpus: float


class _PairMaker:
    """Actor beside a rank that turns step numbers into that rank's pairs of those steps."""

    def __init__(
        self, path: str, config: DataConfig, seed: int, first_step: int, share: Share
    ) -> None:
        self.source = open_source(path, config, seed)
        self.first_step = first_step
        self.batch, self.count = config.batch, config.batch // share.world
        self.offset = share.rank * self.count

    def __call__(self, steps: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        firsts = [(self.first_step + int(n)) * self.batch + self.offset for n in steps["step"]]
        numbers = [n for first in firsts for n in range(first, first + self.count)]
        hr, lr, tags = zip(*(self.source.pair(n) for n in numbers), strict=True)
        return {
            "number": np.array(numbers),
            "hr": np.stack([picture.numpy() for picture in hr]),
            # LR as bytes, since its size differs between steps; tags as text, since a column cannot
            # hold lists of different lengths.
            "lr": np.array([picture.numpy().tobytes() for picture in lr], dtype=object),
            "tags": np.array([json.dumps(names) for names in tags]),
        }


def batches(
    path: str, config: DataConfig, seed: int, seen: int, steps: int, share: Share
) -> Generator[Batch, None, None]:
    """Yield a rank's part of `steps` global batches from pair number `seen` on, in order.

    It must run inside a Ray worker. Pairs are made a few steps ahead.
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
        fn_constructor_args=(path, config, seed, seen // config.batch, share),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=share.cpus,
    )
    for rows in pairs.iter_batches(batch_size=config.batch // share.world, prefetch_batches=2):
        side = math.isqrt(len(rows["lr"][0]) // 3)
        lrs = [torch.from_numpy(np.frombuffer(lr, np.uint8).copy()) for lr in rows["lr"]]
        own = [
            Pair(torch.from_numpy(np.array(hr)), lr.view(3, side, side), tuple(json.loads(names)))
            for hr, lr, names in zip(rows["hr"], lrs, rows["tags"], strict=True)
        ]
        yield collate(own, rows["number"].tolist())
