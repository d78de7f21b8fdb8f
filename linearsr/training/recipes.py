"""Complete recipes: each function returns the whole configuration of a model's training.

    pretraining -> four experts, each on its own log-SNR range -> supervised fine-tuning
                -> perceptual fine-tuning of all experts but the first, for few steps

Every stage after the first starts from the knee of the one before (ESGF).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from linearsr.config import (
    LINEARSR_0_6B,
    LINEARSR_1_6B,
    TINY,
    Config,
    DenoiserConfig,
    LoRAConfig,
    ModelConfig,
    SamplingConfig,
    explain,
)
from linearsr.diffusion.experts import ranges
from linearsr.errors import OptionError
from linearsr.imaging.degradation import Preset
from linearsr.training.config import PerceptualConfig, TimestepConfig, TrainConfig
from linearsr.training.data import DataConfig

# Checkpoints of each expert; the knee detector needs at least nine.
CHECKPOINTS = 20

Kind = Literal["pretrain", "experts", "finetune", "perceptual"]
AnyTrain = TypeVar("AnyTrain", bound=TrainConfig)


class ValidationConfig(Config):
    """How a checkpoint is validated: on fixed pictures, with fixed seeds."""

    metrics: tuple[str, ...] = (
        *("psnr@1", "ssim@1", "vif@1", "lpips@2"),
        *("psnr@4", "niqe@4", "piqe@4"),
    )
    """pyiqa's names of the metrics, each with the number of sampling steps that make the picture,
    as in psnr@1. Metrics whose weights are missing are left out, with a message."""
    knee: dict[str, bool] = Field(
        default={"psnr@1": True, "lpips@2": False, "niqe@4": False, "piqe@4": False}
    )
    """Metrics that decide the knee; true where more is better."""
    pictures: int = Field(default=8, gt=0)
    """Number of validation pictures that are used."""
    size: int = Field(default=256, gt=0)
    """Side in pixels of the middle part of a picture that is used."""
    degradation: Preset = "clean"
    """Degradation that makes LR of the validation pictures (docs/guides/datasets.md)."""
    tags: bool = True
    """Whether a model that takes tags gets those that the default tagger finds in the LR."""

    @model_validator(mode="after")
    def _names(self) -> ValidationConfig:
        for name in self.metrics:
            split_metric(name)
        if unknown := set(self.knee) - set(self.metrics):
            raise ValueError(f"knee metrics {sorted(unknown)} are not among the metrics")
        return self


def split_metric(name: str) -> tuple[str, int]:
    """Split "psnr@1" into a metric and its steps, ("psnr", 1). Raises ValueError if it cannot."""
    metric, _, count = name.partition("@")
    if not metric or not count.isdigit() or not 1 <= int(count) <= 50:
        raise ValueError(f"{name!r}: validation metrics look like psnr@1 (pyiqa's name @ steps)")
    return metric, int(count)


class Recipe(Config):
    """One model, trained in four stages."""

    model: ModelConfig
    """Model that is trained."""
    start: str | None = None
    """Folder of weights, or the name of a bundled model, that pretraining starts from; by default,
    random weights."""
    lora: LoRAConfig | None = None
    """Shape of the adapters that all stages after pretraining train on one frozen base; by default,
    they train whole experts."""
    data: DataConfig
    """Training pairs of all stages, unless perceptual_data is set."""
    pretrain: TrainConfig
    """First stage: one model for all timesteps."""
    experts: tuple[TrainConfig, ...]
    """Second stage, for each expert, highest noise first."""
    finetune: tuple[TrainConfig, ...]
    """Third stage, for each expert: from the knee of the second."""
    perceptual: tuple[PerceptualConfig, ...] = ()
    """Fourth stage, for each expert but the first, which stays as true to the picture as it is."""
    perceptual_data: DataConfig | None = None
    """Training pairs of the perceptual stage; by default, those of the others."""
    validation: ValidationConfig = ValidationConfig()
    """How checkpoints are validated."""

    @model_validator(mode="after")
    def _experts_fit(self) -> Recipe:
        spans = ranges(self.model.sampling.boundaries)
        trained: dict[str, Sequence[TrainConfig]] = {
            "experts": self.experts,
            "finetune": self.finetune,
            "perceptual": self.perceptual,
        }
        for kind, stages in trained.items():
            trains = [(stage.timesteps.low, stage.timesteps.high) for stage in stages]
            wanted = spans[1:] if kind == "perceptual" else spans
            if trains != wanted and not (kind == "perceptual" and not trains):
                raise ValueError(
                    f"{kind}: the timesteps are {trains}, but by the model's boundaries they must "
                    f"be {wanted}; change one of the two"
                )
        return self

    @model_validator(mode="after")
    def _batches_split(self) -> Recipe:
        stages = (self.pretrain, *self.experts, *self.finetune)
        for stage in stages:
            self.data.micro_batch(1, stage.accumulation)
        for stage in self.perceptual:
            self.data_of("perceptual").micro_batch(1, stage.accumulation)
        return self

    def stage(self, kind: Kind, expert: int | None = None) -> TrainConfig:
        """Return the configuration of a stage, for one expert unless it is pretraining.

        Raises OptionError if the recipe does not have the stage.
        """
        if kind == "pretrain":
            return self.pretrain
        stages = {"experts": self.experts, "finetune": self.finetune}.get(kind, self.perceptual)
        index = self.trained(kind).index(expert or 0)
        return stages[index]

    def trained(self, kind: Kind) -> list[int]:
        """Return the experts that a stage trains, by number. Raises OptionError if it has none."""
        count = len(self.experts)
        if kind != "perceptual":
            return list(range(count))
        if count == 1:
            raise OptionError(
                f"{self.model.name}: the perceptual stage trains all experts but the first, and "
                "this recipe has only one; leave out this stage"
            )
        if not self.perceptual:
            raise OptionError(
                f"{self.model.name}: this recipe has no perceptual stage; leave it out, or set "
                "`perceptual`"
            )
        return list(range(1, count))

    def lora_of(self, kind: Kind) -> LoRAConfig | None:
        """Return the shape of the adapters that a stage trains; None if it trains all weights."""
        return None if kind == "pretrain" else self.lora

    def data_of(self, kind: Kind) -> DataConfig:
        """Return the training pairs' configuration of a stage."""
        return self.perceptual_data or self.data if kind == "perceptual" else self.data


