"""Progress while an expert works: a note that the expert writes and the router reads.

An expert that takes minutes for a large picture notes the tiles that it has done, at most once a
second. Losing a note loses nothing but a moment of progress.
"""

from __future__ import annotations

import contextlib
import time

from linearsr.distributed.compat import put_note, read_note

SECONDS = 1.0


class TileCounter:
    """Notes how many of a request's tiles an expert has done.

    key: None if nobody wants to know.
    """

    def __init__(self, key: str | None, expert: int, tiles: int) -> None:
        self.key = key
        self.expert = expert
        self.tiles = tiles
        self.begun = 0
        self.noted = time.perf_counter()

    def begin_tile(self) -> None:
        """Count a tile whose turn has come; those before it are done."""
        now = time.perf_counter()
        if self.key and now - self.noted >= SECONDS:
            self.noted = now
            # Whatever goes wrong with a note must not end the request.
            with contextlib.suppress(Exception):
                put_note(self.key, f"{self.expert} {self.begun / self.tiles}")
        self.begun += 1


def noted_share(key: str, expert: int) -> float:
    """Return the share of tiles that an expert has noted as done, 0 to 1."""
    with contextlib.suppress(Exception):
        if note := read_note(key):
            by, share = note.split()
            return float(share) if int(by) == expert else 0.0
    return 0.0
