"""Models that other libraries load: from a folder, from S3, or from a hub by their ids."""

from __future__ import annotations

import os

from linearsr.errors import InputError, OutputError, WeightsError, require


def on_this_machine(source: str, suffix: str = "") -> str:
    """Return this machine's copy of an s3:// folder, and any other source as it is.

    suffix: the end of the names of the files that are needed.
    See `linearsr.storage.cache.local_copy`. Raises MissingExtra, and WeightsError if the folder is
    missing, cannot be read, or cannot be copied.
    """
    if not source.startswith("s3://"):
        return source
    require("data", "boto3", "pyarrow")
    from linearsr.storage.cache import local_copy

    try:
        return str(local_copy(source, suffix))
    except (InputError, OutputError) as error:
        raise WeightsError(str(error)) from error


def resolve(source: str) -> tuple[str, str | None]:
    """Return what a library's `from_pretrained` takes for a source, and the revision for it.

    Raises what `on_this_machine` raises.
    """
    return split_revision(on_this_machine(source))


def split_revision(source: str) -> tuple[str, str | None]:
    """Return a folder or a hub id, and the revision after its "@"; None for the latest.

    Whoever owns a hub's model may change it; a revision, which is a commit, always is the same.
    """
    if os.path.isdir(source):
        return source, None
    id, _, revision = source.partition("@")
    return id, revision or None
