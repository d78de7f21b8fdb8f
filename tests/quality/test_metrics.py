"""The conventions of the tables: studio-swing Y, border cropped, eight bits."""

import math

import pytest
import torch

from linearsr.quality.metrics import conventions, measure


def _psnr_y(a: torch.Tensor, b: torch.Tensor, crop: int) -> float:
    weights = torch.tensor([65.481, 128.553, 24.966]).view(1, 3, 1, 1)
    y = [((x * weights).sum(1) + 16)[:, crop:-crop, crop:-crop] for x in (a, b)]
    return -10 * math.log10(((y[0] - y[1]) / 255).square().mean().item())


def test_psnr_is_on_y_in_eight_bits_without_the_border() -> None:
    truth = torch.rand(1, 3, 40, 48)
    picture = (truth + 0.05 * torch.randn_like(truth)).clamp(0, 1)
    picture[..., :4, :] = 0  # the border must not count
    rounded = (picture * 255).round() / 255
    assert measure("psnr", picture, truth, 4) == pytest.approx(_psnr_y(rounded, truth, 4), abs=0.01)


def test_ssim_of_equal_pictures_is_one() -> None:
    truth = (torch.rand(1, 3, 40, 48) * 255).round() / 255
    assert measure("ssim", truth, truth, 4) == pytest.approx(1.0, abs=1e-4)


def test_conventions_name_the_version() -> None:
    assert "pyiqa" in conventions()
