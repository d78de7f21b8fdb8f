"""Inputs of the denoiser besides the noisy latent: the timestep, the LR picture, the tags."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TimestepEmbedding(nn.Module):
    """Sinusoids of 256 channels through a two-layer MLP, then AdaLN-single's shared modulation."""

    def __init__(self, width: int, timestep_scale: float, channels: int = 256) -> None:
        super().__init__()
        self.timestep_scale = timestep_scale
        self.hidden = nn.Linear(channels, width)
        self.embed = nn.Linear(width, width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the block modulation (B, 6, C) and the embedding (B, C) of t (B,) in [0, 1]."""
        # Angles in float32: bf16 cannot tell neighbouring timesteps apart on [0, 1000].
        half = self.hidden.in_features // 2
        octaves = torch.arange(half, device=t.device, dtype=torch.float32) / half
        angles = self.timestep_scale * t.float()[:, None] * torch.exp(-math.log(10000.0) * octaves)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.hidden.weight.dtype)
        embedding = self.embed(F.silu(self.hidden(waves)))
        return self.modulation(F.silu(embedding)).unflatten(-1, (6, -1)), embedding


class LRStem(nn.Module):
    """Three strided 3x3 convolutions with SiLU from the LR picture to the latent grid."""

    def __init__(self, channels: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        sizes = zip((3, *channels[:-1]), channels, strides, strict=True)
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, s, padding=1) for i, o, s in sizes)

    def forward(self, picture: Tensor) -> Tensor:
        """Map an upsampled LR picture (B, 3, H, W) in [-1, 1] to (B, C, H / stride, W / stride)."""
        for conv in self.convs:
            picture = F.silu(conv(picture))
        return picture


class TagProjection(nn.Module):
    """Projection of tag embeddings to the blocks' width (Sana's caption projection and norm)."""

    def __init__(self, tag_dim: int, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(tag_dim, width)
        self.out = nn.Linear(width, width)
        self.norm = nn.RMSNorm(width, eps=1e-5)

    def forward(self, tags: Tensor) -> Tensor:
        """Map the embeddings of T tags (B, T, tag_dim) to the width of the blocks (B, T, C)."""
        return self.norm(self.out(F.gelu(self.hidden(tags), approximate="tanh")))
