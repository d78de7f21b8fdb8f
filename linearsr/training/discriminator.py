"""The discriminator between generated and real pictures, and its two losses.

Knows nothing of stages, optimizers or devices, and imports nothing but torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

SLOPE = 0.2


class Discriminator(nn.Module):
    """Scores of patches: high for real pictures. Spectrally normalised (Miyato et al. 2018).

    It sees the picture beside the bicubic one, at full and at half size.
    """

    strides = (1, 2, 2, 2, 1)

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        inputs = (6, *channels[:-1])  # two pictures
        layers: list[nn.Module] = []
        for before, after, stride in zip(inputs, channels, self.strides, strict=True):
            layers += [
                spectral_norm(nn.Conv2d(before, after, 3, stride, padding=1)),
                nn.LeakyReLU(SLOPE),
            ]
        self.layers = nn.Sequential(
            *layers, spectral_norm(nn.Conv2d(channels[-1], 1, 3, padding=1))
        )

    def forward(self, picture: Tensor, lr_picture: Tensor) -> tuple[Tensor, Tensor]:
        """Return score maps (B, 1, h, w) at both scales for pictures (B, 3, H, W) in [-1, 1]."""
        joined = torch.cat([picture, lr_picture], dim=1)
        return self.layers(joined), self.layers(F.avg_pool2d(joined, 2))


def hinge(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Return the discriminator's loss: the mean of relu(1 - real) + relu(1 + fake)."""
    pairs = zip(real, fake, strict=True)
    parts = [(1 - r).relu().mean() + (1 + f).relu().mean() for r, f in pairs]
    return torch.stack(parts).mean()


def fooled(fake: Sequence[Tensor]) -> Tensor:
    """Return the generator's loss (B,): the mean of -fake."""
    return torch.stack([-scores.mean(dim=(1, 2, 3)) for scores in fake]).mean(dim=0)
