"""The bundled weights on a photograph that they were not trained on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import skimage.data
import torch

from linearsr import Options, Upscaler
from linearsr.imaging.degradation import CLEAN, degrade
from linearsr.imaging.files import Picture
from linearsr.imaging.resample import resize


@pytest.fixture(scope="module")
def tiny() -> Upscaler:
    return Upscaler.load("linearsr-tiny", "cpu")


@pytest.fixture(scope="module")
def truth() -> torch.Tensor:
    """A picture of a face and a flag, (1, 3, 256, 256)."""
    photo = torch.from_numpy(np.asarray(skimage.data.astronaut())).permute(2, 0, 1)
    return photo[None, :, :256, 64:320].float() / 255


@pytest.fixture(scope="module")
def small(truth: torch.Tensor) -> Picture:
    pixels = degrade(truth[0], 4, CLEAN, np.random.default_rng(0))
    return Picture(pixels)


def _psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return -10 * math.log10((a - b)[..., 4:-4, 4:-4].square().mean().item())


def _sharpness(picture: torch.Tensor) -> float:
    return picture.diff(dim=-1).abs().mean().item()


def test_one_step_is_closer_to_the_truth_than_bicubic(
    tiny: Upscaler, truth: torch.Tensor, small: Picture
) -> None:
    bicubic = resize(small.pixels[None], 256, 256).clamp(0, 1)
    result = tiny.upscale(small, Options(steps=1)).pixels[None]
    assert _psnr(result, truth) > _psnr(bicubic, truth) + 1.0


def test_default_steps_reach_half_a_photographs_sharpness(
    tiny: Upscaler, truth: torch.Tensor, small: Picture
) -> None:
    bicubic = resize(small.pixels[None], 256, 256).clamp(0, 1)
    result = tiny.upscale(small).pixels[None]
    assert _psnr(result, truth) > _psnr(bicubic, truth)
    sharpness = [_sharpness(p) / _sharpness(truth) for p in (bicubic, result)]
    assert abs(1 - sharpness[1]) < 0.55 * abs(1 - sharpness[0])


def test_tiles_leave_no_seam(tiny: Upscaler, small: Picture) -> None:
    """At tile edges, neighbouring pixels differ no more than in the result without tiles."""
    whole, tiled = (tiny.upscale(small, Options(tile=tile)).pixels for tile in ("off", 32))
    assert (whole - tiled).abs().mean() < 1.5 / 255
    for axis in (1, 2):
        steps = [p.diff(dim=axis).abs().mean(dim=(0, 3 - axis)) for p in (tiled, whole)]
        assert (steps[0] - steps[1]).max() < 3 / 255


def test_flat_areas_stay_flat(tiny: Upscaler) -> None:
    """A smooth gradient, as in sky and skin, must not gain speckle at the default steps."""
    ramp = torch.linspace(0.5, 0.6, 48).expand(3, 48, 48)
    result = tiny.upscale(Picture(ramp)).pixels
    inner = result[:, 16:-16, 16:-16]
    assert (inner - resize(ramp[None], 192, 192)[0][:, 16:-16, 16:-16]).std() < 1.5 / 255
