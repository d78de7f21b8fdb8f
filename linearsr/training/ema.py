"""Exponential moving average of a model's weights, shared out over the ranks of a run.

Each rank keeps and averages only its part, in float32, and writes it as safetensors: exporting a
checkpoint needs neither the optimizer nor any pickle.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from linearsr.errors import WeightsError, one_line
from linearsr.training.lora import Origin, trained


class EMA:
    """This rank's part of the averaged weights; call `update` after every optimizer step.

    origin: the base of the adapters that are trained; None if all weights are trained.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float,
        rank: int = 0,
        world: int = 1,
        origin: Origin | None = None,
    ) -> None:
        self.decay = decay
        self.rank, self.world = rank, world
        self.origin = origin
        # The ranks take turns from large to small, so that their shares are about equal.
        by_size = sorted(trained(model).items(), key=lambda item: (-item[1].numel(), item[0]))
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
        file = folder / f"ema-{self.rank:05d}-of-{self.world:05d}.safetensors"
        save_file(tensors, file, metadata=None if self.origin is None else self.origin.note())

    def load(self, folder: Path) -> None:
        """Read this rank's part from a checkpoint of any number of ranks.

        Raises WeightsError if it is damaged.
        """
        full = load_average(folder)
        for name, average in self.average.items():
            average.copy_(full[name])

    def check(self, folder: Path) -> None:
        """Raise WeightsError if a checkpoint has adapters of another shape or another base."""
        ours, theirs = (origin and origin[:2] for origin in (self.origin, read_origin(folder)))
        if ours != theirs:
            raise WeightsError(
                f"{folder}: cannot be resumed from: this checkpoint and this run do not both have "
                "adapters (LoRA) of the same shape on the same base"
            )


def read_origin(folder: Path) -> Origin | None:
    """Return the base of the adapters in a checkpoint folder; None if it has whole weights.

    Raises WeightsError if the folder is not a checkpoint or damaged.
    """
    share = _shares(folder)[0]
    try:
        with safe_open(share, "pt") as file:
            return Origin.of(file.metadata() or {})
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise WeightsError(f"{folder}: damaged checkpoint: {one_line(error)}") from error


def load_average(folder: Path) -> dict[str, Tensor]:
    """Return the whole averaged model of a checkpoint folder, in float32, from all ranks' parts.

    Raises WeightsError if a part is missing or damaged.
    """
    shares = _shares(folder)
    try:
        return {name: tensor for share in shares for name, tensor in load_file(share).items()}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{folder}: damaged checkpoint: {one_line(error)}") from error


def _shares(folder: Path) -> list[Path]:
    """Return the files of all ranks. Raises WeightsError if one is missing."""
    shares = sorted(folder.glob("ema-*-of-*.safetensors"))
    if not shares:
        raise WeightsError(f"{folder}: not a training checkpoint: it has no ema-*.safetensors")
    expected = int(shares[0].stem.rsplit("-", 1)[1])
    if len(shares) != expected:
        raise WeightsError(
            f"{folder}: incomplete checkpoint: found {len(shares)} of {expected} files "
            "ema-*.safetensors"
        )
    return shares
