"""How a request is cut into tiles, from sizes alone: no picture and no model are needed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from linearsr.config import ModelConfig, Options
from linearsr.imaging.tiles import Tile, tile_grid
from linearsr.pipeline.sizes import requested_scale, scaled_size

# Latent cells. Tiles bound memory; large ones spend few cells on the overlap, which is twice what
# the convolutions of eight blocks can see. Outputs of up to 1280 pixels need no tiles (tiny).
AUTO_TILE = 320
OVERLAP = 16
SMALLEST_TILE = 32


class Work(NamedTuple):
    """The work on one picture.

    size: height and width in pixels of the picture that the network makes, before any resampling.
    cells: latent cells of all tiles together, overlaps counted twice. tiled: whether the tiles are
    smaller than the picture may be.
    """

    size: tuple[int, int]
    cells: int
    tiled: bool


def plan_work(config: ModelConfig, height: int, width: int, options: Options) -> Work:
    """Return the work on a picture of this height and width, if memory does not run out."""
    size = scaled_size(height, width, network_scale(config, height, width, options))
    side = next(tile_sizes(config, height, width, options))
    tiles = latent_tiles(*latent_size(config, size), side)
    cells = len(tiles) * tiles[0].height * tiles[0].width
    return Work(size, cells, side is not None)


def network_scale(config: ModelConfig, height: int, width: int, options: Options) -> float:
    """Return how many times larger the network makes a picture of this size.

    This is the requested scale if the model was trained for it, else the nearest one that it was
    trained for, whose result is resampled.
    """
    return config.trained_scale(requested_scale(height, width, options))


def tile_sizes(
    config: ModelConfig, height: int, width: int, options: Options
) -> Iterator[int | None]:
    """Yield tile sides to try, in latent cells; None is the whole picture at once."""
    if options.tile == "off":
        yield None
    elif options.tile != "auto":
        scale = network_scale(config, height, width, options)
        yield max(SMALLEST_TILE // 4, round(options.tile * scale / config.latent.factor))
    else:
        size = AUTO_TILE
        while size >= SMALLEST_TILE:
            yield size
            size //= 2


def latent_size(config: ModelConfig, size: tuple[int, int]) -> tuple[int, int]:
    """Return rows and columns of the latent grid of a picture with this height and width."""
    # At least two cells: oneDNN's bfloat16 convolution with stride 2 is wrong if its result is one
    # wide.
    rows, columns = (max(2, math.ceil(n / config.latent.factor)) for n in size)
    return rows, columns


def latent_tiles(rows: int, columns: int, tile: int | None) -> list[Tile]:
    """Return the tiles of a latent grid. tile: their largest side in cells; None for one tile."""
    side, overlap = (tile, min(OVERLAP, tile // 4)) if tile else (max(rows, columns), 0)
    return tile_grid(rows, columns, side, overlap)
