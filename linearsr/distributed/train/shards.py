"""Training pairs from the rows of shards, in an order that their number alone decides."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from torch import Tensor

from linearsr.config import ModelConfig
from linearsr.distributed.latents import (
    EMBEDDED,
    EMBEDDED_PRECISION,
    EmbeddingsNote,
    embeddings_of,
    encoder_fingerprint,
    latents_of,
    pair_column,
)
from linearsr.errors import InputError, LinearSRError, OptionError
from linearsr.imaging.files import read
from linearsr.imaging.sources import map_files, open_shard
from linearsr.storage.location import Location, explained
from linearsr.training.data import DataConfig, Pair, Photo, Tags, as_bytes, cut_pair, make_hr
from linearsr.training.latents import LatentsConfig, StoredPair, unpack

# Row groups of encoded pictures that one actor keeps, or single columns of them.
GROUPS_KEPT = 4
# Number of unusable rows of a shard dataset, one after the other, that end a run.
MAX_SKIPPED = 100
CUT_INSTEAD = "or cut pairs from HR with --set data.latents=false"

Row = TypeVar("Row")


class Group(NamedTuple):
    """One row group of one shard: pairs are drawn from whole groups, so each is read once."""

    file: Location
    number: int
    rows: int


class Rows:
    """The rows of all shards; each epoch shuffles the groups, and the rows in a group."""

    def __init__(self, groups: list[Group], seed: int) -> None:
        self.groups, self.seed = groups, seed
        self.rows = sum(group.rows for group in groups)

    def usable(self, number: int, read: Callable[[Group, int], Row | None], problem: str) -> Row:
        """Return what `read` makes of row `number`, or of the next row of which it makes something.

        Raises InputError, with the problem, after a whole epoch or MAX_SKIPPED unusable rows.
        """
        candidates = range(number, number + min(self.rows, MAX_SKIPPED))
        results = (read(*self._find(*divmod(at, self.rows))) for at in candidates)
        found = next((result for result in results if result is not None), None)
        if found is None:
            raise InputError(
                f"{self.groups[0].file.path}: none of {len(candidates)} rows tried in this data "
                f"set {problem}"
            )
        return found

    def _find(self, epoch: int, position: int) -> tuple[Group, int]:
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


class Shards(Rows):
    """Pairs that are cut from the HR pictures of a shard dataset."""

    def __init__(self, groups: list[Group], config: DataConfig, seed: int) -> None:
        super().__init__(groups, seed)
        self.config = config

    def pair(self, number: int) -> Pair:
        """Return pair `number`; unusable rows are skipped, as `Rows.usable` says."""
        photo = self.usable(
            number,
            self._photo,
            f"can be decoded and is at least {self.config.needs} px on its shorter side; build "
            "shards with a larger --crop",
        )
        return cut_pair(lambda _: photo, self.config, self.seed, number)

    def _photo(self, group: Group, row: int) -> Photo | None:
        columns = _row(group, row, "hr", "tags")
        pixels = _decoded(columns["hr"])
        if pixels is None or min(pixels.shape[1:]) < self.config.needs:
            return None
        return Photo(pixels, _names(columns))


class Wanted(NamedTuple):
    """Entries that a stage reads from shards with latents.

    model: the model that is trained, whose encoders must be those of the shards. pixels: whether
    the stage needs HR pictures as well.
    """

    model: ModelConfig
    pixels: bool


class Notes(NamedTuple):
    """How the latents of a shard dataset were made, and its tag embeddings, if it has any."""

    latents: LatentsConfig
    embeddings: EmbeddingsNote | None

    def check_recipe(self, model: ModelConfig, data: DataConfig) -> None:
        """Raise OptionError, naming what differs, if the latents do not fit a model and its data.

        Weights are not compared: see `check_weights`.
        """
        if differences := self.latents.differences(model, data):
            raise OptionError(
                "the latents of these shards do not fit the recipe: they have "
                f"{'; '.join(differences)}. Give --set with the values that they were built with, "
                f"build shards for this recipe, {CUT_INSTEAD}"
            )

    def check_weights(self, model: ModelConfig, digest: str) -> None:
        """Raise OptionError if other weights made the latents or embeddings than the model's.

        digest: that of the model's autoencoder.
        """
        if self.latents.digest != digest:
            raise OptionError(
                f"the shards have latents of {_named(self.latents.latent.source)} (digest "
                f"{self.latents.digest}), but the model's autoencoder is "
                f"{_named(model.latent.source)} (digest {digest}); give the model that "
                f"autoencoder as model.latent.source, build the shards again, {CUT_INSTEAD}"
            )
        if self.embeddings is None or model.tags is None:
            return
        ours, theirs = self.embeddings.encoder, encoder_fingerprint(model.tags.source)
        if ours != theirs:
            raise OptionError(
                f"the shards have tag embeddings of {self.embeddings.source!r} ({ours}), but the "
                f"model's tag encoder is {model.tags.source!r} ({theirs}); give the model that "
                f"encoder as model.tags.source, tag the shards again, {CUT_INSTEAD}"
            )


def _named(source: str | None) -> str:
    return "space-to-depth" if source is None else repr(source)


class StoredShards(Rows):
    """Pairs that were cut, degraded and encoded when the shards were built.

    All pairs of a batch are of one variant, since a batch has one scale. Each variant has its turn
    once in as many batches as there are variants.
    """

    def __init__(
        self, groups: list[Group], config: DataConfig, seed: int, notes: Notes, wanted: Wanted
    ) -> None:
        super().__init__(groups, seed)
        self.config, self.notes, self.wanted = config, notes, wanted
        self.shape = notes.latents.shape(wanted.model.denoiser.latent_channels)

    def pair(self, number: int) -> StoredPair:
        """Return pair `number`; unusable rows are skipped, as `Rows.usable` says."""
        variant = self._variant(number)
        pair = self.usable(
            number,
            lambda group, row: self._stored(group, row, variant),
            f"has a usable latent of {self.shape} numbers in {pair_column(variant)!r}; build the "
            f"shards again, {CUT_INSTEAD}",
        )
        dropped = np.random.default_rng([self.seed, number, 5]).random() < self.config.tag_dropout
        if not dropped:
            return pair
        none = None if pair.embedded is None else pair.embedded[:0]
        return pair._replace(tags=(), embedded=none)

    def _variant(self, number: int) -> int:
        """Return the variant of a pair, which is that of its whole batch."""
        count = self.notes.latents.variants
        turn, place = divmod(number // self.config.batch, count)
        return int(np.random.default_rng([self.seed, turn, 6]).permutation(count)[place])

    def _stored(self, group: Group, row: int, variant: int) -> StoredPair | None:
        """Return the variant of a row, or None if a part of it is missing or damaged."""
        made, model = self.notes.latents, self.wanted.model
        name = pair_column(variant)
        pixels = ("hr",) if self.wanted.pixels else ()
        columns = _row(group, row, name, "tags", EMBEDDED.name, *pixels)
        parts = columns[name] or {}
        lr = _decoded(parts.get("lr"))
        clean = unpack(parts.get("latent") or b"", made.precision, self.shape)
        if lr is None or clean is None or lr.shape[1:] != (self._lr_side(variant),) * 2:
            return None
        pair = StoredPair(lr, clean, tags=_names(columns))
        if model.denoiser.condition_latent:
            condition = unpack(parts.get("condition") or b"", made.precision, self.shape)
            if condition is None:
                return None
            pair = pair._replace(condition=condition)
        if self.notes.embeddings is not None and model.tags is not None:
            shape = (-1, self.notes.embeddings.dim)
            embedded = unpack(columns[EMBEDDED.name] or b"", EMBEDDED_PRECISION, shape)
            if embedded is None:
                return None
            pair = pair._replace(embedded=embedded)
        if self.wanted.pixels:
            hr = self._hr(columns["hr"], parts["seed"])
            return None if hr is None else pair._replace(hr=hr)
        return pair

    def _hr(self, encoded: bytes | None, seed: int | None) -> Tensor | None:
        """Return HR of a variant, cut again from the row's HR; None if it cannot be."""
        pixels, data = _decoded(encoded), self.notes.latents.data
        if pixels is None or seed is None or min(pixels.shape[1:]) < data.needs:
            return None
        return make_hr(Photo(pixels), data, np.random.default_rng(seed))

    def _lr_side(self, variant: int) -> int:
        made = self.notes.latents
        return round(made.data.patch / made.scales[variant])


