"""Choose pictures, and parts of them, that are worth training on.

Crops, sharpness, perceptual hashes and near-duplicates; knows nothing of files, shards or Ray.
Importing it raises MissingExtra without imagehash; otherwise each picture would be refused later.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from linearsr.errors import require

require("data", "imagehash")

# Side in pixels of the tiles in which sharpness is measured.
TILE: Final = 128
HASH_BITS: Final = 64
# Pictures whose hashes differ in more bits do not look alike, and the search would take hours.
MAX_DISTANCE: Final = 11

_SET_BITS: Final = np.array([bin(value).count("1") for value in range(1 << 16)], np.uint8)
_LUMA: Final = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
_LAPLACIAN: Final = torch.tensor([[[[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]]]])


class Box(NamedTuple):
    """A part of a picture, in pixels from the upper left corner."""

    left: int
    top: int
    width: int
    height: int

    def cut(self, pixels: Tensor) -> Tensor:
        """Return this part of a picture (C, H, W)."""
        return pixels[:, self.top : self.top + self.height, self.left : self.left + self.width]


def boxes(height: int, width: int, crop: int, multiple: int, rng: np.random.Generator) -> list[Box]:
    """Return boxes of `crop` x `crop` pixels in random order: the cells of a grid, so none overlap.

    The grid has a random offset, so that no part of pictures is favoured. `crop` 0 takes the whole
    picture, trimmed to a multiple of `multiple`. A picture that is too small has no boxes.
    """
    if not crop:
        whole = Box(0, 0, width - width % multiple, height - height % multiple)
        return [whole] if whole.width and whole.height else []
    left, top = (int(rng.integers(side % crop + 1)) for side in (width, height))
    cells = [(x, y) for y in range(height // crop) for x in range(width // crop)]
    order = rng.permutation(len(cells))
    return [Box(left + x * crop, top + y * crop, crop, crop) for x, y in (cells[i] for i in order)]


def sharpness(pixels: Tensor) -> float:
    """Return the sharpness of a picture (3, H, W) uint8, in squared 8-bit steps.

    This is the variance of its luma's Laplacian. It is computed for each tile, and the result is
    the value that one tile in ten reaches, so it means the same for any size, and a sharp subject
    before a soft background counts. It is measured at the picture's own resolution, since that is
    what a model would learn. Noise counts as sharpness. A picture with a side below 3 has 0.
    """
    height = pixels.shape[1]
    if min(pixels.shape[1:]) < 3:
        return 0.0
    tops = range(0, max(1, height - TILE - 1), TILE)
    # A row of tiles at a time, since a whole photograph is large in floats.
    rows = [_tile_variances(pixels[:, top : top + TILE + 2].float()) for top in tops]
    return max(0.0, float(np.quantile(torch.cat(rows).numpy(), 0.9)))


def _tile_variances(strip: Tensor) -> Tensor:
    """Return the Laplacian's variance in each tile of a strip (3, TILE + 2 or fewer, W)."""
    edges = F.conv2d((strip[None] * _LUMA).sum(1, keepdim=True), _LAPLACIAN)
    tile = [min(TILE, side) for side in edges.shape[2:]]
    return (F.avg_pool2d(edges**2, tile) - F.avg_pool2d(edges, tile) ** 2).flatten()


def perceptual_hash(pixels: Tensor) -> int:
    """Return 64 bits of (3, H, W) uint8 that change little with size and compression (pHash)."""
    import imagehash

    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    return int(str(imagehash.phash(image)), 16)


def near_duplicates(hashes: Sequence[int], distance: int) -> list[int | None]:
    """Return, for each hash, the index of the first kept hash near it, or None if it is kept.

    Hashes have 64 bits; near means within `distance` bits, from -1 (keeps all) to MAX_DISTANCE.
    Hashes are compared with kept ones only, so that a chain of small differences does not join
    pictures that are not alike. Raises ValueError for another distance.
    """
    if not -1 <= distance <= MAX_DISTANCE:
        raise ValueError(f"distance must be from -1 to {MAX_DISTANCE}, not {distance}")
    if distance < 0:
        return [None] * len(hashes)
    index = _Index(distance)
    return [index.find_or_keep(value, number) for number, value in enumerate(hashes)]


class _Index:
    """The kept hashes, in buckets by each of their bands of bits.

    There is one band more than bits may differ, so near hashes agree in at least one band.
    """

    def __init__(self, distance: int) -> None:
        self.distance = distance
        self.width = HASH_BITS // (distance + 1)
        self.numbers: dict[int, int] = {}
        # Packed: a million hashes would be as many objects, and a bucket is searched at once.
        self.buckets: defaultdict[tuple[int, int], array[int]] = defaultdict(lambda: array("Q"))

    def find_or_keep(self, value: int, number: int) -> int | None:
        """Return the index of the first hash near `value`, or keep `value` and return None."""
        if value in self.numbers:
            return self.numbers[value]
        keys = [
            (band, (value >> band * self.width) % (1 << self.width))
            for band in range(self.distance + 1)
        ]
        near = [other for key in keys if key in self.buckets for other in self._near(value, key)]
        if near:
            return min(self.numbers[other] for other in near)
        self.numbers[value] = number
        for key in keys:
            self.buckets[key].append(value)
        return None

    def _near(self, value: int, key: tuple[int, int]) -> list[int]:
        others = np.frombuffer(self.buckets[key], np.uint64)
        quarters = _SET_BITS[(others ^ np.uint64(value)).view(np.uint16)].reshape(-1, 4)
        return others[quarters.sum(1) <= self.distance].tolist()
