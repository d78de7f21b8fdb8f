"""Picture quality through pyiqa, with the conventions pinned in one place.

PSNR and SSIM: on Y of YCbCr (BT.601, 16 to 235), `crop` pixels cut off each side; the rest as
pyiqa defines them. Knows nothing of models.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from linearsr.errors import LinearSRError

# Measured on luma, as the super-resolution literature does.
ON_LUMA = ("psnr", "ssim")


def conventions() -> str:
    """What the numbers mean, for a table's caption."""
    return f"pyiqa {version('pyiqa')}; psnr and ssim on Y with scale pixels cropped"


@cache
def _metric(name: str, crop: int) -> Any:
    try:
        import pyiqa
    except ImportError as error:
        raise LinearSRError("metrics need pyiqa: pip install 'linearsr[quality]'") from error
    if name in ON_LUMA:
        # "ycbcr" is the studio-swing Y of the super-resolution literature; pyiqa's default is not.
        luma = {"test_y_channel": True, "color_space": "ycbcr"}
        return pyiqa.create_metric(name, device="cpu", crop_border=crop, **luma)
    try:
        return pyiqa.create_metric(name, device="cpu")
    except AssertionError as error:
        raise LinearSRError(f"{name}: not one of pyiqa's metrics") from error
    except (OSError, RuntimeError) as error:
        raise LinearSRError(f"{name}: its weights cannot be had here ({error})") from error


@torch.inference_mode()
def measure(name: str, picture: Tensor, truth: Tensor, crop: int) -> float:
    """One metric of `picture` (1, 3, H, W) in [0, 1], rounded to 8 bits as a file would be.

    `truth`: the true picture of the same size; only full-reference metrics look at it.
    Raises LinearSRError when pyiqa or the metric's weights are missing.
    """
    picture = (picture.clamp(0, 1) * 255).round() / 255
    metric = _metric(name, crop)
    return float(metric(picture, truth) if metric.metric_mode == "FR" else metric(picture))
