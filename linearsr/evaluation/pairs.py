"""Match HR, LR and results by their names. Knows nothing of pixels."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import NamedTuple

from linearsr.evaluation.config import Item, Source
from linearsr.imaging.files import READ_SUFFIXES, RESULT_SUFFIXES

# Pictures by id: the path relative to their folder, or the id in a shard.
Listing = Mapping[str, Source]
# Data sets and programs append these to a picture's name: 0001x4, img_LR, img_SRF_4_HR, baby_out.
_SUFFIXES = re.compile(r"(?:[_-]?x\d|[_-](?:LR|HR|SR|GT|out)\d?)+$", re.IGNORECASE)


class Pairs(NamedTuple):
    """Items, and the reason why a name has no partner, by name."""

    items: list[Item]
    alone: dict[str, str]


def pair(hr: Listing, lr: Listing, results: Mapping[str, Listing]) -> Pairs:
    """Pair pictures, in the order of the first listing that is not empty: `hr`, `lr`, the results.

    Two names match if they are equal without the file suffix, or else without a final scale, LR,
    HR, SR, GT or out. A picture without a partner in `hr` or `lr` is left out, unless that listing
    is empty. A picture without a partner in a listing of results is judged without that result.
    """
    first = next(listing for listing in (hr, lr, *results.values()) if listing)
    partners = {name: _Partners(listing) for name, listing in results.items()}
    lows = _Partners(lr)
    items, alone = [], {}
    for id, source in first.items():
        low = lows.of(id)
        if lr and low is None:
            alone[id] = lows.why(id, "low-resolution")
            continue
        matches = {name: other.of(id) for name, other in partners.items()}
        alone |= {f"{id} ({n})": partners[n].why(id, "result") for n, s in matches.items() if not s}
        known = {name: source for name, source in matches.items() if source}
        items.append(Item(id=id, hr=source if hr else None, lr=low, results=known))
    alone |= {f"{id} (LR)": "no HR picture matches" for id in lows.left()} if hr else {}
    return Pairs(items, alone)


class _Partners:
    """A listing in which names are looked up.

    A name matches exactly, or without its file suffix, or else without an ending such as x4 or _LR.
    """

    def __init__(self, listing: Listing) -> None:
        self.sources = listing
        self.exact, self.loose = _by(listing, _stem), _by(listing, _bare)
        self.used: set[str] = set()

    def of(self, id: str) -> Source | None:
        """Return the picture that matches, or None if none does, or several do."""
        matches = self._matches(id)
        self.used.update(matches)
        return self.sources[matches[0]] if len(matches) == 1 else None

    def _matches(self, id: str) -> list[str]:
        if id in self.sources:
            return [id]
        return self.exact.get(_stem(id)) or self.loose.get(_bare(id)) or []

    def why(self, id: str, kind: str) -> str:
        """Return the reason why `of` returned None."""
        names = ", ".join(self._matches(id))
        return f"{names} all match; keep one" if names else f"no {kind} picture matches"

    def left(self) -> Iterator[str]:
        """Yield the names that have not matched anything."""
        return (id for id in self.sources if id not in self.used)


def _stem(id: str) -> str:
    """The id without a picture's suffix; other dots stay, such as that of a shard's `cat.jpg#0`."""
    suffix = PurePosixPath(id).suffix
    is_picture = suffix.lower() in (*READ_SUFFIXES, *RESULT_SUFFIXES)
    return id[: -len(suffix)] if is_picture else id


def _bare(id: str) -> str:
    return _SUFFIXES.sub("", _stem(id))


def _by(listing: Listing, key: Callable[[str], str]) -> dict[str, list[str]]:
    ids = defaultdict(list)
    for id in listing:
        ids[key(id)].append(id)
    return dict(ids)
