"""Picture quality through torchmetrics, lpips and pyiqa, with the conventions pinned in one place.

PSNR and SSIM are torchmetrics' on Y of YCbCr (BT.601, 16 to 235; for SSIM rounded, as MATLAB does),
with `crop` pixels cut off each side. `lpips` is `linearsr.metrics.lpips`. All others are as pyiqa
defines them; its licence forbids commercial use, so nothing needs it unless such a metric is asked
for. Everything runs on the CPU, because a GPU's numbers differ.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from linearsr.errors import LinearSRError, OptionError, WeightsError, one_line, require
from linearsr.metrics import lpips

PSNR, SSIM, LPIPS = "psnr", "ssim", "lpips"
# Measured on luma, as the super-resolution literature does.
ON_LUMA = (PSNR, SSIM)
# They compare with the true picture, and need no pyiqa.
FREE = (LPIPS, *ON_LUMA)
# Metrics of pyiqa that need no download, except niqe's parameters. mad needs none either but takes
# a hundred times as long.
_QUICK = ("ms_ssim", "vif", "fsim", "gmsd", "nlpd", "vsi", "cw_ssim", "niqe", "piqe")
# Metrics that compare sets of pictures and have no value for one picture.
_OF_SETS = ("fid", "sfid", "fid_dinov2", "inception_score")
# No higher PSNR is reported, so that the mean over pictures of which one is exact has a value.
_MAX_PSNR = 80.0
# Radius in pixels of SSIM's window.
_RADIUS = 5

Metric = Callable[..., Tensor]


def default_names() -> tuple[str, ...]:
    """Return the metrics that are quick and need at most a small download, pyiqa's if it is here.

    lpips comes first because it agrees best with people; examples are ranked by it.
    """
    return (*FREE, *_QUICK) if _has_pyiqa() else FREE


def conventions() -> str:
    """Return how the numbers are measured, for a table's caption."""
    others = f"; all others of pyiqa {version('pyiqa')}" if _has_pyiqa() else ""
    return (
        "psnr on Y of YCbCr (BT.601, 16 to 235), ssim on that rounded to 8 bits, both of "
        f"torchmetrics {version('torchmetrics')} with scale pixels cropped; lpips of the lpips "
        f"package {version(LPIPS)}, with SqueezeNet, v0.1{others}"
    )


def check_names(names: Sequence[str]) -> None:
    """Raise OptionError for a metric that does not exist, or that compares sets.

    Raises MissingExtra for a metric of pyiqa if it is not installed.
    """
    for name in names:
        if name in FREE:
            continue
        if name not in _configs():
            raise OptionError(
                f"--metrics: pyiqa {version('pyiqa')} has no {name!r}; `pyiqa -ls` lists its names"
            )
        if name in _OF_SETS:
            raise OptionError(f"--metrics: {name} compares sets of pictures, not single ones")


def has_reference(name: str) -> bool:
    """Return whether the metric compares with the true picture."""
    return name in FREE or bool(_configs()[name]["metric_mode"] == "FR")


def higher_is_better(name: str) -> bool:
    """Return whether a higher value of the metric is better."""
    if name in FREE:
        return name != LPIPS
    return not _configs()[name].get("lower_better", False)


def needing_download(names: Sequence[str]) -> dict[str, str]:
    """Return the metrics that are not measured by default for want of a download, with advice."""
    if LPIPS not in names:
        return {}
    try:
        return {} if lpips.find_trunk() else {LPIPS: lpips.how_to_get()}
    except WeightsError as error:
        return {LPIPS: str(error)}


def unavailable(names: Sequence[str]) -> dict[str, str]:
    """Return the metrics that cannot be loaded, with the reason. May download weights."""
    metrics = {name: _metric(name, 0) for name in names}
    errors = {name: error for name, error in metrics.items() if isinstance(error, LinearSRError)}
    return {name: str(error).removeprefix(f"{name}: ") for name, error in errors.items()}


def _has_pyiqa() -> bool:
    return find_spec("pyiqa") is not None


