"""Picture quality through pyiqa and lpips, with the conventions pinned in one place.

PSNR and SSIM: on Y of YCbCr (BT.601, 16 to 235; for SSIM pyiqa rounds it, as MATLAB does), `crop`
pixels cut off each side. `lpips` is `linearsr.metrics.lpips`; the rest is as pyiqa defines it.
Always on the CPU: a GPU's numbers differ. Knows nothing of models.
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
# Need no download, but for niqe's parameters and lpips's trunk. Nor does mad, which takes a hundred
# times as long. lpips is the first because it agrees with people best; examples are chosen by it.
DEFAULT = (
    LPIPS,
    *ON_LUMA,
    *("ms_ssim", "vif", "fsim", "gmsd", "nlpd", "vsi", "cw_ssim"),
    *("niqe", "piqe"),
)
# Compare sets of pictures: no value for one.
_OF_SETS = ("fid", "sfid", "fid_dinov2", "inception_score")


def conventions() -> str:
    """What the numbers mean, for a table's caption."""
    return (
        f"pyiqa {version('pyiqa')}; psnr on Y of YCbCr (BT.601, 16 to 235), ssim on that rounded "
        f"to 8 bits, both with scale pixels cropped; lpips of the lpips package {version(LPIPS)}, "
        "with SqueezeNet, v0.1"
    )


def check_names(names: Sequence[str]) -> None:
    """Raise OptionError for the first that pyiqa does not have, or that is not of one picture."""
    for name in names:
        if name not in _configs():
            raise OptionError(
                f"--metrics: pyiqa {version('pyiqa')} has no {name!r}; `pyiqa -ls` lists its names"
            )
        if name in _OF_SETS:
            raise OptionError(f"--metrics: {name} compares sets of pictures, not single ones")


def has_reference(name: str) -> bool:
    """Whether the metric compares with the true picture."""
    return bool(_configs()[name]["metric_mode"] == "FR")


def higher_is_better(name: str) -> bool:
    """Which way the metric points."""
    return not _configs()[name].get("lower_better", False)


def without_download(names: Sequence[str]) -> dict[str, str]:
    """Those of `names` left out unless they are asked for, as they need a download; and why."""
    if LPIPS not in names:
        return {}
    try:
        return {} if lpips.find_trunk() else {LPIPS: lpips.how_to_get()}
    except WeightsError as error:
        return {LPIPS: str(error)}


def unavailable(names: Sequence[str]) -> dict[str, str]:
    """Those of `names` that cannot be had here, with the reason. May download weights."""
    made = {name: _metric(name, 0) for name in names}
    errors = {name: error for name, error in made.items() if isinstance(error, LinearSRError)}
    return {name: str(error).removeprefix(f"{name}: ") for name, error in errors.items()}


@cache
def _configs() -> dict[str, Any]:
    require("quality", "pyiqa")
    from pyiqa.default_model_configs import DEFAULT_CONFIGS

    return dict(DEFAULT_CONFIGS)


@cache
def _metric(name: str, crop: int) -> Any:
    """The metric, or what is to be raised for it: a download is tried once in a process."""
    if name not in _configs():
        return LinearSRError(f"{name}: not one of pyiqa's metrics")
    try:
        with lpips.impatient(), contextlib.redirect_stdout(sys.stderr):
            return _made(name, crop)
    except LinearSRError as error:
        return error
    except Exception as error:  # some hundred constructors of others, each with its own ways
        return WeightsError(f"{name}: its weights cannot be had here ({one_line(error)})")


def _made(name: str, crop: int) -> Any:
    """A function of pictures in [0, 1] that may tell its progress on stdout."""
    if name == LPIPS:
        return partial(lpips.load(), normalize=True)
    import pyiqa

    # "ycbcr" is the studio-swing Y of the super-resolution literature; pyiqa's default is not.
    luma = {"test_y_channel": True, "color_space": "ycbcr", "crop_border": crop}
    return pyiqa.create_metric(name, device="cpu", **(luma if name in ON_LUMA else {}))


@torch.inference_mode()
def measure(name: str, picture: Tensor, truth: Tensor | None, crop: int) -> float:
    """One metric of `picture` (1, 3, H, W) in [0, 1], rounded to 8 bits as a file would be.

    `truth`: the true picture of the same size; only full-reference metrics look at it. `lpips` is
    from 0, for equal pictures, to about 1; other ranges are pyiqa's.
    Raises WeightsError when the metric's weights are missing, MissingExtra when pyiqa is, and
    LinearSRError when the metric cannot measure the picture (most need some minimal size).
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
