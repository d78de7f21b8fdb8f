"""Scan pictures: decode each one once, and note its size, crops and hash, or why it is unusable.

The results are kept in OUTPUT/scan, each file written whole, and are read back by later runs.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Final

import pyarrow as pa
import torch
from torch import Tensor

from linearsr.distributed.datasets.shards.config import ShardConfig
from linearsr.distributed.datasets.shards.filters import boxes, perceptual_hash, sharpness
from linearsr.distributed.queue import CRASHED, map_tasks
from linearsr.errors import InputError, StorageError, one_line
from linearsr.imaging.files import READ_SUFFIXES, Picture, read
from linearsr.imaging.sources import list_pictures
from linearsr.pipeline.notes import notes_of
from linearsr.storage.location import Location, locate
from linearsr.storage.walk import Notes

BOX: Final = pa.struct([(side, pa.int32()) for side in ("left", "top", "width", "height")])
# A row per picture. `reason` is null for a picture that is used, and `detail` has its notes then;
# `digest` is of the file's bytes.
SCAN: Final = pa.schema(
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
# The reason of files that cannot be decoded: an error, where other reasons are filters at work.
UNREADABLE: Final = "unreadable"


def list_sources(config: ShardConfig, notes: Notes | None = None) -> list[str]:
    """Return every picture as `input's name/path below it`, in the order of inputs, then sorted.

    notes: gets what is left out, and as failures the pictures and folders that cannot be listed.
    Raises InputError for an input without pictures.
    """
    sources = []
    for name, path in config.roots().items():
        folder, seen = locate(path), Notes()
        pictures = list_pictures(folder.files(seen), folder, seen)
        if not pictures and not seen.failures:
            raise InputError(f"{path}: no pictures here ({', '.join(READ_SUFFIXES)})")
        sources += [f"{name}/{picture.relative_to(folder)}" for picture in pictures]
        if notes is not None:
            notes.add(seen, name)
    return sources


def fetcher(config: ShardConfig) -> Callable[[str], bytes]:
    """Return a function from a source to its file's bytes, which raises InputError."""
    roots = {name: locate(path) for name, path in config.roots().items()}

    def fetch(source: str) -> bytes:
        root, name = source.split("/", 1)
        return (roots[root] / name).read()

    return fetch


def digest(data: bytes) -> str:
    """Return a digest that tells whether a picture's file has changed."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def decode(data: bytes, source: str, config: ShardConfig) -> tuple[Tensor, Picture]:
    """Return the pixels (3, H, W) as uint8, and a Picture without pixels to make crops from.

    Transparent parts are white. The Picture carries the colour profile. Raises InputError.
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


def use_one_thread() -> None:
    """Fix the order of sums: with more threads the last bit may differ."""
    torch.set_num_threads(1)


def scan(
    config: ShardConfig, sources: list[str], tick: Callable[[int], object] = lambda _: None
) -> pa.Table:
    """Return a row with schema SCAN for each source, in order.

    tick: called with the number of new rows. A picture that keeps crashing its worker counts as
    unreadable. Raises StorageError if the storage fails for good; finished parts stay in
    OUTPUT/scan for the next run.
    """
    size = min(512, max(8, len(sources) // 512))
    parts = {n: sources[n : n + size] for n in range(0, len(sources), size)}
    tables = [SCAN.empty_table()]
    scan_part = partial(_scan_part, config=config)
    for (first, _), table in map_tasks(parts.items(), scan_part, config.cpus, config.max_cpus):
        if table is not None:
            tick(table.num_rows)
            tables.append(table)
            del parts[first]
    # Storage failed, or some picture kills its worker: a task for each picture finds out which.
    tables += [scan_singly(first, names, config, tick) for first, names in parts.items()]
    return pa.concat_tables(tables).sort_by("number")


def scan_singly(
    first: int, names: list[str], config: ShardConfig, tick: Callable[[int], object]
) -> pa.Table:
    """Scan a failed part again, each picture in a task of its own; keep and return its rows."""
    rows = []
    pictures, scan_one = enumerate(names, first), partial(_scan_one, config=config)
    for (number, source), row in map_tasks(pictures, scan_one, config.cpus, config.max_cpus):
        rows.append(row or _row(number, source, reason=UNREADABLE, detail=CRASHED))
        tick(1)
    return _save(rows, _part_file(config, first))


def _scan_part(part: tuple[int, list[str]], config: ShardConfig) -> pa.Table | None:
    """Scan one part, or read what an earlier run kept of it; None if storage failed."""
    first, sources = part
    file = _part_file(config, first)
    if file.exists():
        return pa.ipc.open_file(file.read()).read_all()
    use_one_thread()
    fetch = fetcher(config)
    try:
        rows = [scan_picture(n, source, fetch, config) for n, source in enumerate(sources, first)]
    except StorageError:
        return None
    return _save(rows, file)


def _scan_one(picture: tuple[int, str], config: ShardConfig) -> dict[str, Any]:
    use_one_thread()
    return scan_picture(*picture, fetcher(config), config)


def _part_file(config: ShardConfig, first: int) -> Location:
    return locate(config.output) / f"scan/{first:08d}.arrow"


def _save(rows: list[dict[str, Any]], file: Location) -> pa.Table:
    table = pa.Table.from_pylist(sorted(rows, key=lambda row: row["number"]), SCAN)
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    file.write(sink.getvalue())
    return table


def scan_picture(
    number: int, source: str, fetch: Callable[[str], bytes], config: ShardConfig
) -> dict[str, Any]:
    """Return a picture's row of SCAN. Raises StorageError, which does not make it unreadable."""
    try:
        data = fetch(source)
        pixels, picture = decode(data, source, config)
        reason, detail, crops = _choose_crops(pixels, source, config)
        if reason:
            return _row(number, source, reason=reason, detail=detail)
        known = {"digest": digest(data), "hash": perceptual_hash(pixels)}
        notes = "; ".join(notes_of(picture)) or None
        return _row(number, source, boxes=crops, detail=notes, **known)
    except StorageError:
        raise
    except Exception as error:  # one odd picture must not end the job
        detail = one_line(error).removeprefix(f"{source}: ")
        return _row(number, source, reason=UNREADABLE, detail=detail)


def _row(number: int, source: str, **known: object) -> dict[str, Any]:
    return {**dict.fromkeys(SCAN.names), "number": number, "source": source, **known}


def _choose_crops(
    pixels: Tensor, source: str, config: ShardConfig
) -> tuple[str | None, str | None, list[dict[str, int]]]:
    """Return (reason, detail, boxes to cut). If there are no boxes, the first two say why."""
    height, width = pixels.shape[1:]
    if min(height, width) < config.least:
        detail = f"{width}x{height}, shorter side below {config.least}; see --crop and --min-size"
        return "too small", detail, []
    chosen, best = [], 0.0
    for box in boxes(height, width, config.crop, config.scale, config.rng(source)):
        value = sharpness(box.cut(pixels))
        best = max(best, value)
        if value >= config.min_sharpness:
            chosen.append(box._asdict())
        if len(chosen) == config.crops_per_picture:
            break
    if chosen:
        return None, None, chosen
    return "blurred", f"sharpness {best:.1f} at best, below {config.min_sharpness:g}", []