@cache
def _configs() -> dict[str, Any]:
    require("quality", "pyiqa")
    from pyiqa.default_model_configs import DEFAULT_CONFIGS

    return dict(DEFAULT_CONFIGS)


@cache
def _metric(name: str, crop: int) -> Metric | LinearSRError:
    """Return the metric, or the error to raise: a process tries a download only once."""
    try:
        if name not in FREE and name not in _configs():
            return LinearSRError(f"{name}: not one of pyiqa's metrics")
        with lpips.impatient(), contextlib.redirect_stdout(sys.stderr):
            return _load(name, crop)
    except LinearSRError as error:
        return error
    except Exception as error:  # pyiqa's hundred constructors raise anything.
        return WeightsError(f"{name}: its weights cannot be had here ({one_line(error)})")


def _load(name: str, crop: int) -> Metric:
    """Return a function of pictures in [0, 1]; loading may print progress on stdout."""
    if name == LPIPS:
        return partial(lpips.load(), normalize=True)
    if name in ON_LUMA:
        require("evaluation", "torchmetrics")
        return partial(_psnr if name == PSNR else _ssim, crop)
    import pyiqa

    metric: Metric = pyiqa.create_metric(name, device="cpu")
    return metric


def _psnr(crop: int, picture: Tensor, truth: Tensor) -> Tensor:
    from torchmetrics.functional.image import peak_signal_noise_ratio

    y = _luma(picture, crop), _luma(truth, crop)
    return peak_signal_noise_ratio(*y, data_range=255.0).clamp(max=_MAX_PSNR)


def _ssim(crop: int, picture: Tensor, truth: Tensor) -> Tensor:
    """SSIM of Wang et al. 2004: a Gaussian window of 11 pixels that stays inside the picture."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    # As MATLAB's rgb2ycbcr, whose Y of 8-bit pictures has 8 bits.
    y = _luma(picture, crop).round(), _luma(truth, crop).round()
    _, similarity = structural_similarity_index_measure(
        *y, data_range=255.0, return_full_image=True
    )
    # torchmetrics mirrors the picture at its border, where the window does not lie inside it.
    inside = similarity[..., _RADIUS:-_RADIUS, _RADIUS:-_RADIUS]
    if not inside.numel():
        raise LinearSRError(f"the shorter side needs {2 * _RADIUS + 1} pixels inside the crop")
    return inside.mean()


def _luma(picture: Tensor, crop: int) -> Tensor:
    """Return Y of BT.601, 16 to 235, of (1, 3, H, W) in [0, 1], without `crop` pixels a side."""
    height, width = picture.shape[-2:]
    weights = picture.new_tensor([65.481, 128.553, 24.966], dtype=torch.float64)
    y = torch.einsum("bchw,c->bhw", picture.double(), weights)[:, None] + 16
    return y[..., crop : height - crop, crop : width - crop]


@torch.inference_mode()
def measure(name: str, picture: Tensor, truth: Tensor | None, crop: int) -> float:
    """Return one metric of `picture` (1, 3, H, W) in [0, 1], rounded to 8 bits like a file.

    truth: the true picture of the same size, for full-reference metrics. `psnr` is in dB and at
        most 80, `ssim` at most 1, `lpips` 0 for equal pictures and at most about 1; other ranges
        are pyiqa's.

    Raises WeightsError if the metric's weights are missing, MissingExtra if a package is, and
    LinearSRError if the metric cannot measure the picture (most need a minimum size).
    """
    metric = _metric(name, crop if name in ON_LUMA else 0)
    if isinstance(metric, LinearSRError):
        raise metric
    picture = (picture.clamp(0, 1) * 255).round() / 255
    try:
        return float(metric(picture, truth) if has_reference(name) else metric(picture))
    except Exception as error:  # as above
        height, width = picture.shape[-2:]
        reason = one_line(error)
        raise LinearSRError(f"{name}: cannot measure {width}x{height} pixels ({reason})") from error
