"""LPIPS: the published value with the real trunk; search and properties with a random one."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import squeezenet1_1

from linearsr.errors import LinearSRError, WeightsError
from linearsr.evaluation.run import Request, plan
from linearsr.metrics import lpips
from linearsr.metrics import measure as metrics
from tests.helpers.lpips_trunk import real_lpips_trunk

REAL = real_lpips_trunk()
needs_trunk = pytest.mark.skipif(REAL is None, reason=f"no trunk: set {lpips.TRUNK_VARIABLE}")


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_metrics: None) -> None:
    """There is no trunk in a variable or a cache, no network, and no loaded metric."""

    def unreachable(*_: object, **__: object) -> None:
        raise socket.gaierror("no network in this test")

    monkeypatch.delenv(lpips.TRUNK_VARIABLE, raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return squeezenet1_1(weights=None).state_dict()


@pytest.fixture
def trunk(weights: dict[str, Tensor], tmp_path: Path) -> Path:
    """A random trunk, saved as torchvision's file is."""
    torch.save(weights, tmp_path / "whole.pth")
    return tmp_path / "whole.pth"


def _pictures() -> tuple[Tensor, Tensor]:
    return torch.rand(2, 3, 40, 33) * 2 - 1, torch.rand(2, 3, 40, 33) * 2 - 1


@needs_trunk
def test_lpips_of_the_published_example_has_the_published_value() -> None:
    model = lpips.load(REAL)
    torch.manual_seed(123)
    a, b = (torch.rand(10, 3, 100, 100) * 2 - 1 for _ in range(2))
    assert float(model(a, b).mean()) == pytest.approx(0.1008, abs=1e-4)


@needs_trunk
def test_lpips_metric_equals_the_module_on_pictures_in_eight_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(lpips.TRUNK_VARIABLE, str(REAL))
    picture, truth = torch.rand(2, 1, 3, 48, 48)
    rounded = (picture * 255).round() / 255
    expected = float(lpips.load(REAL)(rounded * 2 - 1, truth * 2 - 1))
    assert metrics.measure("lpips", picture, truth, 4) == pytest.approx(expected, abs=1e-6)


def test_lpips_is_zero_for_equal_pictures_and_symmetric(trunk: Path) -> None:
    model = lpips.load(trunk)
    a, b = _pictures()
    assert model(a, b).shape == (2, 1, 1, 1)
    assert model(a, a).abs().max() == 0 and model(a, b).min() > 0
    assert torch.allclose(model(a, b), model(b, a))


def test_gradients_reach_the_picture_and_no_parameter(trunk: Path) -> None:
    model = lpips.load(trunk)
    a, b = _pictures()
    model(a.requires_grad_(), b).sum().backward()
    assert a.grad is not None and a.grad.isfinite().all() and a.grad.abs().max() > 0
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_loading_draws_no_random_number_of_the_caller(trunk: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    lpips.load(trunk)
    assert torch.equal(torch.rand(3), expected)


def test_whole_weights_and_features_alone_are_the_same_trunk(
    trunk: Path, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    features = {k[9:]: v for k, v in weights.items() if k.startswith("features.")}
    torch.save(features, tmp_path / "bare.pth")
    a, b = _pictures()
    assert torch.equal(lpips.load(trunk)(a, b), lpips.load(tmp_path / "bare.pth")(a, b))


def test_the_trunk_variable_comes_before_the_cache(
    trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lpips.find_trunk() is None
    cached = tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(trunk.read_bytes())
    assert lpips.find_trunk() == cached
    monkeypatch.setenv(lpips.TRUNK_VARIABLE, str(trunk))
    assert lpips.find_trunk() == trunk
    monkeypatch.setenv(lpips.TRUNK_VARIABLE, "nowhere.pth")
    with pytest.raises(WeightsError, match=r"LINEARSR_LPIPS_TRUNK=nowhere\.pth: there is no such"):
        lpips.load()


def test_a_missing_trunk_without_network_says_where_to_put_it(tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        lpips.load()
    message = str(caught.value)
    assert f"squeezenet1_1-b8a52dc0.pth into {tmp_path / 'hub' / 'checkpoints'}" in message
    assert "LINEARSR_LPIPS_TRUNK" in message and "no network in this test" in message


class _Code:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, ("was-run",))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (nn.Linear(2, 2).state_dict(), "is not torchvision's SqueezeNet 1.1"),
        ([1], "holds no state dict"),
        (_Code(), "cannot be read as SqueezeNet's weights"),
    ],
)
def test_files_that_are_no_trunk_are_named(
    content: object, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, "other.pth")
    with pytest.raises(WeightsError, match=rf"other\.pth: {reason}"):
        lpips.load("other.pth")
    assert not Path("was-run").exists()


def test_pictures_of_sixteen_pixels_are_too_small(
    trunk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(lpips.TRUNK_VARIABLE, str(trunk))
    small, enough = torch.rand(1, 3, 16, 40), torch.rand(1, 3, 17, 40)
    assert metrics.measure("lpips", enough, enough, 4) < 1e-4
    with pytest.raises(LinearSRError, match="lpips: cannot measure 40x16 pixels"):
        metrics.measure("lpips", small, small, 4)


def test_default_metric_is_measured_if_its_trunk_exists_and_never_downloaded(
    trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: object, **__: object) -> None:
        raise AssertionError("a download was started")

    from linearsr.evaluation.config import Source

    monkeypatch.setattr(metrics, "default_names", lambda: ("lpips", "psnr"))
    monkeypatch.setattr(lpips, "_downloaded", download)
    request = Request(hr="photos")
    pictures = {"a.png": Source(folder="photos", file="a.png")}
    without = plan(request, lambda *_, **__: pictures)
    assert without.settings.metrics == ("psnr",)
    assert "LINEARSR_LPIPS_TRUNK" in without.skipped["lpips"]
    monkeypatch.setenv(lpips.TRUNK_VARIABLE, str(trunk))
    assert plan(request, lambda *_, **__: pictures).settings.metrics == ("lpips", "psnr")
    assert not metrics.higher_is_better("lpips") and metrics.has_reference("lpips")