def open_rows(
    files: list[Location], config: DataConfig, seed: int, wanted: Wanted | None
) -> Shards | StoredShards:
    """Open shards: by their latents, if they have some and the stage takes them.

    Raises InputError for shards without rows, or of which some were made otherwise than others, and
    OptionError if their latents do not fit the model and the data of the recipe. Weights are not
    compared: see `Notes.check_weights`.
    """
    opened = map_files(files, _open)
    groups = [group for shard in opened for group in shard.groups]
    if not groups or not any(group.rows for group in groups):
        raise InputError(f"{files[0].path}: the shards hold no rows")
    notes = None
    if wanted is not None and config.latents:
        notes = _common(files, [shard.schema for shard in opened], wanted.model)
    if notes is None or wanted is None:
        return Shards(groups, config, seed)
    notes.check_recipe(wanted.model, config)
    return StoredShards(groups, config, seed, notes, wanted)


def read_notes(file: Location) -> Notes | None:
    """Return the notes about a shard's latents and embeddings; None if it has no latents."""
    return _notes(file, open_shard(file, "hr").schema_arrow)


def _notes(file: Location, schema: pa.Schema) -> Notes | None:
    latents = latents_of(schema, file.path)
    return None if latents is None else Notes(latents, embeddings_of(schema, file.path))


