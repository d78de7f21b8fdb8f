"""Latents and tag embeddings in shards: their columns, and the notes about how they were made.

A note is JSON in a shard's schema. The column `pair_0` has the first variant of each row, `pair_1`
the second, and so on: columns, so that a reader fetches no variant that it does not use.
"""

from __future__ import annotations

import json
import os
from functools import cache
from typing import Any, Final

import pyarrow as pa
from pydantic import ValidationError

from linearsr.config import Config, explain
from linearsr.errors import InputError
from linearsr.storage.location import locate
from linearsr.training.latents import LatentsConfig, Precision

LATENTS: Final = b"linearsr.latents"
EMBEDDINGS: Final = b"linearsr.tag_embeddings"
# `lr` is a PNG file. `latent` and `condition` are the values of a (C, h, w) array in row-major
# order, in the precision that the shard's note (LatentsConfig) names. HR of a pair is not stored:
# it is make_hr(hr, data, np.random.default_rng(seed)), where `hr` is the whole HR of the row.
PAIR: Final = pa.struct(
    [
        ("seed", pa.int64()),
        ("scale", pa.float32()),
        ("lr", pa.binary()),
        ("latent", pa.binary()),
        ("condition", pa.binary()),
    ]
)
# The numbers of (T, tag_dim), row by row; empty for a row without tags.
EMBEDDED: Final = pa.field("tag_embeddings", pa.binary())
# The weights of a tag encoder, and its tokenizer.
_ENCODER: Final = (".safetensors", ".json", ".model")
# The precision that Gemma's weights come in.
EMBEDDED_PRECISION: Final[Precision] = "bfloat16"


class EmbeddingsNote(Config):
    """How the tag embeddings of a shard were made."""

    encoder: str
    """Fingerprint of the encoder (`encoder_fingerprint`)."""
    source: str
    """Folder, s3:// folder or hub id of the encoder, for messages."""
    dim: int
    """Number of channels of an embedding."""

    @classmethod
    def of(cls, latents: LatentsConfig) -> EmbeddingsNote | None:
        """Return the note that fits latents; None if their model takes no tags."""
        if latents.tags is None or latents.tag_dim is None:
            return None
        source = latents.tags.source
        return cls(encoder=encoder_fingerprint(source), source=source, dim=latents.tag_dim)


def encoder_fingerprint(source: str) -> str:
    """Return a text that differs for other tag embeddings: a hub id itself, or a folder's digest.

    A copy of a folder has the same one, also on S3. Raises InputError.
    """
    if os.path.isdir(source):
        return locate(source).fingerprint(_ENCODER)[:16]
    return _on_s3(source) if source.startswith("s3://") else source


@cache
def _on_s3(source: str) -> str:
    """Return the digest of a folder on S3, which a process asks for once: each shard needs it."""
    return locate(source).fingerprint(_ENCODER)[:16]


def pair_column(variant: int) -> str:
    """Return the name of a variant's column."""
    return f"pair_{variant}"


def with_latents(schema: pa.Schema, latents: LatentsConfig | None) -> pa.Schema:
    """Return a shard's schema with the columns of all variants and the note about them."""
    if latents is None:
        return schema
    for variant in range(latents.variants):
        schema = schema.append(pa.field(pair_column(variant), PAIR))
    return with_note(schema, LATENTS, latents)


def with_note(schema: pa.Schema, key: bytes, note: Config | None) -> pa.Schema:
    """Return the schema with this note under the key, or without one."""
    kept = {k: v for k, v in (schema.metadata or {}).items() if k != key}
    if note is not None:
        kept[key] = json.dumps(note.model_dump(mode="json")).encode()
    return schema.with_metadata(kept or None)


def latents_of(schema: pa.Schema, where: str) -> LatentsConfig | None:
    """Return the note about a shard's latents, if any. Raises InputError if it is damaged."""
    note = _note(schema, LATENTS, LatentsConfig, where)
    if note is None:
        return None
    for variant in range(note.variants):
        name = pair_column(variant)
        if name not in schema.names or schema.field(name).type != PAIR:
            raise InputError(
                f"{where}: its note {LATENTS.decode()} promises a column {name!r} of latents, "
                "which is missing or of another type; build the shard again"
            )
    return note


def embeddings_of(schema: pa.Schema, where: str) -> EmbeddingsNote | None:
    """Return the note about a shard's embeddings, if any. Raises InputError if it is damaged."""
    note = _note(schema, EMBEDDINGS, EmbeddingsNote, where)
    return note if EMBEDDED.name in schema.names else None


def _note(schema: pa.Schema, key: bytes, kind: Any, where: str) -> Any:
    text = (schema.metadata or {}).get(key)
    try:
        return None if text is None else kind.model_validate_json(text)
    except ValidationError as error:
        problem = ": ".join(filter(None, explain(error)))
        raise InputError(
            f"{where}: its note {key.decode()} is damaged ({problem}); build the shard again"
        ) from error
