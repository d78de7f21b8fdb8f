"""Other people's super-resolution models, from the checkpoints that spandrel knows.

spandrel reads the architecture and its size from the names and shapes of the tensors. Code inside a
file is never run: a pickle (.pth, .pt, .ckpt) goes through torch's reader for weights, which
refuses everything except tensors and plain containers. Knows nothing of Ray or S3.
"""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from linearsr.errors import WeightsError, one_line, require
from linearsr.imaging.resample import resize
from linearsr.imaging.tiles import Canvas, tile_grid
from linearsr.pipeline.device import pick_device

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt")
# LR pixels. A tile takes about 1 GB with Real-ESRGAN x4plus. Neighbours fade into each other over
# the overlap, so that no seam shows.
TILE, OVERLAP = 256, 32


def is_checkpoint(model: str) -> bool:
    """Return whether this names a checkpoint file, not a bundled model or a folder of weights."""
    return model.lower().endswith(SUFFIXES) and not os.path.isdir(model)


class Checkpoint:
    """Another program's model in float32, which is no less exact than the published weights."""

    def __init__(self, descriptor: Any, device: torch.device) -> None:
        """descriptor: spandrel's `ImageModelDescriptor` of an RGB model."""
        self.descriptor = descriptor.to(device, torch.float32).eval()
        self.descriptor.model.requires_grad_(False)
        self.device = device

    @classmethod
    def load(cls, path: str | Path, device: str = "auto") -> Checkpoint:
        """Load the model in a file that ends in one of SUFFIXES.

        Raises WeightsError for a file that cannot be read, an architecture that spandrel does not
        know, or a model that is not from RGB to RGB; OptionError for a device that cannot be used;
        MissingExtra without spandrel.
        """
        require("evaluation", "spandrel")
        from spandrel import (
            ImageModelDescriptor,
            ModelLoader,
            UnsupportedModelError,
            canonicalize_state_dict,
        )

        tensors = canonicalize_state_dict(_tensors(Path(path)))
        try:
            descriptor = ModelLoader().load_from_state_dict(tensors)
        except UnsupportedModelError as error:
            raise WeightsError(
                f"{path}: spandrel does not know this architecture; for a LinearSR model, give its "
                "folder"
            ) from error
        except Exception as error:  # some forty architectures, each with its own errors
            raise WeightsError(f"{path}: spandrel cannot load it ({one_line(error)})") from error
        if not isinstance(descriptor, ImageModelDescriptor):
            raise WeightsError(f"{path}: this model inpaints; only upscalers can be compared")
        channels = (descriptor.input_channels, descriptor.output_channels)
        if channels != (3, 3):
            raise WeightsError(
                f"{path}: takes {channels[0]} channels and returns {channels[1]}; only models from "
                "RGB to RGB can be compared"
            )
        return cls(descriptor, pick_device(device))

    def upscale(self, lr: Tensor, scale: int) -> Tensor:
        """Return the picture (3, scale * h, scale * w) in [0, 1] of LR (3, h, w) in [0, 1].

        The result of a model of another scale is resized by antialiased bicubic. Large pictures go
        through the model in tiles, unless it makes its own.
        """
        from spandrel import ModelTiling

        height, width = lr.shape[1:]
        whole = self.descriptor.tiling is ModelTiling.INTERNAL
        tiles = tile_grid(
            height, width, max(height, width) if whole else TILE, 0 if whole else OVERLAP
        )
        own = self.descriptor.scale
        canvas = Canvas([tile.scaled(own) for tile in tiles], 3)
        for tile in tiles:
            piece = self.descriptor(tile.crop(lr)[None].to(self.device))
            canvas.add(tile.scaled(own), piece[0].cpu())
        return resize(canvas.result()[None], height * scale, width * scale)[0].clamp(0, 1)

    def describe(self) -> str:
        """Return architecture, scale, size, precision and device, for the report."""
        count = sum(tensor.numel() for tensor in self.descriptor.model.parameters())
        name, own = self.descriptor.architecture.name, self.descriptor.scale
        return (
            f"{name} through spandrel, x{own}, {count / 1e6:.2f} M parameters, float32 on "
            f"{self.device.type}"
        )


def _tensors(path: Path) -> dict[str, Any]:
    """Read the file's dictionary of tensors, perhaps nested in others; no code is run."""
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; correct the path")
    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():  # about TorchScript, which is refused
            warnings.simplefilter("ignore")
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files make torch's reader fail in many ways
        # torch's own message advises to run the file's code.
        if isinstance(error, pickle.UnpicklingError) or "TorchScript" in str(error):
            raise WeightsError(
                f"{path}: holds more than tensors, or is damaged; code in a file is not run: get "
                "the model as .safetensors, or save its state dict alone"
            ) from error
        reason = one_line(error) or type(error).__name__
        raise WeightsError(f"{path}: cannot be read ({reason}); copy it again") from error
    if not isinstance(tensors, dict):
        raise WeightsError(f"{path}: holds no state dict; save the model's state dict alone")
    return tensors
