"""Colours of pictures with transparent parts: what is hidden must not show after enlarging.

Hidden pixels get the colours of their visible neighbours, so that none bleeds into an edge. Such
pictures are mostly drawings, so their flat areas stay flat, without the grain of a network.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from linearsr.imaging.resample import resize

# Below this alpha, a colour says less about the picture than its neighbours do: 8 bits of an edge
# of a logo may have come from a division by almost nothing.
HIDDEN = 1 / 16
# Two steps of 8 bits, where white is 1 and black is -1.
_FLAT = 4 / 255


def hides(alpha: Tensor | None) -> bool:
    """Return whether some pixels are hidden."""
    return alpha is not None and bool(alpha.min() < HIDDEN)


def spread_colours(pixels: Tensor, alpha: Tensor | None) -> Tensor:
    """Return `pixels` with colours from around where `alpha` is below HIDDEN.

    pixels: (3, H, W). alpha: (1, H, W). The very same tensor comes back if nothing is hidden.
    """
    if alpha is None or not hides(alpha):
        return pixels
    weight = (alpha / HIDDEN).clamp(0, 1)[None]
    return _spread(pixels[None], weight)[0].clamp_(0, 1)


def _spread(pixels: Tensor, weight: Tensor) -> Tensor:
    """Fill what has no weight from ever coarser averages ("pull-push")."""
    height, width = pixels.shape[-2:]
    if height == width == 1:
        return pixels
    share = _halved(weight)
    coarse = _halved(pixels * weight) / share.clamp_min(1e-6)
    # Four pixels of which one is visible say enough about the colour there.
    coarse = _spread(coarse, (4 * share).clamp(0, 1))
    filled = F.interpolate(coarse, size=(height, width), mode="bilinear")
    return pixels * weight + filled * (1 - weight)


def _halved(plane: Tensor) -> Tensor:
    return F.avg_pool2d(plane, 2, ceil_mode=True, count_include_pad=False)


def flatten(pixels: Tensor, source: Tensor) -> Tensor:
    """Return an enlarged picture whose flat areas are as flat as those of its source.

    pixels: (1, 3, H, W); it is changed in place. source: (1, 3, h, w) in the same range, [-1, 1].
    """
    height, width = pixels.shape[-2:]
    contrast = F.max_pool2d(source, 5, 1, 2) + F.max_pool2d(-source, 5, 1, 2)
    flat = (contrast.amax(1, keepdim=True) < _FLAT).to(source)
    share = F.interpolate(flat, size=(height, width), mode="bilinear")
    return pixels.lerp_(resize(source, height, width), share)
