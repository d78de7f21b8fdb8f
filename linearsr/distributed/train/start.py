"""The weights that a stage of training starts with."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from linearsr.distributed.models import load_bundle
from linearsr.distributed.train.config import StageConfig
from linearsr.errors import OptionError


def start_weights(job: StageConfig, only: Collection[int] | None = None) -> list[dict[str, Tensor]]:
    """One state dict per expert; the one model's for each of them if the start has no experts.

    only: the experts that are needed, where not all are; the first always is, for it may be the
    one model. The others have no data.
    Raises OptionError when the start's denoiser is not the recipe's.
    """
    bundle = load_bundle(str(job.start), None if only is None else {0, *only})
    if bundle.config.denoiser != job.recipe.model.denoiser:
        raise OptionError(f"{job.start}: weights of another denoiser config than the recipe's")
    states = [model.state_dict() for model in bundle.experts]
    return states if len(states) > 1 else states * max(1, len(job.recipe.experts))
