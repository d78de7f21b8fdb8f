"""Crops, sharpness and hashes of pictures; near-duplicates are those of a plain search."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from linearsr.distributed.datasets.shards.filters import (
    MAX_DISTANCE,
    Box,
    boxes,
    near_duplicates,
    perceptual_hash,
    sharpness,
)


def _photo(name: str) -> Image.Image:
    return Image.fromarray(np.asarray(getattr(skimage.data, name)()))


def _tensor(image: Image.Image) -> Tensor:
    """Return the picture as (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _sharpness(image: Image.Image) -> float:
    return sharpness(_tensor(image))


# Crops


def _cells(height: int, width: int, crop: int, seed: int = 0) -> list[Box]:
    return boxes(height, width, crop, 4, np.random.default_rng(seed))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 200), (205, 131), (63, 400)])
def test_crops_lie_inside_do_not_overlap_and_are_as_many_as_fit(height: int, width: int) -> None:
    covered = np.zeros((height, width), int)
    cells = _cells(height, width, 64)
    for box in cells:
        assert (box.width, box.height) == (64, 64)
        assert box.left >= 0 and box.top >= 0
        covered[box.top : box.top + 64, box.left : box.left + 64] += 1
    assert covered.sum() == len(cells) * 64 * 64 and covered.max(initial=0) <= 1
    assert len(cells) == (height // 64) * (width // 64)


def test_the_seed_decides_where_crops_lie_and_their_order() -> None:
    assert _cells(300, 500, 64, 1) == _cells(300, 500, 64, 1)
    several = [_cells(300, 500, 64, seed) for seed in range(5)]
    assert len({(cells[0].left, cells[0].top) for cells in several}) > 1
    assert all(cells != sorted(cells) for cells in several)


def test_a_whole_picture_is_trimmed_to_the_scale() -> None:
    assert _cells(63, 401, 0) == [Box(0, 0, 400, 60)]
    assert _cells(3, 400, 0) == []


def test_a_box_cuts_the_pixels_that_it_names() -> None:
    rows = torch.arange(6.0).view(1, 6, 1).expand(1, 6, 8)
    part = Box(left=2, top=1, width=5, height=3).cut(rows)
    assert part.shape == (1, 3, 5) and part[0, :, 0].tolist() == [1, 2, 3]


# Sharpness


def test_sharpness_is_the_variance_of_the_laplacian() -> None:
    """The Laplacian of a checkerboard of 0 and 255 is +-4 * 255; that of a slope is 0."""
    for side in (3, 40, 300):
        board = (torch.arange(side).view(-1, 1) + torch.arange(side)) % 2 * 255
        expected = (4 * 255) ** 2 if side > 3 else 0
        assert sharpness(board.byte().expand(3, side, side)) == pytest.approx(expected, rel=1e-4)
    slope = torch.arange(200).byte().expand(3, 40, 200)
    assert sharpness(slope) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("name", ["astronaut", "coffee", "rocket", "chelsea"])
def test_sharpness_tells_blurred_from_sharp_photographs(name: str) -> None:
    photo = _photo(name)
    assert _sharpness(photo) > 40
    assert _sharpness(photo.filter(ImageFilter.GaussianBlur(4))) < 20


def test_sharpness_of_a_sharp_subject_before_a_soft_background_is_high() -> None:
    photo = _photo("astronaut")
    soft = photo.filter(ImageFilter.GaussianBlur(6))
    blurred = _sharpness(soft)
    soft.paste(photo.crop((128, 0, 384, 128)), (128, 0))
    assert blurred < 20 < 100 < _sharpness(soft)


def test_sharpness_of_a_tiny_or_flat_picture_is_zero() -> None:
    assert sharpness(torch.randint(256, (3, 2, 50)).byte()) == 0
    assert sharpness(torch.full((3, 3, 3), 128).byte()) == pytest.approx(0, abs=1e-3)


def test_sharpness_counts_every_row_of_tiles() -> None:
    """Only one tile has noise; the picture holds two whole rows of tiles."""
    for top in (0, 128):
        picture = torch.full((3, 128 * 2 + 2, 130), 90).byte()
        picture[:, top + 10 : top + 120, 10:120] = torch.randint(256, (3, 110, 110)).byte()
        assert sharpness(picture) > 1000


# Hashes


def _distance(one: Image.Image, other: Image.Image) -> int:
    return (perceptual_hash(_tensor(one)) ^ perceptual_hash(_tensor(other))).bit_count()


def _as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


@pytest.mark.parametrize("name", ["astronaut", "coffee", "rocket", "chelsea"])
def test_hashes_survive_compression_and_size(name: str) -> None:
    photo = _photo(name)
    assert _distance(photo, _as_jpeg(photo, 60)) <= 4
    assert _distance(photo, photo.resize((photo.width * 9 // 10, photo.height * 9 // 10))) <= 4


def test_different_photographs_have_hashes_far_apart() -> None:
    photos = [_photo(name) for name in ("astronaut", "coffee", "rocket", "chelsea")]
    pairs = [(a, b) for i, a in enumerate(photos) for b in photos[:i]]
    assert min(_distance(a, b) for a, b in pairs) > 2 * MAX_DISTANCE
    assert 0 <= perceptual_hash(_tensor(photos[0])) < 2**64


# Near-duplicates


def _searched(hashes: list[int], distance: int) -> list[int | None]:
    """Find near-duplicates by comparing each hash with all that are kept."""
    kept: list[int] = []
    neighbours: list[int | None] = []
    for number, value in enumerate(hashes):
        near = [k for k in kept if (hashes[k] ^ value).bit_count() <= distance]
        neighbours.append(near[0] if near else None)
        kept += [] if near else [number]
    return neighbours


def _crowd(count: int, most_flips: int) -> list[int]:
    """Return hashes of 64 bits around a few centres, so that many distances are near the limit."""
    rng = random.Random(3)
    centres = [0, 2**64 - 1, *(rng.getrandbits(64) for _ in range(10))]
    hashes = []
    for _ in range(count):
        flips = rng.sample(range(64), rng.randint(0, most_flips))
        hashes.append(rng.choice(centres) ^ sum(1 << bit for bit in flips))
    return hashes


@pytest.mark.parametrize("distance", [0, 1, 2, 4, 7, MAX_DISTANCE])
def test_near_duplicates_are_those_of_a_plain_search(distance: int) -> None:
    hashes = _crowd(800, distance + 2)
    duplicates = near_duplicates(hashes, distance)
    assert duplicates == _searched(hashes, distance)
    assert 20 < duplicates.count(None) < 790


def test_a_chain_of_small_steps_does_not_make_strangers_duplicates() -> None:
    assert near_duplicates([0b0, 0b11, 0b1111, 0b111111], 2) == [None, 0, None, 2]


def test_near_duplicates_name_the_first_picture_that_is_kept() -> None:
    assert near_duplicates([0, 0b1111, 0b0011, 0], 2) == [None, None, 0, 0]


def test_near_duplicates_are_none_if_the_search_is_off() -> None:
    assert near_duplicates([5, 5, 5], -1) == [None, None, None]
    assert near_duplicates([], 4) == []


@pytest.mark.parametrize("distance", [-2, MAX_DISTANCE + 1])
def test_distances_that_cannot_be_searched_are_refused(distance: int) -> None:
    with pytest.raises(ValueError, match="distance"):
        near_duplicates([1], distance)