def _common(files: list[Location], schemas: list[pa.Schema], model: ModelConfig) -> Notes | None:
    """Return the notes of all shards, which must be the same as far as the model is concerned."""
    all_notes = [*map(_notes, files, schemas)]
    for file, notes in zip(files, all_notes, strict=True):
        first = all_notes[0]
        if (notes and notes.latents) != (first and first.latents):
            raise InputError(
                f"{file.path}: its latents were made otherwise than those of {files[0].path}; put "
                "the shards of each build into a folder of its own"
            )
        if model.tags and notes and first and notes.embeddings != first.embeddings:
            raise InputError(
                f"{file.path}: its tag embeddings were made otherwise than those of "
                f"{files[0].path}; let tag-dataset finish with all shards"
            )
    return all_notes[0]


class _Shard(NamedTuple):
    """Row groups and schema of a shard, from its footer."""

    groups: list[Group]
    schema: pa.Schema


def _open(file: Location) -> _Shard:
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
    return _Shard([Group(file, number, size) for number, size in enumerate(sizes)], schema)


def _row(group: Group, row: int, *columns: str) -> dict[str, Any]:
    """Return these columns of a row, without those that the shard does not have."""
    return _columns(group, columns).slice(row, 1).to_pylist()[0]


@lru_cache(maxsize=GROUPS_KEPT)
def _columns(group: Group, columns: tuple[str, ...]) -> pa.Table:
    shard = open_shard(group.file, "hr")
    names = [name for name in columns if name in shard.schema_arrow.names]
    with explained(group.file):
        return shard.read_row_group(group.number, columns=names)


def _names(columns: dict[str, Any]) -> Tags:
    return tuple(filter(None, columns.get("tags") or ()))


def _decoded(data: bytes | None) -> Tensor | None:
    """Return pixels (3, H, W) uint8, or None for bytes that cannot be decoded, or none at all."""
    if data is None:
        return None
    try:
        return as_bytes(read(data, name="a row").pixels)
    except LinearSRError:
        return None
