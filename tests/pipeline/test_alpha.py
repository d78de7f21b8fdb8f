"""Colours under transparent pixels do not reach the edges of what is visible."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from linearsr import Options, Upscaler
from linearsr.imaging.alpha import HIDDEN, spread_colours
from linearsr.imaging.files import Picture
from linearsr.imaging.resample import resize

OPTIONS = Options(steps=2, seed=1)


@pytest.fixture(scope="module")
def small(small_bundle: Path) -> Upscaler:
    return Upscaler.load(small_bundle, "cpu")


def disc(colour: tuple[float, float, float], hidden: float, *, soft: bool) -> Picture:
    """A disc of one colour whose transparent surroundings have another one."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    distance = ((x - 15.5) ** 2 + (y - 15.5) ** 2).sqrt()
    alpha = (10 - distance).clamp(0, 1)[None] if soft else (distance < 10).float()[None]
    pixels = torch.where(alpha > 0, torch.tensor(colour).view(3, 1, 1), torch.tensor(hidden))
    return Picture(pixels, (alpha * 255).round() / 255, 8, False, None, None, "png")


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(
    ("colour", "hidden"),
    [((1.0, 1.0, 1.0), 0.0), ((0.98, 0.78, 0.12), 0.0), ((0.0, 0.2, 0.4), 1.0)],
)
def test_hidden_colours_do_not_bleed(
    colour: tuple[float, float, float], hidden: float, soft: bool
) -> None:
    upscaler = Upscaler.load(device="cpu")
    picture = disc(colour, hidden, soft=soft)
    result = upscaler.upscale(picture, OPTIONS)
    assert picture.alpha is not None
    assert result.alpha is not None
    height, width = result.pixels.shape[1:]
    alpha = resize(picture.alpha[None], height, width)[0].clamp(0, 1)
    for background in (0.0, 1.0):
        truth = torch.tensor(colour).view(3, 1, 1) * alpha + background * (1 - alpha)
        shown = result.pixels * result.alpha + background * (1 - result.alpha)
        assert (shown - truth).abs().max() * 255 <= 3


def test_stages_apart_do_the_same(small: Upscaler) -> None:
    picture = disc((1.0, 0.5, 0.0), 0.0, soft=True)
    state = small.prepare(picture, OPTIONS)
    for segment in state.segments:
        state = state.after(small.denoise(state.denoise_state(), segment))
    apart, whole = small.finish(state), small.upscale(picture, OPTIONS)
    assert torch.equal(apart.pixels, whole.pixels)
    assert torch.equal(apart.alpha, whole.alpha)  # type: ignore[arg-type]


def test_pictures_that_hide_nothing_stay_as_they_are(small: Upscaler) -> None:
    pixels = torch.rand(3, 24, 20, generator=torch.Generator().manual_seed(0))
    plain = Picture(pixels, None, 8, False, None, None, "png")
    expected = small.upscale(plain, OPTIONS).pixels
    for value in (1.0, HIDDEN):
        veiled = replace(plain, alpha=torch.full((1, 24, 20), value))
        assert torch.equal(small.upscale(veiled, OPTIONS).pixels, expected)
        assert spread_colours(pixels, veiled.alpha) is pixels


def test_a_picture_of_nothing_is_upscaled(small: Upscaler) -> None:
    picture = replace(disc((1, 1, 1), 0.5, soft=False), alpha=torch.zeros(1, 32, 32))
    result = small.upscale(picture, OPTIONS)
    assert result.pixels.isfinite().all()
    assert result.alpha is not None
    assert result.alpha.max() == 0
