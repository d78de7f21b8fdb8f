"""Bicubic resizing, the same for training, inference and the baseline."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from linearsr.imaging.tiles import Tile


def resize(picture: Tensor, height: int, width: int) -> Tensor:
    """Resize (B, C, H, W) floats with antialiased bicubic (a = -0.5, as MATLAB and Pillow do).

    The result is not clamped: bicubic overshoots its input's range at edges.
    """
    if picture.shape[-2:] == (height, width):
        return picture
    return F.interpolate(picture, size=(height, width), mode="bicubic", antialias=True)


def enlarged_part(
    picture: Tensor, height: int, width: int, part: Tile, device: torch.device | str = "cpu"
) -> Tensor:
    """Return the `part` of `resize(picture, height, width)`, computed alone and on `device`.

    picture: (B, C, h, w) floats, no larger than the result. A part may extend beyond the result,
    whose last row and column are then repeated. Parts that overlap agree. They differ from the
    whole by rounding alone (torch rounds coordinates to float32: about 1e-7 of a side, times the
    contrast there).
    """
    top, left = min(part.top, height - 1), min(part.left, width - 1)
    inside = Tile(top, left, min(part.bottom, height) - top, min(part.right, width) - left)
    rows = _Axis(picture.shape[-2], height, inside.top, inside.bottom)
    columns = _Axis(picture.shape[-1], width, inside.left, inside.right)
    source = picture[..., rows.start : rows.stop, columns.start : columns.stop].to(device)
    if rows.factor and columns.factor:
        # These pixels alone are a picture that torch enlarges at the same phase.
        large = resize(source, source.shape[-2] * rows.factor, source.shape[-1] * columns.factor)
        offset = inside.top - rows.start * rows.factor, inside.left - columns.start * columns.factor
        result = Tile(*offset, inside.height, inside.width).crop(large)
    else:
        result = rows.enlarge(columns.enlarge(source, -1), -2)
    below, beside = part.height - inside.height, part.width - inside.width
    return F.pad(result, (0, beside, 0, below), mode="replicate") if below or beside else result


@dataclass(frozen=True)
class _Axis:
    """Positions `first` to `last` of an axis that is enlarged from `length` to `size` pixels."""

    length: int
    size: int
    first: int
    last: int

    @property
    def factor(self) -> int:
        """The factor of the enlargement, or 0 if it is not a whole number."""
        return 0 if self.size % self.length else self.size // self.length

    @property
    def start(self) -> int:
        """The first source pixel that bicubic may need."""
        return max(0, self.first * self.length // self.size - 2)

    @property
    def stop(self) -> int:
        """The source pixel after the last one that bicubic may need."""
        return min(self.length, -(-self.last * self.length // self.size) + 2)

    def enlarge(self, source: Tensor, dim: int) -> Tensor:
        """Enlarge the pixels `start` to `stop` along `dim`; each position needs four of them.

        As in `resize`, pixels outside the picture have no weight. A position's pixels and weights
        do not depend on where the part begins, so parts that overlap agree in every bit.
        """
        position = torch.arange(self.first, self.last, dtype=torch.float64)
        centre = (position + 0.5) * self.length / self.size - 0.5
        pixels = centre.floor() + torch.arange(-1, 3)[:, None]
        weights = torch.where((pixels >= 0) & (pixels < self.length), _cubic(pixels - centre), 0)
        # Rounded here, because not every device supports float64.
        weights = (weights / weights.sum(0)).to(source.dtype).to(source.device)
        indices = (pixels.clamp(0, self.length - 1) - self.start).long().to(source.device)
        shape = [1] * source.ndim
        shape[dim] = -1
        total = source.index_select(dim, indices[0]) * weights[0].view(shape)
        for index, weight in zip(indices[1:], weights[1:], strict=True):
            total.addcmul_(source.index_select(dim, index), weight.view(shape))
        return total


def _cubic(x: Tensor) -> Tensor:
    """Return Keys' kernel with a = -0.5 at distances `x` of up to two pixels."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))
