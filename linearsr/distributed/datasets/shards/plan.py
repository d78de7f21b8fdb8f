"""What goes into a shard dataset: every picture looked at once, then an explicit list of rows.

    list files ─▶ look: decode ▸ size, crops, hash ─▶ near-duplicates ─▶ rows, cut into shards

The looks are kept in OUTPUT/survey, a part of the list per file, written whole: what is there is
done. All that follows from them is a function of the settings, whatever the cluster.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from linearsr.config import Config
from linearsr.distributed.datasets.shards.filters import (
    MOST_DISTANCE,
    boxes,
    near_duplicates,
    perceptual_hash,
    sharpness,
)
from linearsr.distributed.tasks import each
from linearsr.errors import InputError, StorageError, one_line
from linearsr.imaging.degradation import Preset
from linearsr.imaging.files import DEFAULT_MAX_PIXELS, READ_SUFFIXES, Picture, read
from linearsr.storage.location import Location, locate, url

# A shard ends at so many HR pixels, if not by its rows: it is built in memory.
SHARD_PIXELS: Final = 1 << 28

BOX: Final = pa.struct([(side, pa.int32()) for side in ("left", "top", "width", "height")])
# One look at one picture. `reason` is null for a picture that is used; `digest` is of its bytes.
SURVEY: Final = pa.schema(
    [
        ("number", pa.int64()),
        ("source", pa.string()),
        ("digest", pa.string()),
        ("hash", pa.uint64()),
        ("boxes", pa.list_(BOX)),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
# The reason of pictures that are no pictures: a fault, where the others are filters at work.
UNREADABLE: Final = "unreadable"


class ShardConfig(Config):
    """One shard dataset, of folders of pictures, in a folder of its own."""

    inputs: tuple[str, ...] = Field(min_length=1)
    """Folders of pictures; s3:// too."""
    output: str
    """A folder of its own; s3:// too."""
    scale: int = Field(default=4, ge=1, le=16)
    """How many times smaller LR is."""
    degradation: Preset = "seesr"
    """How LR is made of HR."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of crops, order and degradations."""
    crop: int = Field(default=512, ge=0)
    """Side of square HR crops in pixels; 0 takes whole pictures."""
    crops_per_picture: int = Field(default=4, ge=1)
    """At most so many crops of a picture."""
    min_size: int = Field(default=0, ge=0)
    """Shorter side in pixels that a picture must have, if more than the crop's."""
    min_sharpness: float = Field(default=20.0, ge=0)
    """What a crop must have (`filters.sharpness`); 0 for any."""
    duplicate_distance: int = Field(default=4, ge=-1, le=MOST_DISTANCE)
    """Bits of 64 in which the hashes of near-duplicates differ at most; -1 keeps them."""
    max_pixels: int = Field(default=DEFAULT_MAX_PIXELS, ge=1)
    """Larger pictures are refused."""
    rows_per_shard: int = Field(default=256, ge=1)
    """At most so many rows in a shard."""
    cpus: float = Field(default=1.0, gt=0)
    """Logical CPUs that each task reserves."""
    most_cpus: float = Field(default=128, gt=0)
    """Logical CPUs that a cluster which grows by itself is asked for, at most; by default those of
    cluster.yaml's CPU workers."""

    @field_validator("inputs")
    @classmethod
    def _absolute(cls, paths: tuple[str, ...]) -> tuple[str, ...]:
        """Workers have working folders of their own."""
        places = tuple(url(locate(path)) for path in paths)
        for i, place in enumerate(places):
            if any(_overlap(place, other) for other in places[:i]):
                raise ValueError(f"{place} would be read twice")
        return places

    @field_validator("output")
    @classmethod
    def _apart(cls, path: str, info: ValidationInfo) -> str:
        output = url(locate(path))
        for place in info.data.get("inputs", ()):
            if _overlap(place, output):
                raise ValueError(f"must lie apart from the input {place}")
        return output

    @field_validator("crop")
    @classmethod
    def _fits(cls, crop: int, info: ValidationInfo) -> int:
        if crop % info.data.get("scale", 1):
            raise ValueError(f"must be a multiple of the scale {info.data['scale']}")
        return crop

    def roots(self) -> dict[str, str]:
        """Each input by the name that its pictures' sources begin with."""
        names = [locate(path).name or "pictures" for path in self.inputs]
        if len(set(names)) < len(names):
            names = [f"{i}-{name}" for i, name in enumerate(names, 1)]
        return dict(zip(names, self.inputs, strict=True))

    def rng(self, name: str) -> np.random.Generator:
        """Random numbers that depend on the seed and the name alone."""
        return np.random.default_rng(self.seed_of(name))

    def seed_of(self, name: str) -> int:
        """63 bits for a name."""
        digest = hashlib.blake2b(f"{self.seed}:{name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1


def _overlap(one: str, other: str) -> bool:
    first, second = (f"{path.rstrip('/')}/" for path in (one, other))
    return first.startswith(second) or second.startswith(first)


def list_sources(config: ShardConfig) -> list[str]:
    """Every picture as `input's name/path below it`: in the order of inputs, then sorted.

    Raises InputError when there is none.
    """
    sources = []
    for name, path in config.roots().items():
        folder = locate(path)
        found = [file.relative_to(folder) for file in folder.files()]
        pictures = [path for path in found if _suffix(path) in READ_SUFFIXES]
        if not pictures:
            raise InputError(f"{path}: no pictures here ({', '.join(READ_SUFFIXES)})")
        sources += [f"{name}/{picture}" for picture in pictures]
    return sources


def _suffix(name: str) -> str:
    return f".{name.rsplit('.', 1)[-1].lower()}"


def fetcher(config: ShardConfig) -> Callable[[str], bytes]:
    """A function from a source to its file's bytes, which raises InputError."""
    roots = {name: locate(path) for name, path in config.roots().items()}

    def fetch(source: str) -> bytes:
        root, name = source.split("/", 1)
        return (roots[root] / name).read()

    return fetch


def digest(data: bytes) -> str:
    """Tells a picture file from what it was."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def decode(data: bytes, source: str, config: ShardConfig) -> tuple[Tensor, Picture]:
    """Pixels (3, H, W) uint8, transparency over white; and a Picture without any, for its profile.

    Raises InputError.
    """
    picture = read(data, max_pixels=config.max_pixels, name=source)
    pixels = torch.empty(picture.pixels.shape, dtype=torch.uint8)
    # In place, a plane at a time: large photographs are larger in floats.
    for target, plane in zip(pixels, picture.pixels, strict=True):
        if picture.alpha is not None:
            plane.sub_(1).mul_(picture.alpha[0]).add_(1)
        target.copy_(plane.mul_(255).round_())
    # EXIF may say where someone lives, and says nothing about a crop.
    bare = replace(picture, pixels=torch.empty(3, 0, 0), alpha=None, bits=8, exif=None)
    return pixels, bare


# Looking


def survey(
    config: ShardConfig, sources: list[str], tick: Callable[[int], object] = lambda _: None
) -> pa.Table:
    """A row of SURVEY for each source, in order; `tick` is told of how many more there are.

    What no worker survived looking at is unreadable. Raises StorageError where storage fails for
    good; nothing is lost then.
    """
    size = min(512, max(8, len(sources) // 512))
    parts = {n: sources[n : n + size] for n in range(0, len(sources), size)}
    tables = [SURVEY.empty_table()]
    for first, table in each(
        parts.items(), partial(_look_at_part, config=config), config.cpus, config.most_cpus
    ):
        if table is not None:
            tick(table.num_rows)
            tables.append(table)
            del parts[first]
    # Storage failed, or a worker died of some picture.
    tables += [_one_by_one(first, names, config, tick) for first, names in parts.items()]
    return pa.concat_tables(tables).sort_by("number")


def _one_by_one(
    first: int, names: list[str], config: ShardConfig, tick: Callable[[int], object]
) -> pa.Table:
    """A part that failed as a whole, a task for each picture."""
    pictures = dict(enumerate(names, first))
    looks = {
        number: _look(number, source, reason=UNREADABLE, detail="its worker died, repeatedly")
        for number, source in pictures.items()
    }
    for row in each(
        pictures.items(), partial(_look_at_one, config=config), config.cpus, config.most_cpus
    ):
        looks[row["number"]] = row
        tick(1)
    part = pa.Table.from_pylist(list(looks.values()), SURVEY)
    _part(config, first).write(_as_bytes(part))
    return part


def _part(config: ShardConfig, first: int) -> Location:
    return locate(config.output) / f"survey/{first:08d}.arrow"


def _look_at_part(part: tuple[int, list[str]], config: ShardConfig) -> tuple[int, pa.Table | None]:
    """The looks at one part, kept as a file; None when storage failed."""
    first, sources = part
    file = _part(config, first)
    if file.exists():
        return first, pa.ipc.open_file(file.read()).read_all()
    one_thread()
    fetch = fetcher(config)
    try:
        looks = [
            look(number, source, fetch, config) for number, source in enumerate(sources, first)
        ]
    except StorageError:
        return first, None
    table = pa.Table.from_pylist(looks, SURVEY)
    file.write(_as_bytes(table))
    return first, table


def _look_at_one(picture: tuple[int, str], config: ShardConfig) -> dict[str, Any]:
    one_thread()
    return look(*picture, fetcher(config), config)


def one_thread() -> None:
    """Sums may be added up in another order by more threads, and the last bit may differ."""
    torch.set_num_threads(1)


def _as_bytes(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def look(
    number: int, source: str, fetch: Callable[[str], bytes], config: ShardConfig
) -> dict[str, Any]:
    """One picture's row of SURVEY. Raises StorageError, which says nothing about the picture."""
    try:
        data = fetch(source)
        pixels, _ = decode(data, source, config)
        reason, detail, found = _judge(pixels, source, config)
    except StorageError:
        raise
    except Exception as error:  # One odd picture must not end the night.
        told = one_line(error).removeprefix(f"{source}: ")
        return _look(number, source, reason=UNREADABLE, detail=told)
    if reason:
        return _look(number, source, reason=reason, detail=detail)
    return _look(number, source, digest=digest(data), hash=perceptual_hash(pixels), boxes=found)


def _look(number: int, source: str, **known: object) -> dict[str, Any]:
    return {**dict.fromkeys(SURVEY.names), "number": number, "source": source, **known}


def _judge(
    pixels: Tensor, source: str, config: ShardConfig
) -> tuple[str | None, str | None, list[dict[str, int]]]:
    """Why the picture is not used, and details; or the boxes to cut from it."""
    height, width = pixels.shape[1:]
    least = max(config.min_size, config.crop, config.scale)
    if min(height, width) < least:
        detail = f"{width}x{height}, shorter side below {least}; see --crop and --min-size"
        return "too small", detail, []
    found, best = [], 0.0
    for box in boxes(height, width, config.crop, config.scale, config.rng(source)):
        value = sharpness(box.cut(pixels))
        best = max(best, value)
        if value >= config.min_sharpness:
            found.append(box._asdict())
        if len(found) == config.crops_per_picture:
            break
    if found:
        return None, None, found
    return "blurred", f"sharpness {best:.1f} at best, below {config.min_sharpness:g}", []


# Planning


def reject_duplicates(looks: pa.Table, distance: int) -> pa.Table:
    """The same looks, with a reason where a picture looks like one before it that is used."""
    numbers = np.flatnonzero(pc.is_null(looks["reason"]).to_numpy())
    first = near_duplicates(looks["hash"].take(numbers).to_pylist(), distance)
    reasons, details = looks["reason"].to_pylist(), looks["detail"].to_pylist()
    sources = looks["source"]
    for number, other in zip(numbers, first, strict=True):
        if other is not None:
            reasons[number] = "near-duplicate"
            details[number] = f"of {sources[int(numbers[other])]}"
    names = looks.column_names
    looks = looks.set_column(names.index("reason"), "reason", pa.array(reasons, pa.string()))
    return looks.set_column(names.index("detail"), "detail", pa.array(details, pa.string()))


def plan(looks: pa.Table, config: ShardConfig) -> list[pa.Table]:
    """A table per shard: id, source, digest, left, top, width, height.

    Pictures are shuffled over shards, so that a shard is a sample of all; a picture's crops stay
    together, so that it is decoded once.
    """
    used = looks.filter(pc.is_null(looks["reason"]))
    order = np.random.default_rng(config.seed).permutation(used.num_rows)
    rows = _rows(used.take(order).combine_chunks())
    pixels = (rows["width"].to_numpy().astype(np.int64) * rows["height"].to_numpy()).tolist()
    # Taken, not sliced: a slice would carry the whole table to its worker.
    return [
        rows.take(np.arange(*ends)) for ends in cut(pixels, config.rows_per_shard, SHARD_PIXELS)
    ]


def _rows(used: pa.Table) -> pa.Table:
    """A row for each box."""
    nested = used["boxes"].combine_chunks()
    parents = pc.list_parent_indices(nested)
    flat = pc.list_flatten(nested)
    counts = pc.list_value_length(nested).to_numpy(zero_copy_only=False)
    nth = np.arange(len(flat)) - np.repeat(np.cumsum(counts) - counts, counts)
    sources = used["source"].take(parents)
    ids = pc.binary_join_element_wise(sources, pa.array(nth).cast(pa.string()), "#")
    named = {"id": ids, "source": sources, "digest": used["digest"].take(parents)}
    return pa.table({**named, **{field.name: flat.field(field.name) for field in BOX}})


def cut(pixels: list[int], most_rows: int, most_pixels: int) -> Iterator[tuple[int, int]]:
    """First and last (excluded) of groups of rows within both limits, or of a single row."""
    start, total = 0, 0
    for i, size in enumerate(pixels):
        if i > start and (i - start == most_rows or total + size > most_pixels):
            yield start, i
            start, total = i, 0
        total += size
    if pixels:
        yield start, len(pixels)
