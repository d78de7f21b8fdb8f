"""Pictures as tensors: synthetic ones, and photographs of scikit-image."""

from __future__ import annotations

import numpy as np
import skimage.data
import torch
from PIL import Image
from torch import Tensor


def picture(height: int = 300, width: int = 340, seed: int = 0) -> Tensor:
    """Return edges, gradients and a little noise, (3, H, W) in [0, 1], at 8 bits."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / 100
    planes = [
        0.5 + 0.3 * np.sin(y * a + 2 * x) * np.cos(x * b) for a, b in ((1, 3), (2, 1), (3, 2))
    ]
    result = np.stack(planes)
    for _ in range(12):
        top, left = rng.integers(0, height - 40), rng.integers(0, width - 40)
        h, w = rng.integers(10, 120, 2)
        result[:, top : top + h, left : left + w] = rng.random((3, 1, 1))
    result += rng.normal(0, 0.02, result.shape)
    return (torch.from_numpy(result).float().clamp(0, 1) * 255).round() / 255


def photo(name: str, shrink: int = 1) -> Tensor:
    """Return a photograph of scikit-image, (3, H, W) in [0, 1], `shrink` times smaller."""
    data = getattr(skimage.data, name)()
    pixels = data[0] if isinstance(data, tuple) else data  # a stereo pair, and its disparity
    image = Image.fromarray(np.asarray(pixels)).convert("RGB")
    small = image.resize((image.width // shrink, image.height // shrink), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255
