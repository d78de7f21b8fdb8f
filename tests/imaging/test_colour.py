"""Colour fixes against a step-by-step version of the published method."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from linearsr.errors import OptionError
from linearsr.imaging import colour
from linearsr.imaging.colour import COLOUR_FIXES, fix_colour


def random_picture(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def reference_decomposition(picture: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return high and low frequencies, level by level with the 3x3 kernel, as the paper's code."""
    line = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = torch.outer(line, line).expand(3, 1, 3, 3)
    high = torch.zeros_like(picture)
    for level in range(5):
        radius = 2**level
        padded = F.pad(picture, [radius] * 4, mode="replicate")
        low = F.conv2d(padded, kernel, groups=3, dilation=radius)
        high += picture - low
        picture = low
    return high, picture


@pytest.mark.parametrize("size", [(64, 48), (7, 90), (3, 5), (1, 1)])
def test_wavelet_joins_detail_of_the_restored_with_colour_of_the_source(
    size: tuple[int, int],
) -> None:
    restored, source = random_picture(0, 2, 3, *size), random_picture(1, 2, 3, *size)
    expected = reference_decomposition(restored)[0] + reference_decomposition(source)[1]
    torch.testing.assert_close(fix_colour(restored, source, "wavelet"), expected, rtol=0, atol=2e-6)


def test_wavelet_removes_a_colour_cast_and_keeps_the_detail() -> None:
    source = random_picture(2, 1, 3, 80, 80)
    cast = torch.tensor([0.2, -0.1, 0.05]).reshape(1, 3, 1, 1)
    torch.testing.assert_close(
        fix_colour(source + cast, source, "wavelet"), source, rtol=0, atol=1e-6
    )


def test_adain_matches_mean_and_spread_of_every_channel() -> None:
    restored = random_picture(3, 2, 3, 40, 30) * 0.3 + 0.5
    source = random_picture(4, 2, 3, 40, 30)
    fixed = fix_colour(restored, source, "adain")
    axes = (-2, -1)
    torch.testing.assert_close(fixed.mean(axes), source.mean(axes), rtol=0, atol=1e-5)
    torch.testing.assert_close(fixed.std(axes), source.std(axes), rtol=1e-3, atol=0)


def test_adain_of_flat_and_single_pixel_pictures_is_finite() -> None:
    for size in ((1, 1), (8, 8)):
        flat = torch.full((1, 3, *size), 0.2)
        fixed = fix_colour(flat.clone(), flat + 0.3, "adain")
        torch.testing.assert_close(fixed, flat + 0.3)


@pytest.mark.parametrize("method", COLOUR_FIXES)
def test_a_picture_fixed_by_itself_is_unchanged(method: str) -> None:
    picture = random_picture(5, 1, 3, 33, 21)
    torch.testing.assert_close(fix_colour(picture, picture, method), picture, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", COLOUR_FIXES)
def test_the_source_is_not_changed(method: str) -> None:
    restored, source = random_picture(6, 1, 3, 20, 20), random_picture(7, 1, 3, 20, 20)
    before = source.clone()
    fix_colour(restored, source, method)
    assert torch.equal(source, before)


@pytest.mark.parametrize("height", [255, 257, 512, 530, 900])
def test_wavelet_of_a_tall_picture_has_the_bits_of_the_whole_at_once(height: int) -> None:
    restored, source = random_picture(8, 1, 3, height, 37), random_picture(9, 1, 3, height, 37)
    expected = restored + colour._low_pass(source - restored)
    assert torch.equal(fix_colour(restored, source, "wavelet"), expected)


def test_unknown_method_and_different_sizes_are_refused() -> None:
    picture = torch.zeros(1, 3, 8, 8)
    with pytest.raises(OptionError, match="wavelet, adain, none"):
        fix_colour(picture, picture, "magic")
    with pytest.raises(OptionError, match="resize"):
        fix_colour(picture, torch.zeros(1, 3, 4, 4), "wavelet")
