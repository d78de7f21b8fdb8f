"""Exponential moving average of a model's weights, shared out over the ranks of a run.

Each rank keeps and averages only its part, in float32, and writes it as safetensors: exporting a
checkpoint needs neither the optimizer nor any pickle.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from linearsr.errors import WeightsError, one_line


class EMA:
    """This rank's part of the averaged weights; call `update` after every optimizer step."""

    def __init__(self, model: nn.Module, decay: float, rank: int = 0, world: int = 1) -> None:
        self.decay = decay
        self.rank, self.world = rank, world
        # The ranks take turns from large to small, so that their shares are about equal.
        by_size = sorted(model.named_parameters(), key=lambda item: (-item[1].numel(), item[0]))
        self.live = dict(by_size[rank::world])
        self.average = {name: p.detach().float().clone() for name, p in self.live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the weights; the decay grows with `step`, so the start is forgotten."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self.live.items():
            self.average[name].lerp_(parameter.float(), weight)

    def save(self, folder: Path) -> None:
        """Write this rank's part into a checkpoint folder."""
        tensors = {name: t.cpu().contiguous() for name, t in self.average.items()}
        save_file(tensors, folder / f"ema-{self.rank:05d}-of-{self.world:05d}.safetensors")

    def load(self, folder: Path) -> None:
        """Read this rank's part from a checkpoint of any number of ranks."""
        full = load_average(folder)
        for name, average in self.average.items():
            average.copy_(full[name])


def load_average(folder: Path) -> dict[str, Tensor]:
    """Return the whole averaged model of a checkpoint folder, in float32, from all ranks' parts.

    Raises WeightsError if a part is missing or damaged.
    """
    shares = sorted(folder.glob("ema-*-of-*.safetensors"))
    if not shares:
        raise WeightsError(f"{folder}: not a training checkpoint: it has no ema-*.safetensors")
    expected = int(shares[0].stem.rsplit("-", 1)[1])
    if len(shares) != expected:
        raise WeightsError(
            f"{folder}: incomplete checkpoint: found {len(shares)} of {expected} files "
            "ema-*.safetensors"
        )
    try:
        return {name: tensor for share in shares for name, tensor in load_file(share).items()}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{folder}: damaged checkpoint: {one_line(error)}") from error
