"""The weights that a stage of training starts with, one expert at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

from linearsr import weights
from linearsr.config import ModelConfig
from linearsr.denoiser import LinearSR
from linearsr.distributed.models import read_config
from linearsr.distributed.train.config import StageConfig
from linearsr.errors import OptionError
from linearsr.storage.location import locate


def check_start(job: StageConfig) -> None:
    """Check the config of the starting weights, if there are any, against the recipe.

    It loads no weights. Raises WeightsError if there is no bundle, and OptionError if it does not
    fit the recipe.
    """
    if job.start is not None:
        _check_fits(job, read_config(job.start))


def _check_fits(job: StageConfig, config: ModelConfig) -> None:
    if config.denoiser != job.recipe.model.denoiser:
        raise OptionError(
            f"{job.start}: the denoiser config of these weights differs from the recipe's; "
            "choose the recipe they were made with"
        )
    count = len(weights.expert_names(config))
    if job.expert is not None and count not in (1, len(job.recipe.experts)):
        raise OptionError(
            f"{job.start}: these weights have {count} experts and the recipe has "
            f"{len(job.recipe.experts)}; give weights with one expert or with as many as the recipe"
        )


@contextmanager
def start_experts(job: StageConfig) -> Iterator[Callable[[int], LinearSR]]:
    """Yield a function that loads one expert of the starting weights in float32, by its number.

    Starting weights without experts give the same model for every number. Each call reads the file
    anew and keeps nothing, so a process holds no more experts than its caller keeps.
    The function raises WeightsError for a damaged file, and what `check_start` raises.
    """
    start = str(job.start)
    with ExitStack() as stack:

        @cache
        def folder() -> str | Path:
            """Copy an s3:// folder to this machine, once and only if an expert is needed."""
            if not start.startswith("s3://"):
                return start
            return stack.enter_context(locate(start).local(".safetensors"))

        def load(expert: int) -> LinearSR:
            config = weights.read_config(folder())
            _check_fits(job, config)
            number = expert if len(weights.expert_names(config)) > 1 else 0
            return weights.load(folder(), only={number}).experts[number]

        yield load
