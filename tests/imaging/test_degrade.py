"""Degradations are seeded, keep the picture's place and size, and do what their names say."""

import numpy as np
import pytest
import skimage.data
import torch

from linearsr.imaging.degrade import CLEAN, PRESETS, Degradation, Stage, degrade
from linearsr.imaging.resample import resize

PHOTO = torch.from_numpy(np.asarray(skimage.data.astronaut())).permute(2, 0, 1).float() / 255
HR = PHOTO[:, 100:228, 150:310]


@pytest.mark.parametrize("name", PRESETS)
def test_same_seed_same_pixels_in_range_and_size(name: str) -> None:
    runs = [degrade(HR, 4, PRESETS[name], np.random.default_rng(7)) for _ in range(2)]
    assert torch.equal(*runs)
    assert runs[0].shape == (3, 32, 40)
    assert torch.equal(runs[0], (runs[0] * 255).round() / 255)
    assert runs[0].min() >= 0 and runs[0].max() <= 1


@pytest.mark.parametrize("name", ["mild", "camera", "seesr", "real-esrgan"])
def test_the_picture_stays_recognisable_and_in_place(name: str) -> None:
    """Over many draws the mean of the degraded pictures approaches a blurred clean one."""
    rng = np.random.default_rng(0)
    mean = torch.stack([degrade(HR, 4, PRESETS[name], rng) for _ in range(24)]).mean(0)
    clean = degrade(HR, 4, CLEAN, rng)
    errors = {
        shift: (torch.roll(clean, shift, (1, 2)) - mean)[:, 4:-4, 4:-4].square().mean().item()
        for shift in [(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0)]
    }
    assert min(errors, key=errors.__getitem__) == (0, 0)
    assert errors[(0, 0)] < 0.01


def test_clean_is_bicubic_in_eight_bits() -> None:
    expected = (resize(HR[None], 32, 40)[0].clamp(0, 1) * 255).round() / 255
    assert torch.equal(degrade(HR, 4, CLEAN, np.random.default_rng(0)), expected)


@pytest.mark.parametrize("gaussian", [0.0, 1.0])
def test_noise_has_the_strength_asked_for(gaussian: float) -> None:
    grey = torch.full((3, 256, 256), 0.5)
    stage = Stage(
        blur_probability=0,
        resize_up_down_keep=(0, 0, 1),
        gaussian_probability=gaussian,
        gaussian_sigma=(10, 10),
        poisson_scale=(1, 1),
        gray_noise_probability=0,
        jpeg_probability=0,
    )
    noisy = degrade(grey, 1, Degradation(stages=(stage,)), np.random.default_rng(0))
    expected = 10 / 255 if gaussian else (0.5 / 255) ** 0.5
    assert noisy.std().item() == pytest.approx(expected, rel=0.05)


def test_sides_must_be_multiples_of_the_scale() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        degrade(HR[:, :126], 4, CLEAN, np.random.default_rng(0))
