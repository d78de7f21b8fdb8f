"""Which LR, which result belongs to which HR: by name. Knows nothing of pixels."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import NamedTuple

from linearsr.evaluation.config import Item, Source
from linearsr.imaging.files import READ_SUFFIXES

# Pictures by id: a path below their folder, or a shard's own id.
Listing = Mapping[str, Source]
# 0001x4, img_LR, img_SRF_4_HR, baby_out: what data sets and programs append to a picture's name.
_SUFFIXES = re.compile(r"(?:[_-]?x\d|[_-](?:LR|HR|SR|GT|out)\d?)+$", re.IGNORECASE)


class Pairs(NamedTuple):
    """Items, and the names that found no partner with the reason."""

    items: list[Item]
    alone: dict[str, str]


def pair(hr: Listing, lr: Listing, results: Mapping[str, Listing]) -> Pairs:
    """Items in the order of the first listing that is not empty: `hr`, `lr`, the results.

    Two names are a pair when they are equal up to the file suffix, or else up to scale and LR, HR,
    SR, GT, out behind it. A picture whose partner is missing in a listing that is not empty is left
    out; one missing among results costs that result only.
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
        found = {name: other.of(id) for name, other in partners.items()}
        alone |= {f"{id} ({n})": partners[n].why(id, "result") for n, s in found.items() if not s}
        known = {name: source for name, source in found.items() if source}
        items.append(Item(id=id, hr=source if hr else None, lr=low, results=known))
    alone |= {f"{id} (LR)": "no HR picture fits" for id in lows.left()} if hr else {}
    return Pairs(items, alone)


class _Partners:
    """A listing to look names up in, exactly at first."""

    def __init__(self, listing: Listing) -> None:
        self.sources = listing
        self.exact, self.loose = _by(listing, _stem), _by(listing, _bare)
        self.used: set[str] = set()

    def of(self, id: str) -> Source | None:
        """The one that fits; None when there is none, or more than one."""
        found = self._fitting(id)
        self.used.update(found)
        return self.sources[found[0]] if len(found) == 1 else None

    def _fitting(self, id: str) -> list[str]:
        if id in self.sources:
            return [id]
        return self.exact.get(_stem(id)) or self.loose.get(_bare(id)) or []

    def why(self, id: str, kind: str) -> str:
        """Why `of` found nothing."""
        found = self._fitting(id)
        return f"{', '.join(found)} all fit; keep one" if found else f"no {kind} picture fits"

    def left(self) -> Iterator[str]:
        """Names that nothing was looked up for."""
        return (id for id in self.sources if id not in self.used)


def _stem(id: str) -> str:
    """Without a picture's suffix; what else has a dot, as `cat.jpg#0` of shards, stays."""
    path = PurePosixPath(id)
    return str(path.with_suffix("")) if path.suffix.lower() in READ_SUFFIXES else id


def _bare(id: str) -> str:
    return _SUFFIXES.sub("", _stem(id))


def _by(listing: Listing, key: Callable[[str], str]) -> dict[str, list[str]]:
    found = defaultdict(list)
    for id in listing:
        found[key(id)].append(id)
    return dict(found)
