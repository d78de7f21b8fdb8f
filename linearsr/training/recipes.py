"""Complete recipes: each function returns everything a run needs, and nothing else decides."""

from __future__ import annotations

from linearsr.config import TINY, Config, ModelConfig
from linearsr.noise.experts import ranges
from linearsr.training.data import DataConfig
from linearsr.training.loop import TimestepConfig, TrainConfig


class Recipe(Config):
    """One model trained in two stages: all noise levels, then an expert for each range of them."""

    model: ModelConfig
    data: DataConfig
    pretrain: TrainConfig
    experts: tuple[TrainConfig, ...]


def tiny_cpu() -> Recipe:
    """`linearsr-tiny` on a CPU: the lengths and rates of the bundled weights (see their card).

    The first expert is given most of the steps: it alone decides the one-step result, and the
    structure every later step starts from.
    """
    lengths = (2500, 350, 880, 200)
    experts = [
        TrainConfig(
            steps=steps,
            learning_rate=5e-4,
            decay=1.0,
            seed=10 + i,
            timesteps=TimestepConfig(low=low, high=high, at_one=0.7),
        )
        for i, (steps, (low, high)) in enumerate(
            zip(lengths, ranges(TINY.sampling.boundaries), strict=True)
        )
    ]
    return Recipe(
        model=TINY,
        data=DataConfig(),
        pretrain=TrainConfig(steps=3200, learning_rate=1.5e-3),
        experts=tuple(experts),
    )


RECIPES = {"tiny_cpu": tiny_cpu}
