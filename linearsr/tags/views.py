"""Square views of a picture of any shape, for models that take squares."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The most views of a panorama; with more than this would need, they no longer overlap.
MAX_VIEWS = 16
# The ratio of sides up to which a model that was trained on squeezed pictures recognises them.
MAX_SQUEEZE = 2.0


def square_views(picture: Tensor, max_squeeze: float = 1.0) -> list[Tensor]:
    """Return squares (3, S, S) along the longer side of a picture (3, H, W); S is the shorter one.

    Each overlaps the next by half, unless that takes more than MAX_VIEWS. A picture whose sides
    have a ratio of at most `max_squeeze` is returned whole, for the model to squeeze.
    """
    axis = -1 if picture.shape[-1] > picture.shape[-2] else -2
    side, length = min(picture.shape[-2:]), max(picture.shape[-2:])
    if length <= max_squeeze * side:
        return [picture]
    count = min(MAX_VIEWS, 1 + math.ceil(2 * (length / side - 1)))
    starts = torch.linspace(0, length - side, count).round().long().tolist()
    return [picture.narrow(axis, start, side) for start in starts]


def combine_views(scores: Tensor) -> Tensor:
    """Return one (N,) from the scores (V, N) of V views: the mean of each name's best two.

    Views overlap by half, so two of them show what is really there; a mistake is mostly in one.
    """
    return scores.topk(min(2, len(scores)), dim=0).values.mean(dim=0)
