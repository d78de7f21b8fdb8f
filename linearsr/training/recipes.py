"""Complete recipes: each function returns everything a run needs, and nothing else decides.

    pretraining -> four experts, each on its own log-SNR range -> supervised fine-tuning

Every stage after the first starts from the knee of the one before (ESGF).
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from pydantic import Field, ValidationError, model_validator

from linearsr.config import LINEARSR_0_6B, LINEARSR_1_6B, TINY, Config, ModelConfig
from linearsr.errors import OptionError
from linearsr.imaging.degrade import Preset
from linearsr.noise.experts import ranges
from linearsr.training.config import TimestepConfig, TrainConfig
from linearsr.training.data import DataConfig

# Of each expert. The detector needs nine and more to judge.
CHECKPOINTS = 20


class ValidationConfig(Config):
    """How a checkpoint is judged: fixed pictures, fixed seeds."""

    metrics: tuple[str, ...] = ("psnr@1", "ssim@1", "vif@1", "psnr@4", "niqe@4", "piqe@4")
    """pyiqa names with the sampling steps they are taken at; those whose weights cannot be had are
    left out and named."""
    knee: dict[str, bool] = Field(default={"psnr@1": True, "niqe@4": False, "piqe@4": False})
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
    """One model, trained in three stages."""

    model: ModelConfig
    start: str | None = None
    """Weights folder or bundled name to start pretraining from; without, from random weights."""
    data: DataConfig
    pretrain: TrainConfig
    experts: tuple[TrainConfig, ...]
    finetune: tuple[TrainConfig, ...]
    validation: ValidationConfig = ValidationConfig()

    @model_validator(mode="after")
    def _experts_fit(self) -> Recipe:
        spans = ranges(self.model.sampling.boundaries)
        for kind, stages in (("experts", self.experts), ("finetune", self.finetune)):
            trained = [(stage.timesteps.low, stage.timesteps.high) for stage in stages]
            if trained != spans:
                raise ValueError(f"{kind} train timesteps {trained}, the boundaries say {spans}")
        return self


def _experts(
    model: ModelConfig, base: TrainConfig, lengths: Sequence[int], at_one: float
) -> tuple[TrainConfig, ...]:
    """`base` for each expert, on its own range of timesteps and for its own number of steps.

    Each gets CHECKPOINTS checkpoints: fewer would leave its knee undecided.
    """
    spans = ranges(model.sampling.boundaries)
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


def tiny_cpu() -> Recipe:
    """`linearsr-tiny` on a CPU: an hour and a half of one core.

    The first expert is given most of the steps: it alone decides the one-step result, and the
    structure every later step starts from.
    """
    expert = TrainConfig(steps=1, learning_rate=5e-4, decay=1.0, seed=10)
    polish = expert.model_copy(update={"learning_rate": 1e-4, "seed": 20, "warmup": 10})
    return Recipe(
        model=TINY,
        data=DataConfig(),
        pretrain=TrainConfig(steps=3200, learning_rate=1.5e-3),
        experts=_experts(TINY, expert, (2500, 350, 900, 200), at_one=0.7),
        finetune=_experts(TINY, polish, (300, 100, 100, 100), at_one=1.0),
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
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"patch": 192, "batch": 64}),
            "pretrain": base,
            "experts": _experts(TINY, expert, (20_000, 5000, 10_000, 5000), at_one=0.7),
            "finetune": _experts(TINY, polish, (4000, 2000, 2000, 2000), at_one=1.0),
        }
    )


def _sana(model: ModelConfig) -> Recipe:
    """Paper's scale: 224k steps of pretraining with a checkpoint every 8k; 1024 px, Real-ESRGAN."""
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
    return Recipe(
        model=model,
        data=DataConfig(patch=1024, batch=32, degradations={"real-esrgan": 0.5, "seesr": 0.5}),
        pretrain=base,
        experts=_experts(model, expert, (40_000,) * 4, at_one=0.0),
        finetune=_experts(model, polish, (10_000,) * 4, at_one=0.0),
        validation=ValidationConfig(
            metrics=("psnr@20", "ssim@20", "niqe@20", "musiq@20", "maniqa@20", "clipiqa@20"),
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
