"""Recipes are complete and consistent, and every field can be overridden."""

from __future__ import annotations

import pytest

from linearsr.denoiser import LinearSR
from linearsr.diffusion.experts import ranges
from linearsr.errors import OptionError
from linearsr.training.recipes import RECIPES, override


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_train_each_expert_on_its_own_range(name: str) -> None:
    recipe = RECIPES[name]()
    for stage in (recipe.experts, recipe.finetune):
        spans = [(e.timesteps.low, e.timesteps.high) for e in stage]
        assert spans == ranges(recipe.model.sampling.boundaries)
    judged = [recipe.stage("perceptual", i) for i in recipe.trained("perceptual")]
    spans = [(e.timesteps.low, e.timesteps.high) for e in judged]
    assert spans == ranges(recipe.model.sampling.boundaries)[1:]
    assert recipe.data.scales == (1, 4) and recipe.data.degradations["web"] > 0
    assert set(recipe.validation.knee) <= set(recipe.validation.metrics)
    if recipe.model.denoiser.width < 500:
        LinearSR(recipe.model.denoiser)


def test_any_field_can_be_overridden() -> None:
    recipe = override(
        RECIPES["tiny_cpu"](),
        [
            "pretrain.steps=7",
            "experts.1.learning_rate=1e-5",
            "start=/some/folder",
            'data.degradations={"clean": 1.0}',
            "pretrain.bfloat16=true",
        ],
    )
    assert recipe.pretrain.steps == 7 and recipe.experts[1].learning_rate == 1e-5
    assert recipe.start == "/some/folder" and recipe.data.degradations == {"clean": 1.0}
    assert recipe.pretrain.bfloat16 and recipe.experts[0] == RECIPES["tiny_cpu"]().experts[0]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("pretrain.stepz=7", "pretrain.stepz: no such field"),
        ("experts.9.steps=7", "no such field"),
        ("pretrain.steps", "look like"),
        ("pretrain.steps=many", "pretrain.steps: .*integer"),
        ("pretrain.steps.more=1", "no such field"),
        ("data.patch=97", "multiples"),
        ("experts=3", "experts"),
        ("pretrain.accumulation=0", "accumulation: .*greater than or equal to 1"),
        ("pretrain.accumulation=3", r"data\.batch 8 cannot be shared .* with accumulation 3"),
        ("perceptual.1.accumulation=8", r"data\.batch 12 cannot .* with accumulation 8"),
        ("pretrain.checkpoint_every=75", "multiple of report_every"),
    ],
)
def test_bad_settings_are_refused_by_name(setting: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        override(RECIPES["tiny_cpu"](), [setting])


def test_stages_are_found_by_the_experts_that_they_train() -> None:
    recipe = RECIPES["tiny_cpu"]()
    assert recipe.trained("experts") == [0, 1, 2, 3] and recipe.trained("perceptual") == [1, 2, 3]
    assert recipe.stage("perceptual", 3) is recipe.perceptual[2]
    assert recipe.stage("finetune", 3) is recipe.finetune[3]
    assert recipe.stage("pretrain") is recipe.pretrain
    assert recipe.data_of("perceptual").batch == 12 and recipe.data_of("finetune").batch == 8
    without = override(recipe, ["perceptual=[]", "perceptual_data=null"])
    assert without.data_of("perceptual") == without.data
    with pytest.raises(OptionError, match="no perceptual stage"):
        without.trained("perceptual")
    with pytest.raises(OptionError, match="has only one"):
        without.model_copy(update={"experts": recipe.experts[:1]}).trained("perceptual")
    with pytest.raises(OptionError, match="perceptual: the timesteps are"):
        override(recipe, ["perceptual.0.timesteps.high=0.9"])