def _experts(
    model: ModelConfig, base: AnyTrain, lengths: Sequence[int], at_one: float
) -> tuple[AnyTrain, ...]:
    """Return `base` for each expert, with its own range of timesteps and number of steps.

    lengths: steps of each expert; if there is one too few, the first expert is left out.
    Each gets CHECKPOINTS checkpoints: fewer would leave its knee undecided.
    """
    spans = ranges(model.sampling.boundaries)[-len(lengths) :]
    return tuple(
        base.model_copy(
            update={
                "steps": steps,
                "report_every": max(1, steps // (5 * CHECKPOINTS)),
                "checkpoint_every": 5 * max(1, steps // (5 * CHECKPOINTS)),
                "seed": base.seed + i,
                "timesteps": TimestepConfig(low=low, high=high, at_one=at_one),
            }
        )
        for i, (steps, (low, high)) in enumerate(zip(lengths, spans, strict=True))
    )


_PERCEPTUAL = PerceptualConfig(
    steps=1, learning_rate=3e-4, warmup=10, decay=0.3, betas=(0.5, 0.99), ema=0.998, seed=30
)


def tiny_cpu() -> Recipe:
    """The recipe of `linearsr-tiny` on a CPU: 1.5 hours of one core, without the perceptual stage.

    The first expert gets most of the steps: it alone decides the one-step result, and the structure
    every later step starts from.
    """
    expert = TrainConfig(steps=1, learning_rate=5e-4, decay=1.0, seed=10)
    polish = expert.model_copy(update={"learning_rate": 1e-4, "seed": 20, "warmup": 10})
    data = DataConfig(
        scales=(1.0, 4.0),
        degradations={"clean": 0.35, "mild": 0.15, "camera": 0.2, "seesr": 0.05, "web": 0.25},
    )
    harder = {"clean": 0.3, "mild": 0.1, "camera": 0.2, "seesr": 0.2, "web": 0.2}
    return Recipe(
        model=TINY,
        data=data,
        pretrain=TrainConfig(steps=3200, learning_rate=1.5e-3),
        experts=_experts(TINY, expert, (2500, 350, 900, 200), at_one=0.7),
        finetune=_experts(TINY, polish, (300, 100, 100, 100), at_one=1.0),
        perceptual=_experts(TINY, _PERCEPTUAL, (200, 1200, 200), at_one=0.0),
        perceptual_data=data.model_copy(update={"batch": 12, "degradations": harder}),
    )


def tiny_gpu() -> Recipe:
    """The recipe of `linearsr-tiny` on a GPU, with larger batches and for ten times as long."""
    recipe = tiny_cpu()
    base = TrainConfig(
        steps=30_000,
        learning_rate=2e-3,
        warmup=500,
        ema=0.9995,
        bfloat16=True,
        checkpoint_every=1000,
    )
    expert = base.model_copy(update={"learning_rate": 5e-4, "decay": 1.0, "seed": 10})
    polish = expert.model_copy(update={"learning_rate": 1e-4, "seed": 20})
    judged = _PERCEPTUAL.model_copy(update={"bfloat16": True})
    data = recipe.data_of("perceptual").model_copy(update={"patch": 192, "batch": 32})
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"patch": 192, "batch": 64}),
            "pretrain": base,
            "experts": _experts(TINY, expert, (20_000, 5000, 10_000, 5000), at_one=0.7),
            "finetune": _experts(TINY, polish, (4000, 2000, 2000, 2000), at_one=1.0),
            "perceptual": _experts(TINY, judged, (2000, 10_000, 2000), at_one=0.0),
            "perceptual_data": data,
        }
    )


