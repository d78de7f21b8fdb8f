"""Tiles cover the picture, have equal shapes, and are blended without seams."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linearsr.errors import OptionError
from linearsr.imaging.tiles import Canvas, Tile, tile_grid


def blend(tiles: list[Tile], pieces: list[torch.Tensor]) -> torch.Tensor:
    canvas = Canvas(tiles, pieces[0].shape[0])
    for tile, piece in zip(tiles, pieces, strict=True):
        canvas.add(tile, piece)
    return canvas.result()


@st.composite
def grids(draw: st.DrawFn) -> tuple[int, int, int, int]:
    height, width = draw(st.integers(1, 36)), draw(st.integers(1, 36))
    tile = draw(st.integers(1, 24))
    return height, width, tile, draw(st.integers(0, tile - 1))


@settings(deadline=None, max_examples=100, derandomize=True)
@given(grids())
def test_any_picture_cut_and_blended_comes_back(grid: tuple[int, int, int, int]) -> None:
    height, width, tile, overlap = grid
    tiles = tile_grid(height, width, tile, overlap)
    covered = torch.zeros(height, width)
    for part in tiles:
        assert (part.height, part.width) == (tiles[0].height, tiles[0].width)
        assert max(part.height, part.width) <= tile
        assert part.crop(covered).shape == (part.height, part.width)
        part.crop(covered).add_(1)
    assert covered.min() >= 1
    picture = torch.rand(2, height, width, generator=torch.Generator().manual_seed(height))
    torch.testing.assert_close(
        blend(tiles, [part.crop(picture) for part in tiles]), picture, rtol=0, atol=1e-6
    )


@settings(deadline=None, max_examples=80, derandomize=True)
@given(grids())
def test_neighbours_share_at_least_the_overlap_with_the_fewest_tiles(
    grid: tuple[int, int, int, int],
) -> None:
    height, width, tile, overlap = grid
    tiles = tile_grid(height, width, tile, overlap)
    tops = sorted({part.top for part in tiles})
    shared = [above + tiles[0].height - below for above, below in pairwise(tops)]
    assert all(rows >= overlap for rows in shared)
    # One tile fewer, at the largest step allowed, would not reach the end.
    assert len(tops) == 1 or tile + (len(tops) - 2) * (tile - overlap) < height
    # Tiles that are one pixel shorter would not reach it either.
    assert len(tops) * (tiles[0].height - 1) - (len(tops) - 1) * overlap < height


def test_a_picture_smaller_than_the_tile_is_one_tile() -> None:
    assert tile_grid(30, 40, 64, 8) == [Tile(0, 0, 30, 40)]


def test_an_exact_fit_needs_no_extra_tile() -> None:
    assert tile_grid(100, 56, 56, 12) == [Tile(0, 0, 56, 56), Tile(44, 0, 56, 56)]


def test_a_constant_stays_constant() -> None:
    tiles = tile_grid(97, 143, 32, 9)
    joined = blend(tiles, [torch.full((3, part.height, part.width), 0.7) for part in tiles])
    torch.testing.assert_close(joined, torch.full((3, 97, 143), 0.7), rtol=0, atol=1e-6)


def test_disagreeing_tiles_fade_into_each_other_without_a_step() -> None:
    tiles = tile_grid(16, 48, 32, 16)
    joined = blend(tiles, [torch.zeros(1, 16, 32), torch.ones(1, 16, 32)])
    row = joined[0, 5]
    assert torch.equal(row[:16], torch.zeros(16))
    assert torch.equal(row[32:], torch.ones(16))
    steps = row.diff()
    assert (steps >= 0).all()
    # The steepest part of a raised cosine over 16 pixels.
    assert steps.max() < 0.1


def test_the_outer_edges_of_the_picture_are_not_faded() -> None:
    tiles = tile_grid(40, 40, 24, 8)
    canvas = Canvas(tiles, 1)
    canvas.add(tiles[0], torch.ones(1, 24, 24))
    assert canvas._picture[0, 0, 0] == 1
    assert canvas._picture[0, 0, 23] < 0.02


def test_pieces_may_come_in_any_order_and_scaled() -> None:
    tiles = tile_grid(30, 45, 16, 5)
    large = torch.rand(3, 120, 180, generator=torch.Generator().manual_seed(1))
    canvas = Canvas([part.scaled(4) for part in tiles], 3)
    for part in reversed(tiles):
        canvas.add(part.scaled(4), part.scaled(4).crop(large).to(torch.float64))
    assert canvas.result().dtype == torch.float32
    torch.testing.assert_close(canvas.result(), large, rtol=0, atol=1e-6)


def test_half_precision_pieces_land_on_a_float_canvas() -> None:
    tiles = tile_grid(20, 20, 12, 4)
    canvas = Canvas(tiles, 1)
    for part in tiles:
        canvas.add(part, torch.full((1, 12, 12), 0.5, dtype=torch.bfloat16))
    torch.testing.assert_close(canvas.result(), torch.full((1, 20, 20), 0.5), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("height", "width", "tile", "overlap"),
    [(0, 5, 4, 1), (5, 0, 4, 1), (5, 5, 0, 0), (5, 5, 4, 4), (5, 5, 4, -1)],
)
def test_impossible_grids_are_refused(height: int, width: int, tile: int, overlap: int) -> None:
    with pytest.raises(OptionError):
        tile_grid(height, width, tile, overlap)


def test_missing_doubled_and_misshapen_pieces_are_refused() -> None:
    tiles = tile_grid(20, 20, 12, 4)
    piece = torch.zeros(1, 12, 12)
    canvas = Canvas(tiles, 1)
    with pytest.raises(OptionError, match="shape"):
        canvas.add(tiles[0], torch.zeros(1, 12, 11))
    canvas.add(tiles[0], piece)
    with pytest.raises(OptionError, match="before"):
        canvas.add(tiles[0], piece)
    with pytest.raises(OptionError, match="3 tiles"):
        canvas.result()
    with pytest.raises(OptionError, match="grid"):
        Canvas(tiles[:3], 1)
