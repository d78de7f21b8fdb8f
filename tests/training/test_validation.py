"""Validation uses the same pictures, LR and noise every time; missing metrics are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from pydantic import ValidationError

from linearsr import weights
from linearsr.config import ModelConfig
from linearsr.training import export, plot
from linearsr.training.recipes import ValidationConfig
from linearsr.training.validation import validate
from tests.helpers.experts import random_experts


@pytest.fixture(scope="module")
def pictures() -> list[tuple[str, torch.Tensor]]:
    photo = torch.from_numpy(np.asarray(skimage.data.astronaut())).permute(2, 0, 1).float() / 255
    return [("a.png", photo[:, :96, :96]), ("b.png", photo[:, 96:200, 64:160])]


def test_the_default_metrics_are_measured_the_same_each_time(
    small_bundle: Path, pictures: list[tuple[str, torch.Tensor]]
) -> None:
    """The metrics compare with the true picture (vif among them) or do without it."""
    config = ValidationConfig(
        metrics=("psnr@1", "ssim@1", "vif@1", "psnr@2", "piqe@2"), knee={"psnr@1": True}, size=64
    )
    skipped: list[str] = []
    model, experts, _ = weights.load(small_bundle)
    load = experts.__getitem__
    first, strip = validate(model, load, pictures, config, skipped=skipped.append)
    again, _ = validate(model, load, list(reversed(pictures)), config, skipped=skipped.append)
    assert first == pytest.approx(again) and set(first) == set(config.metrics) and not skipped
    assert 5 < first["psnr@1"] < 50 and first["psnr@1"] != first["psnr@2"]
    assert strip.shape == (3, 2 * 64, 4 * 64)  # LR, one step, two steps, HR


def test_an_unavailable_metric_is_named_once_and_left_out(
    small_bundle: Path, pictures: list[tuple[str, torch.Tensor]]
) -> None:
    config = ValidationConfig(
        metrics=("psnr@1", "nometric@1"), knee={"psnr@1": True, "nometric@1": True}, size=32
    )
    skipped: list[str] = []
    model, experts, _ = weights.load(small_bundle)
    load = experts.__getitem__
    metrics, _ = validate(model, load, pictures, config, skipped=skipped.append)
    assert set(metrics) == {"psnr@1"}
    assert len(skipped) == 1 and "nometric@1" in skipped[0]


def test_a_model_that_takes_tags_is_judged_with_the_taggers(
    tagged_config: ModelConfig, pictures: list[tuple[str, torch.Tensor]]
) -> None:
    """The tags of the tagger must reach the model; the face of a cat has some."""
    cat = torch.from_numpy(np.asarray(skimage.data.chelsea())).permute(2, 0, 1).float() / 255
    config = ValidationConfig(metrics=("psnr@1",), knee={"psnr@1": True}, size=300)
    single = export.single(tagged_config)
    load = random_experts(single, 1).__getitem__
    psnr = {
        tags: validate(single, load, [("cat.png", cat)], config.model_copy(update={"tags": tags}))[
            0
        ]
        for tags in (True, False)
    }
    assert psnr[True] != psnr[False]


@pytest.mark.parametrize(
    "changes",
    [
        {"metrics": ("psnr",)},
        {"metrics": ("psnr@0",)},
        {"knee": {"niqe@9": False}},
        {"degradation": "fog"},
    ],
)
def test_unknown_metric_names_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ValidationConfig.model_validate(changes)


@pytest.mark.parametrize("knee", [None, 20])
def test_a_report_is_drawn_even_for_a_run_without_validations(knee: int | None) -> None:
    history = [{"step": s, "loss": 1 / s, "gradient_norm": 1.0} for s in (10, 20, 30)]
    for validated in ([], [{"step": 20.0, "psnr@1": 25.0}]):
        assert plot.report("run", history, validated, knee, "candidate").startswith(b"\x89PNG")
