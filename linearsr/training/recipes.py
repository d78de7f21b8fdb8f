"""Complete recipes: each function returns everything a run needs, and nothing else decides.

    pretraining -> four experts, each on its own log-SNR range -> supervised fine-tuning
                -> perceptual fine-tuning of all experts but the first, for few steps

Every stage after the first starts from the knee of the one before (ESGF).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from linearsr.config import LINEARSR_0_6B, LINEARSR_1_6B, TINY, Config, ModelConfig
from linearsr.diffusion.experts import ranges
from linearsr.errors import OptionError
from linearsr.imaging.degradation import Preset
from linearsr.training.config import PerceptualConfig, TimestepConfig, TrainConfig
from linearsr.training.data import DataConfig

# Of each expert. The detector needs nine and more to judge.
CHECKPOINTS = 20

Kind = Literal["pretrain", "experts", "finetune", "perceptual"]
AnyTrain = TypeVar("AnyTrain", bound=TrainConfig)


class ValidationConfig(Config):
    """How a checkpoint is judged: fixed pictures, fixed seeds."""

    metrics: tuple[str, ...] = (
        *("psnr@1", "ssim@1", "vif@1", "lpips@2"),
        *("psnr@4", "niqe@4", "piqe@4"),
    )
    """pyiqa names with the sampling steps they are taken at; those whose weights cannot be had are
    left out and named."""
    knee: dict[str, bool] = Field(
        default={"psnr@1": True, "lpips@2": False, "niqe@4": False, "piqe@4": False}
    )
    """Which of them tell the knee, and whether more is better."""
    pictures: int = Field(default=8, gt=0)
    """How many of the validation pictures are used."""
    size: int = Field(default=256, gt=0)
    """Side in pixels that they are cut to, from the middle."""
    degradation: Preset = "clean"
    """How their LR is made."""
    tags: bool = True
    """Whether a model that takes tags is given the default tagger's, of the LR picture."""

    @model_validator(mode="after")
    def _names(self) -> ValidationConfig:
        for name in self.metrics:
            split_metric(name)
        if unknown := set(self.knee) - set(self.metrics):
            raise ValueError(f"knee metrics {sorted(unknown)} are not among the metrics")
        return self


def split_metric(name: str) -> tuple[str, int]:
    """ "psnr@1" as ("psnr", 1). Raises ValueError for anything else."""
    metric, _, count = name.partition("@")
    if not metric or not count.isdigit() or not 1 <= int(count) <= 50:
        raise ValueError(f"{name!r}: validation metrics look like psnr@1 (pyiqa's name @ steps)")
    return metric, int(count)


class Recipe(Config):
    """One model, trained in four stages."""

    model: ModelConfig
    start: str | None = None
    """Weights folder or bundled name to start pretraining from; without, from random weights."""
    data: DataConfig
    pretrain: TrainConfig
    experts: tuple[TrainConfig, ...]
    finetune: tuple[TrainConfig, ...]
    perceptual: tuple[PerceptualConfig, ...] = ()
    """Of all experts but the first, which stays as true to the picture as it is."""
    perceptual_data: DataConfig | None = None
    """The data of the perceptual stage; without, that of the others."""
    validation: ValidationConfig = ValidationConfig()

    @model_validator(mode="after")
    def _experts_fit(self) -> Recipe:
        spans = ranges(self.model.sampling.boundaries)
        trained: dict[str, Sequence[TrainConfig]] = {
            "experts": self.experts,
            "finetune": self.finetune,
            "perceptual": self.perceptual,
        }
        for kind, stages in trained.items():
            found = [(stage.timesteps.low, stage.timesteps.high) for stage in stages]
            wanted = spans[1:] if kind == "perceptual" else spans
            if found != wanted and not (kind == "perceptual" and not found):
                raise ValueError(f"{kind} train timesteps {found}, the boundaries say {wanted}")
        return self

    def stage(self, kind: Kind, expert: int | None = None) -> TrainConfig:
        """The configuration of one stage, of the expert that it trains.

        Raises OptionError for a stage that the recipe does not have.
        """
        if kind == "pretrain":
            return self.pretrain
        stages = {"experts": self.experts, "finetune": self.finetune}.get(kind, self.perceptual)
        index = self.trained(kind).index(expert or 0)
        return stages[index]

    def trained(self, kind: Kind) -> list[int]:
        """The experts that a stage trains. Raises OptionError for a stage without any."""
        count = len(self.experts)
        if kind != "perceptual":
            return list(range(count))
        if not self.perceptual:
            raise OptionError(
                f"{self.model.name}: this recipe has no perceptual stage, or only one expert"
            )
        return list(range(1, count))

    def data_of(self, kind: Kind) -> DataConfig:
        """The data that a stage is trained on."""
        return self.perceptual_data or self.data if kind == "perceptual" else self.data


def _experts(
    model: ModelConfig, base: AnyTrain, lengths: Sequence[int], at_one: float
) -> tuple[AnyTrain, ...]:
    """`base` for each expert, on its own range of timesteps and for its own number of steps.

    With a length less than there are experts, the first is left out.

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
    """`linearsr-tiny` on a CPU: an hour and a half of one core, without the perceptual stage.

    The first expert is given most of the steps: it alone decides the one-step result, and the
    structure every later step starts from.
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
    """`linearsr-tiny` on one GPU: larger batches and ten times as long."""
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
    """Paper's scale: 224k steps of pretraining with a checkpoint every 8k; 1024 px, Real-ESRGAN.

    Pictures from the web and smaller scales are ours, as is the perceptual stage.
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
        finetune=_experts(model, polish, (10_000,) * 4, at_one=0.0),
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
    """`linearsr-0.6b`; set `start` to Sana-600M weights converted by `linearsr.weights.convert`."""
    return _sana(LINEARSR_0_6B)


def sana_1_6b() -> Recipe:
    """`linearsr-1.6b`; set `start` to Sana-1.6B weights converted by `linearsr.weights.convert`."""
    return _sana(LINEARSR_1_6B)


RECIPES = {f.__name__: f for f in (tiny_cpu, tiny_gpu, sana_0_6b, sana_1_6b)}


def override(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """`recipe` with fields replaced by "a.b.c=value"; values are JSON, or else plain text.

    A number in the path picks an element, as in "experts.0.steps=100". Raises OptionError for a
    field that does not exist or a value it cannot take.
    """
    fields = recipe.model_dump()
    for setting in settings:
        path, found, value = setting.partition("=")
        if not found:
            raise OptionError(f"{setting!r}: settings look like pretrain.steps=100")
        _replace(fields, path, _parse(value))
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise OptionError(f"{where}: {first['msg']} (got {first['input']!r})") from error


def _replace(fields: object, path: str, value: object) -> None:
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    try:
        for key in parents:
            fields = fields[key]  # type: ignore[index]
        if isinstance(fields, tuple):
            raise OptionError(f"{path}: give the whole list, or a field of one of its elements")
        fields[last]  # type: ignore[index]
    except (KeyError, IndexError, TypeError):
        raise OptionError(f"{path}: no such field in the recipe") from None
    fields[last] = value  # type: ignore[index]


def _parse(value: str) -> object:
    try:
        return json.loads(value)
    except ValueError:
        return value
