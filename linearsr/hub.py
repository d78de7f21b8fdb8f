"""Models of a hub by their ids: which revision is loaded."""

from __future__ import annotations

import os


def split_revision(source: str) -> tuple[str, str | None]:
    """Return a folder or a hub id, and the revision after its "@"; None for the latest.

    Whoever owns a hub's model may change it; a revision, which is a commit, always is the same.
    """
    if os.path.isdir(source):
        return source, None
    id, _, revision = source.partition("@")
    return id, revision or None
