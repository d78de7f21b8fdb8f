"""Give a restored picture the colours of its source, because diffusion models drift in hue.

Two tensors go in and one comes out; no files or models. Both methods became common through StableSR
(arXiv 2305.07015). "wavelet" keeps only the fine detail of the restored picture; "adain" keeps all
of it but the mean and the spread of each channel.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F

from linearsr.errors import OptionError

COLOUR_FIXES: Final = ("wavelet", "adain", "none")

_LEVELS: Final = 5
# Rows above and below a row that its blurred values depend on.
_REACH: Final = sum(2**level for level in range(_LEVELS))
# Rows that are blurred at a time: few, so that memory does not grow with the picture's height.
_BAND: Final = 256
_TINY_VARIANCE: Final = 1e-5


def fix_colour(restored: torch.Tensor, source: torch.Tensor, method: str) -> torch.Tensor:
    """Return `restored` with the colours of `source`.

    Both are (B, C, H, W) of the same size and range, `source` being the low-resolution picture
    upsampled. Channels are independent, and the upscaler passes one at a time. `restored` is
    changed in place. The result may lie outside [0, 1]: clamp it. Memory: about one more picture.

    Raises OptionError for a method not in COLOUR_FIXES, or for pictures of different shapes.
    """
    if method not in COLOUR_FIXES:
        raise OptionError(
            f"Colour fix {method!r} is unknown; choose from {', '.join(COLOUR_FIXES)}."
        )
    if restored.shape != source.shape:
        sizes = f"{tuple(restored.shape)} and {tuple(source.shape)}"
        raise OptionError(
            f"The picture and the source of its colours have different shapes, {sizes}; resize the "
            "source first."
        )
    if method == "wavelet":
        # The high frequencies of one plus the low frequencies of the other. The low-pass is linear,
        # so restored - low(restored) + low(source) needs it only once, for the difference.
        return _add_low_pass(restored, source - restored)
    if method == "adain":
        restored_mean, restored_std = _statistics(restored)
        source_mean, source_std = _statistics(source)
        return restored.sub_(restored_mean).mul_(source_std / restored_std).add_(source_mean)
    return restored


def _add_low_pass(picture: torch.Tensor, difference: torch.Tensor) -> torch.Tensor:
    """Add the low frequencies of `difference` to `picture`, in place, some rows at a time.

    The result has the bits that the whole picture at once would have.
    """
    height = picture.shape[-2]
    for top in range(0, height, _BAND):
        bottom = min(top + _BAND, height)
        first, last = max(0, top - _REACH), min(bottom + _REACH, height)
        blurred = _low_pass(difference[..., first:last, :])
        picture[..., top:bottom, :] += blurred[..., top - first : bottom - first, :]
    return picture


def _low_pass(picture: torch.Tensor) -> torch.Tensor:
    """Blur (B, C, H, W) with the a-trous kernel [1 2 1] / 4, dilated by 1, 2, 4, 8, 16."""
    for level in range(_LEVELS):
        step = 2**level
        for axis, pad in ((-2, (0, 0, step, step)), (-1, (step, step, 0, 0))):
            padded, length = F.pad(picture, pad, mode="replicate"), picture.shape[axis]
            picture = padded.narrow(axis, step, length) * 0.5
            picture.add_(padded.narrow(axis, 0, length), alpha=0.25)
            picture.add_(padded.narrow(axis, 2 * step, length), alpha=0.25)
    return picture


def _statistics(picture: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    variance, mean = torch.var_mean(picture, dim=(-2, -1), correction=0, keepdim=True)
    return mean, (variance + _TINY_VARIANCE).sqrt()
