"""Cut a picture into equal overlapping tiles and join the results without visible seams.

This is geometry alone, without a model or its scale. Units are the caller's, such as picture pixels
or latent cells; `Tile.scaled` moves a tile from the small picture to the large one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from linearsr.errors import OptionError


@dataclass(frozen=True, order=True)
class Tile:
    """A rectangle: rows `top` to `top + height`, columns `left` to `left + width`."""

    top: int
    left: int
    height: int
    width: int

    @property
    def bottom(self) -> int:
        """The first row below the tile."""
        return self.top + self.height

    @property
    def right(self) -> int:
        """The first column to the right of the tile."""
        return self.left + self.width

    def scaled(self, factor: int) -> Tile:
        """Return the same rectangle in a picture `factor` times as large."""
        return Tile(
            self.top * factor, self.left * factor, self.height * factor, self.width * factor
        )

    def crop(self, picture: torch.Tensor) -> torch.Tensor:
        """Return a view of this rectangle of a (..., H, W) tensor."""
        return picture[..., self.top : self.bottom, self.left : self.right]


def tile_grid(height: int, width: int, tile: int, overlap: int) -> list[Tile]:
    """Return the fewest tiles that cover a `height` x `width` picture exactly, row by row.

    All have one shape, so that they fit one batch and one compiled model. Their sides are at most
    `tile`, and no longer than necessary, so that little is computed twice. Neighbours share at
    least `overlap`.

    Raises OptionError unless height, width and tile are positive and 0 <= overlap < tile.
    """
    if height < 1 or width < 1:
        raise OptionError(f"A {width}x{height} picture has nothing to tile; give a larger one.")
    if tile < 1:
        raise OptionError(f"Tile size {tile} is not positive; give 1 or more.")
    if not 0 <= overlap < tile:
        raise OptionError(f"Overlap {overlap} does not fit tile size {tile}; give 0 to {tile - 1}.")
    tops, rows = _spread(height, tile, overlap)
    lefts, columns = _spread(width, tile, overlap)
    return [Tile(top, left, rows, columns) for top in tops for left in lefts]


def _spread(length: int, tile: int, overlap: int) -> tuple[list[int], int]:
    """Return the starts of the fewest tiles along one axis, and the smallest size for them."""
    if length <= tile:
        return [0], length
    count = math.ceil((length - overlap) / (tile - overlap))
    size = math.ceil((length + (count - 1) * overlap) / count)
    return [i * (length - size) // (count - 1) for i in range(count)], size


class Canvas:
    """A picture that processed tiles are added to; they fade into each other where they overlap.

    The weights of a grid are separable and are divided by their sum in advance, one axis at a
    time, so there is no weight picture and no division at the end.
    """

    def __init__(
        self,
        tiles: Iterable[Tile],
        channels: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Start an empty canvas for all tiles of a grid as `tile_grid` makes them.

        If the results are larger than the tiles that were cut, pass scaled tiles (`Tile.scaled`).
        Raises OptionError if the tiles are not a full grid.
        """
        self._missing = set(tiles)
        rows = sorted({(tile.top, tile.height) for tile in self._missing})
        columns = sorted({(tile.left, tile.width) for tile in self._missing})
        if not rows or len(rows) * len(columns) != len(self._missing):
            raise OptionError("The tiles are not a full grid; make them with tile_grid().")
        self._row_weights = _weights(rows)
        self._column_weights = _weights(columns)
        height, width = sum(rows[-1]), sum(columns[-1])
        self._picture = torch.zeros(channels, height, width, dtype=dtype, device=device)

    def add(self, tile: Tile, piece: torch.Tensor) -> None:
        """Add the result (C, tile.height, tile.width) of one tile, in any order.

        Raises OptionError for a piece of another shape, a tile that is not of the grid, or one that
        was added before.
        """
        expected = (self._picture.shape[0], tile.height, tile.width)
        if tuple(piece.shape) != expected:
            raise OptionError(f"A piece of shape {tuple(piece.shape)} does not fit {tile}.")
        if tile not in self._missing:
            raise OptionError(f"{tile} is not of this grid, or was added before.")
        self._missing.remove(tile)
        rows = self._row_weights[tile.top].to(self._picture)
        columns = self._column_weights[tile.left].to(self._picture)
        weighted = piece.to(self._picture) * rows[:, None]
        tile.crop(self._picture).addcmul_(weighted, columns)

    def result(self) -> torch.Tensor:
        """Return the (C, H, W) picture. Raises OptionError while tiles are missing."""
        if self._missing:
            raise OptionError(
                f"{len(self._missing)} tiles were not added, {min(self._missing)} for example."
            )
        return self._picture


def _weights(spans: Sequence[tuple[int, int]]) -> dict[int, torch.Tensor]:
    """Return each tile's weights (length,) along one axis by its start; they add up to one.

    spans: the (start, length) of the tiles along the axis, in order.
    """
    ends = [start + length for start, length in spans]
    total = torch.zeros(ends[-1], dtype=torch.float64)
    weights = {}
    for i, (start, length) in enumerate(spans):
        weight = torch.ones(length, dtype=torch.float64)
        if i > 0:
            ramp = _ramp(ends[i - 1] - start)
            weight[: len(ramp)] *= ramp
        if i + 1 < len(spans):
            ramp = _ramp(ends[i] - spans[i + 1][0])
            weight[length - len(ramp) :] *= ramp.flip(0)
        weights[start] = weight
        total[start : ends[i]] += weight
    return {start: w / total[start : start + len(w)] for start, w in weights.items()}


def _ramp(length: int) -> torch.Tensor:
    """Return a raised cosine from above 0 to below 1; it and its mirror image add up to 1."""
    position = (torch.arange(length, dtype=torch.float64) + 0.5) / length
    return torch.sin(position * (math.pi / 2)) ** 2
