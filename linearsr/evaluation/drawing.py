"""Draw labelled pictures side by side, and choose the squares of most contrast as close-ups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont

GAP, LABEL = 8, 28


class Row(NamedTuple):
    """Pictures of one height, each with its label above; without labels if all are empty."""

    labels: Sequence[str]
    pictures: Sequence[Image.Image]

    @property
    def header(self) -> int:
        """Height in pixels of the labels, or of the gap in their place."""
        return LABEL if any(self.labels) else GAP


def sheet(rows: Sequence[Row], width: int) -> Image.Image:
    """Draw rows one below the other on white, in columns of `width` pixels.

    The label of a row with a single picture may be as long as the sheet is wide.
    """
    columns = max(len(row.pictures) for row in rows)
    heights = [row.header + max(picture.height for picture in row.pictures) for row in rows]
    whole = Image.new("RGB", (columns * (width + GAP) + GAP, sum(heights) + GAP), "white")
    top = 0
    for row, height in zip(rows, heights, strict=True):
        room = width if len(row.labels) > 1 else whole.width - 2 * GAP
        for column, (label, picture) in enumerate(zip(row.labels, row.pictures, strict=True)):
            left = GAP + column * (width + GAP)
            _write(whole, left, top + 4, label, room)
            whole.paste(picture, (left, top + row.header))
        top += height
    return whole


def _write(whole: Image.Image, left: int, top: int, text: str, width: int) -> None:
    """Write the text, smaller if it would not fit."""
    if not text:
        return
    longest = ImageFont.load_default(size=18).getlength(text)
    size = max(9, int(18 * min(1, width / longest)))
    ImageDraw.Draw(whole).text((left, top), text, "black", ImageFont.load_default(size=size))


def details(pixels: torch.Tensor, size: int, count: int) -> list[tuple[int, int]]:
    """Return (top, left) of the `count` squares with most contrast, `size` wide, without overlap.

    pixels: (3, H, W). A picture smaller than `size` has one corner, (0, 0).
    """
    grey = pixels.mean(0)[None, None]
    if min(grey.shape[-2:]) < size:
        return [(0, 0)]
    mean, square = (torch.nn.functional.avg_pool2d(x, size, size // 4) for x in (grey, grey**2))
    scores = (square - mean**2)[0, 0]
    corners: list[tuple[int, int]] = []
    for index in scores.flatten().argsort(descending=True).tolist():
        row, column = divmod(index, scores.shape[1])
        corner = (row * (size // 4), column * (size // 4))
        if all(max(abs(corner[0] - r), abs(corner[1] - c)) >= size for r, c in corners):
            corners.append(corner)
        if len(corners) == count:
            break
    return corners
