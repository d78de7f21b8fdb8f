"""The weights that a stage of training starts with, one expert at a time."""

from __future__ import annotations

from functools import cached_property

from torch import Tensor

from linearsr import weights
from linearsr.config import LoRAConfig, ModelConfig
from linearsr.denoiser import LinearSR
from linearsr.digests import digest_tensors
from linearsr.distributed.models import local_folder, read_config, read_lora
from linearsr.distributed.train.config import StageConfig
from linearsr.errors import OptionError
from linearsr.training.lora import Origin, inject


def check_start(job: StageConfig) -> None:
    """Check the config of the starting weights, if there are any, against the recipe.

    It loads no weights. Raises WeightsError if there is no bundle, and OptionError if it does not
    fit the recipe.
    """
    if job.start is not None:
        _check_fits(job, read_config(job.start), read_lora(job.start))


def _check_fits(job: StageConfig, config: ModelConfig, adapters: LoRAConfig | None) -> None:
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
    if job.lora is None:
        return
    if adapters is None and count > 1:
        raise OptionError(
            f"{job.start}: lora trains adapters on one base, but these weights are {count} whole "
            "experts; start from a pretraining run, or leave out lora"
        )
    if adapters is not None and adapters != job.lora:
        raise OptionError(
            f"{job.start}: the adapters of these weights have another shape than the recipe's; "
            f"set lora={adapters.model_dump_json()}"
        )


class Start:
    """The experts that a stage starts with.

    Each call reads the file anew and keeps nothing, so a process holds no more experts than its
    caller keeps. The calls raise WeightsError for a damaged file, and what `check_start` raises.
    """

    def __init__(self, job: StageConfig) -> None:
        self.job = job

    @cached_property
    def _folder(self) -> str:
        """The starting weights on this machine."""
        return local_folder(str(self.job.start))

    def expert(self, number: int) -> LinearSR:
        """Load an expert in float32, its adapters merged into it.

        Starting weights without experts give the same model for every number.
        """
        folder, number = self._folder, self._number(number)
        return weights.load(folder, only={number}).experts[number]

    def base(self) -> LinearSR:
        """Load the base of all experts in float32."""
        return weights.load_base(self._folder)

    def adapters(self, number: int) -> dict[str, Tensor] | None:
        """Load the adapters of an expert; None if it is the base itself."""
        return weights.load_adapters(self._folder, self._number(number))

    def adapted(self, number: int, lora: LoRAConfig) -> tuple[LinearSR, Origin]:
        """Load an expert whose adapters are to be trained, and say where its base is."""
        base = self.base()
        origin = Origin(lora, digest_tensors(base.state_dict()), str(self.job.start))
        return inject(base, lora, self.adapters(number)), origin

    def _number(self, expert: int) -> int:
        folder = self._folder
        config = weights.read_config(folder)
        _check_fits(self.job, config, weights.read_lora(folder))
        return expert if len(weights.expert_names(config)) > 1 else 0
