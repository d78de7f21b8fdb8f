"""Square views of a picture of any shape, for models that see squares."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# A panorama's views; beyond this they no longer overlap.
MOST_VIEWS = 16
# Of two sides, for models that squeeze: beyond this they see another picture.
SQUEEZABLE = 2.0


def squares(picture: Tensor, squeezable: float = 1.0) -> list[Tensor]:
    """Squares (3, S, S) of a picture (3, H, W) along its longer side, S being the shorter one.

    Each overlaps the next by half, up to MOST_VIEWS. A picture whose sides differ by no more than
    the factor `squeezable` is its own only view, for a model that was trained on squeezed ones.
    """
    axis = -1 if picture.shape[-1] > picture.shape[-2] else -2
    side, length = min(picture.shape[-2:]), max(picture.shape[-2:])
    if length <= squeezable * side:
        return [picture]
    count = min(MOST_VIEWS, 1 + math.ceil(2 * (length / side - 1)))
    starts = torch.linspace(0, length - side, count).round().long().tolist()
    return [picture.narrow(axis, start, side) for start in starts]


def seen_twice(scores: Tensor) -> Tensor:
    """Scores (V, N) of V views as one (N,): the mean of each name's best two.

    Views overlap by half, so what is really there is seen in two; a mistake mostly in one.
    """
    return scores.topk(min(2, len(scores)), dim=0).values.mean(dim=0)
