"""Models that other libraries load: from a folder, from S3, or from a hub by their ids."""

from __future__ import annotations

import os

from linearsr.errors import require


def resolve(source: str) -> tuple[str, str | None]:
    """Return what a library's `from_pretrained` takes for a source, and the revision for it.

    An s3:// folder is copied to this machine once. Raises InputError if it is missing, and
    OutputError if the copy cannot be written.
    """
    if source.startswith("s3://"):
        require("data", "boto3", "pyarrow")
        from linearsr.storage.cache import local_copy

        return str(local_copy(source)), None
    return split_revision(source)


def split_revision(source: str) -> tuple[str, str | None]:
    """Return a folder or a hub id, and the revision after its "@"; None for the latest.

    Whoever owns a hub's model may change it; a revision, which is a commit, always is the same.
    """
    if os.path.isdir(source):
        return source, None
    id, _, revision = source.partition("@")
    return id, revision or None
