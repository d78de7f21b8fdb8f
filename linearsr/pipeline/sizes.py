"""How large a result is, from the size of its input and the options."""

from __future__ import annotations

from linearsr.config import Options


def output_size(height: int, width: int, options: Options) -> tuple[int, int]:
    """Return height and width of the result that `options` ask for, given the input's size."""
    if options.width and options.height:
        return options.height, options.width
    return scaled_size(height, width, requested_scale(height, width, options))


def scaled_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """Return height and width in whole pixels, `scale` times larger and at least one."""
    return max(1, round(height * scale)), max(1, round(width * scale))


def requested_scale(height: int, width: int, options: Options) -> float:
    """Return the scale that `options` ask for; if width and height imply two, the larger one."""
    if not (options.width or options.height):
        return options.scale
    return max((options.height or 0) / height, (options.width or 0) / width)