def _sana(model: ModelConfig) -> Recipe:
    """Train at the paper's scale: 224k steps of 1024 px, a checkpoint every 8k, Real-ESRGAN.

    The preset `web`, scales below 4 and the perceptual stage are additions to the paper. The last
    expert's fine-tuning decodes whole pictures with gradients, so a worker takes its pairs in two
    parts (`linearsr job plan` has the memory).
    """
    base = TrainConfig(
        steps=224_000,
        learning_rate=1e-4,
        warmup=2000,
        decay=0.0,
        ema=0.9999,
        timesteps=TimestepConfig(mean=0.0, at_one=0.0),
        bfloat16=True,
        report_every=100,
        checkpoint_every=8000,
    )
    expert = base.model_copy(update={"learning_rate": 2e-5, "decay": 1.0, "seed": 10})
    polish = expert.model_copy(update={"learning_rate": 5e-6, "seed": 20, "pixel_weight": 0.1})
    judged = _PERCEPTUAL.model_copy(
        update={"learning_rate": 5e-6, "ema": 0.999, "bfloat16": True, "crop": 8}
    )
    finetune = _experts(model, polish, (10_000,) * 4, at_one=0.0)
    data = DataConfig(
        patch=1024,
        batch=32,
        scales=(1.0, 4.0),
        degradations={"real-esrgan": 0.4, "seesr": 0.4, "web": 0.2},
    )
    return Recipe(
        model=model,
        data=data,
        pretrain=base,
        experts=_experts(model, expert, (40_000,) * 4, at_one=0.0),
        finetune=(*finetune[:-1], finetune[-1].model_copy(update={"accumulation": 2})),
        perceptual=_experts(model, judged, (4000, 10_000, 4000), at_one=0.0),
        validation=ValidationConfig(
            metrics=(
                "psnr@20",
                "ssim@20",
                "lpips@2",
                "niqe@20",
                "musiq@20",
                "maniqa@20",
                "clipiqa@20",
            ),
            knee={"musiq@20": True, "maniqa@20": True, "niqe@20": False},
            pictures=64,
            size=1024,
            degradation="real-esrgan",
        ),
    )


def sana_0_6b() -> Recipe:
    """The recipe of `linearsr-0.6b`, from Sana-600M weights of `linearsr.weights.convert`."""
    return _sana(LINEARSR_0_6B)


def sana_1_6b() -> Recipe:
    """The recipe of `linearsr-1.6b`, from Sana-1.6B weights of `linearsr.weights.convert`."""
    return _sana(LINEARSR_1_6B)


def smoke() -> Recipe:
    """All stages in two minutes on two cores, to see that they run; the weights are of no use.

    The model has two experts. LPIPS is left out, so no download is needed.
    """
    sizes = DenoiserConfig(
        latent_channels=48,
        depth=2,
        width=32,
        head_dim=16,
        local_kernel=3,
        stem_channels=(8, 8, 8),
        stem_strides=(2, 2, 1),
        condition_latent=True,
        prediction="preconditioned",
    )
    sampling = SamplingConfig(steps=2, boundaries=(0.5,))
    model = ModelConfig(name="smoke", denoiser=sizes, latent=TINY.latent, sampling=sampling)
    base = TrainConfig(steps=10, warmup=2, report_every=1, checkpoint_every=5)
    judged = _PERCEPTUAL.model_copy(
        update={"warmup": 2, "lpips": 0.0, "channels": (8, 8, 8, 8, 8), "gan_warmup": 2}
    )
    return Recipe(
        model=model,
        data=tiny_cpu().data.model_copy(update={"patch": 32, "batch": 4, "margin": 8}),
        pretrain=base,
        experts=_experts(model, base, (5, 5), at_one=0.7),
        finetune=_experts(model, base, (5, 5), at_one=1.0),
        perceptual=_experts(model, judged, (5,), at_one=0.0),
        validation=ValidationConfig(
            metrics=("psnr@1",), knee={"psnr@1": True}, pictures=1, size=64
        ),
    )


RECIPES = {f.__name__: f for f in (smoke, tiny_cpu, tiny_gpu, sana_0_6b, sana_1_6b)}


def override(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """Return `recipe` with fields replaced by "a.b.c=value"; values are JSON, or else plain text.

    A number in the path picks an element, as in "experts.0.steps=100". Raises OptionError for a
    field that does not exist or a value that it cannot take.
    """
    fields = recipe.model_dump()
    for setting in settings:
        path, equals, value = setting.partition("=")
        if not equals:
            raise OptionError(f"{setting!r}: settings look like pretrain.steps=100")
        _replace(fields, path, _parse(value))
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        place, message = explain(error)
        raise OptionError(f"{place}: {message}" if place else message) from error


def _replace(fields: object, path: str, value: object) -> None:
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    try:
        for key in parents:
            fields = fields[key]  # type: ignore[index]
        if isinstance(fields, tuple):
            raise OptionError(
                f"{path}: an element of a list cannot be set as a whole; give the whole list, or a "
                "field of the element, as in experts.0.steps=100"
            )
        fields[last]  # type: ignore[index]
    except (KeyError, IndexError, TypeError):
        raise OptionError(f"{path}: no such field in the recipe") from None
    fields[last] = value  # type: ignore[index]


def _parse(value: str) -> object:
    try:
        return json.loads(value)
    except ValueError:
        return value
