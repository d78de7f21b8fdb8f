"""The conventions of the tables: studio-swing Y, border cropped, eight bits."""

import math
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import skimage.metrics
import torch

from linearsr.errors import LinearSRError, MissingExtra, OptionError
from linearsr.metrics import lpips
from linearsr.metrics import measure as metrics
from linearsr.metrics.measure import conventions, measure


def _y(picture: torch.Tensor, crop: int) -> np.ndarray:
    """Return the BT.601 luma, 16 to 235, of (1, 3, H, W) in [0, 1] without the border; float64."""
    red, green, blue = picture[0].double().numpy()
    y = 65.481 * red + 128.553 * green + 24.966 * blue + 16
    return y[crop:-crop, crop:-crop]


def _noisy() -> tuple[torch.Tensor, torch.Tensor]:
    truth = (torch.rand(1, 3, 40, 48) * 255).round() / 255
    picture = (truth + 0.05 * torch.randn_like(truth)).clamp(0, 1)
    picture[..., :4, :] = 0  # in the border, which must not count
    return picture, truth


def test_psnr_is_on_y_in_eight_bits_without_the_border() -> None:
    picture, truth = _noisy()
    rounded = (picture * 255).round() / 255
    error = np.square(_y(rounded, 4) - _y(truth, 4)).mean() / 255**2
    assert measure("psnr", picture, truth, 4) == pytest.approx(-10 * math.log10(error), abs=1e-3)


def test_ssim_is_that_of_wang_2004_on_y() -> None:
    picture, truth = _noisy()
    rounded = (picture * 255).round() / 255
    _, full = skimage.metrics.structural_similarity(
        _y(rounded, 4).round(),  # as MATLAB's rgb2ycbcr does with 8 bits
        _y(truth, 4).round(),
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    expected = full[5:-5, 5:-5].mean()  # where the window of 11 lies inside
    assert measure("ssim", picture, truth, 4) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["psnr", "ssim"])
def test_psnr_and_ssim_are_those_of_pyiqa(name: str) -> None:
    import pyiqa

    picture, truth = _noisy()
    picture = (picture * 255).round() / 255
    settings = {"test_y_channel": True, "color_space": "ycbcr", "crop_border": 4}
    expected = float(pyiqa.create_metric(name, device="cpu", **settings)(picture, truth))
    assert measure(name, picture, truth, 4) == pytest.approx(expected, rel=1e-4)


def test_psnr_of_equal_pictures_is_80_decibels() -> None:
    _, truth = _noisy()
    assert measure("psnr", truth, truth, 4) == 80


def test_psnr_ssim_and_lpips_are_measured_without_pyiqa(
    lpips_trunk: Path, fresh_metrics: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyiqa", None)  # as if it were not installed
    monkeypatch.setenv(lpips.TRUNK_VARIABLE, str(lpips_trunk))
    metrics._configs.cache_clear()
    names = metrics.default_names()
    assert names == ("lpips", "psnr", "ssim")
    metrics.check_names(names)
    picture, truth = _noisy()
    assert all(math.isfinite(measure(name, picture, truth, 4)) for name in names)
    assert [metrics.higher_is_better(name) for name in names] == [False, True, True]
    assert "pyiqa" not in conventions()
    with pytest.raises(MissingExtra, match=r"pyiqa: not installed.*quality"):
        metrics.check_names(["niqe"])
    assert "pyiqa: not installed" in metrics.unavailable(["niqe"])["niqe"]


def test_ssim_of_equal_pictures_is_one() -> None:
    truth = (torch.rand(1, 3, 40, 48) * 255).round() / 255
    assert measure("ssim", truth, truth, 4) == pytest.approx(1.0, abs=1e-4)


def test_conventions_name_the_version() -> None:
    assert "pyiqa" in conventions()


@pytest.mark.parametrize(("name", "why"), [("maniqua", "no 'maniqua'"), ("fid", "sets")])
def test_names_that_have_no_value_for_a_picture_are_refused(name: str, why: str) -> None:
    metrics.check_names(["psnr", "maniqa", "maniqa-pipal"])
    with pytest.raises(OptionError, match=why):
        metrics.check_names(["psnr", name])


def test_a_metric_without_its_weights_is_named_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise socket.gaierror("no network in this test")

    monkeypatch.setattr("pyiqa.utils.download_util.DEFAULT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    metrics._metric.cache_clear()
    reasons = metrics.unavailable(["psnr", "brisque"])
    metrics._metric.cache_clear()
    assert list(reasons) == ["brisque"]
    assert reasons["brisque"].startswith("its weights cannot be had here (")
    assert "no network in this test" in reasons["brisque"]
    assert not capsys.readouterr().out, "downloads are announced on stderr"


def test_a_picture_too_small_for_a_metric_is_an_error_that_names_both() -> None:
    picture, truth = _noisy()
    with pytest.raises(LinearSRError, match="ms_ssim: cannot measure 48x40 pixels"):
        measure("ms_ssim", picture, truth, 4)


def test_higher_is_better_agrees_with_pyiqa() -> None:
    assert metrics.higher_is_better("psnr") and not metrics.higher_is_better("niqe")
    assert metrics.has_reference("gmsd") and not metrics.has_reference("piqe")
