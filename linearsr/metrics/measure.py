"""Picture quality through pyiqa and lpips, with the conventions pinned in one place.

PSNR and SSIM are measured on Y of YCbCr (BT.601, 16 to 235; for SSIM pyiqa rounds it, as MATLAB
does), with `crop` pixels cut off each side. `lpips` is `linearsr.metrics.lpips`; all others are as
pyiqa defines them. Everything runs on the CPU, because a GPU's numbers differ.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from functools import cache, partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from linearsr.errors import LinearSRError, OptionError, WeightsError, one_line, require
from linearsr.metrics import lpips

# Measured on luma, as the super-resolution literature does.
ON_LUMA = ("psnr", "ssim")
LPIPS = "lpips"
# Metrics that need no download, except niqe's parameters and lpips's trunk. mad needs none either
# but takes a hundred times as long. lpips comes first because it agrees best with people; examples
# are ranked by it.
DEFAULT = (
    LPIPS,
    *ON_LUMA,
    *("ms_ssim", "vif", "fsim", "gmsd", "nlpd", "vsi", "cw_ssim"),
    *("niqe", "piqe"),
)
# Metrics that compare sets of pictures and have no value for one picture.
_OF_SETS = ("fid", "sfid", "fid_dinov2", "inception_score")


def conventions() -> str:
    """Return how the numbers are measured, for a table's caption."""
    return (
        f"pyiqa {version('pyiqa')}; psnr on Y of YCbCr (BT.601, 16 to 235), ssim on that rounded "
        f"to 8 bits, both with scale pixels cropped; lpips of the lpips package {version(LPIPS)}, "
        "with SqueezeNet, v0.1"
    )


def check_names(names: Sequence[str]) -> None:
    """Raise OptionError for a metric that pyiqa does not have, or that compares sets."""
    for name in names:
        if name not in _configs():
            raise OptionError(
                f"--metrics: pyiqa {version('pyiqa')} has no {name!r}; `pyiqa -ls` lists its names"
            )
        if name in _OF_SETS:
            raise OptionError(f"--metrics: {name} compares sets of pictures, not single ones")


def has_reference(name: str) -> bool:
    """Return whether the metric compares with the true picture."""
    return bool(_configs()[name]["metric_mode"] == "FR")


def higher_is_better(name: str) -> bool:
    """Return whether a higher value of the metric is better."""
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


@cache
def _configs() -> dict[str, Any]:
    require("quality", "pyiqa")
    from pyiqa.default_model_configs import DEFAULT_CONFIGS

    return dict(DEFAULT_CONFIGS)


@cache
def _metric(name: str, crop: int) -> Any:
    """Return the metric, or the error to raise: a process tries a download only once."""
    if name not in _configs():
        return LinearSRError(f"{name}: not one of pyiqa's metrics")
    try:
        with lpips.impatient(), contextlib.redirect_stdout(sys.stderr):
            return _load(name, crop)
    except LinearSRError as error:
        return error
    except Exception as error:  # pyiqa's hundred constructors raise anything.
        return WeightsError(f"{name}: its weights cannot be had here ({one_line(error)})")


def _load(name: str, crop: int) -> Any:
    """Return a function of pictures in [0, 1]; loading may print progress on stdout."""
    if name == LPIPS:
        return partial(lpips.load(), normalize=True)
    import pyiqa

    # "ycbcr" is the studio-swing Y of the super-resolution literature; pyiqa's default is not.
    luma = {"test_y_channel": True, "color_space": "ycbcr", "crop_border": crop}
    return pyiqa.create_metric(name, device="cpu", **(luma if name in ON_LUMA else {}))


@torch.inference_mode()
def measure(name: str, picture: Tensor, truth: Tensor | None, crop: int) -> float:
    """Return one metric of `picture` (1, 3, H, W) in [0, 1], rounded to 8 bits like a file.

    truth: the true picture of the same size, for full-reference metrics. `lpips` is 0 for equal
        pictures and at most about 1; other ranges are pyiqa's.

    Raises WeightsError if the metric's weights are missing, MissingExtra if pyiqa is, and
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
