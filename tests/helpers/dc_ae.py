"""A DC-AE with few channels and random weights, in the layout of the real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def save_dc_ae(folder: Path, channels: int = 4, factor: int = 32) -> Path:
    """Write a diffusers `AutoencoderDC` that compresses `factor` times; return its folder."""
    from diffusers import AutoencoderDC

    levels = factor.bit_length()  # each level but the first halves the sides
    sides = {
        "block_types": ("ResBlock",) * levels,
        "block_out_channels": (8,) * levels,
        "layers_per_block": (1,) * levels,
        "qkv_multiscales": ((),) * levels,
    }
    both = {f"{side}_{key}": v for side in ("encoder", "decoder") for key, v in sides.items()}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderDC(latent_channels=channels, attention_head_dim=8, **both).save_pretrained(
            folder
        )
    return folder


def save_attending_dc_ae(folder: Path) -> Any:
    """Write an `AutoencoderDC` of 8 channels that compresses 4 times and attends; return it."""
    from diffusers import AutoencoderDC

    sides = {
        "block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
        "block_out_channels": (8, 16, 32),
        "layers_per_block": (1, 1, 1),
        "qkv_multiscales": ((), (), (5,)),
    }
    both = {f"{side}_{key}": v for side in ("encoder", "decoder") for key, v in sides.items()}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoencoderDC(latent_channels=8, attention_head_dim=8, **both).eval()
    model.save_pretrained(folder)
    return model
