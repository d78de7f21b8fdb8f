"""Bundles on disk: round trips, and every kind of damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from linearsr import weights
from linearsr.config import ModelConfig
from linearsr.denoiser import LinearSR
from linearsr.errors import WeightsError
from tests.helpers.experts import random_experts


@pytest.fixture
def folder(small_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_bundle, tmp_path / "copy"))


def _rewrite(path: Path, change: dict[str, torch.Tensor]) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({**load_file(path), **change}, path, metadata)


def test_round_trip_keeps_tensors_config_and_provenance(
    small_bundle: Path, small_config: ModelConfig
) -> None:
    bundle = weights.load(small_bundle)
    assert bundle.config == small_config
    assert bundle.provenance == {"licence": "test"}
    for model, original in zip(bundle.experts, random_experts(small_config, 4), strict=True):
        for (name, ours), theirs in zip(
            model.state_dict().items(), original.state_dict().values(), strict=True
        ):
            assert torch.equal(ours, theirs), name


def test_a_model_without_boundaries_is_one_file(small_config: ModelConfig, tmp_path: Path) -> None:
    sampling = small_config.sampling.model_copy(update={"boundaries": ()})
    config = small_config.model_copy(update={"sampling": sampling})
    weights.save(tmp_path, config, [LinearSR(config.denoiser).state_dict()], {})
    assert len(weights.load(tmp_path).experts) == 1


def test_unknown_model_names_the_known_ones() -> None:
    with pytest.raises(WeightsError, match="linearsr-tiny"):
        weights.load("no-such-model")


def test_missing_expert_is_named(folder: Path) -> None:
    (folder / "texture.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"texture\.safetensors.*missing"):
        weights.load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(folder: Path, value: float) -> None:
    bias = load_file(folder / "polish.safetensors")["out.bias"]
    bias[3] = value
    _rewrite(folder / "polish.safetensors", {"out.bias": bias})
    with pytest.raises(WeightsError, match=r"polish.*out\.bias"):
        weights.load(folder)


def test_wrong_shape_is_named(folder: Path) -> None:
    _rewrite(folder / "structure.safetensors", {"out.bias": torch.zeros(7)})
    with pytest.raises(WeightsError, match=r"structure.*out\.bias"):
        weights.load(folder)


def test_unexpected_tensor_is_named(folder: Path) -> None:
    _rewrite(folder / "structure.safetensors", {"surprise": torch.zeros(7)})
    with pytest.raises(WeightsError, match="surprise"):
        weights.load(folder)


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\xff" * 64])
def test_damaged_file_is_named(folder: Path, content: bytes) -> None:
    (folder / "structure.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=r"structure\.safetensors"):
        weights.load(folder)


def test_truncated_file_is_named(folder: Path) -> None:
    path = folder / "texture.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=r"texture\.safetensors"):
        weights.load(folder)


def test_safetensors_without_our_config_are_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="convert"):
        weights.load(tmp_path)


def test_experts_of_two_models_do_not_mix(
    folder: Path, small_config: ModelConfig, tmp_path: Path
) -> None:
    other = small_config.model_copy(update={"name": "other"})
    experts = [m.state_dict() for m in random_experts(other, 4)]
    weights.save(tmp_path / "other", other, experts, {})
    shutil.copy(tmp_path / "other" / "polish.safetensors", folder)
    with pytest.raises(WeightsError, match="do not mix"):
        weights.load(folder)


def test_saving_refuses_weights_that_are_not_finite(
    small_config: ModelConfig, tmp_path: Path
) -> None:
    experts = [m.state_dict() for m in random_experts(small_config, 4)]
    experts[2]["out.bias"][0] = torch.nan
    with pytest.raises(WeightsError, match="texture"):
        weights.save(tmp_path / "bad", small_config, experts, {})
    assert not (tmp_path / "bad" / "texture.safetensors").exists()


def test_the_bundled_model_has_all_experts_and_is_small() -> None:
    assert "linearsr-tiny" in weights.available()
    folder = weights.find("linearsr-tiny")
    assert sum(f.stat().st_size for f in folder.glob("*.safetensors")) <= 24e6
    bundle = weights.load("linearsr-tiny")
    assert len(bundle.experts) == 4
    assert {"data", "licence", "steps"} <= set(bundle.provenance)


def test_lazy_experts_are_loaded_when_they_are_read_and_not_kept() -> None:
    loaded: list[int] = []

    def load(number: int) -> dict[str, torch.Tensor]:
        loaded.append(number)
        return {"weight": torch.tensor(float(number))}

    experts = weights.LazyExperts(4, load)
    assert len(experts) == 4 and loaded == []
    assert experts[-1]["weight"] == 3 and experts[3]["weight"] == 3
    assert [float(one["weight"]) for one in experts[1:3]] == [1, 2] and loaded == [3, 3, 1, 2]
    assert len(list(experts)) == 4
    with pytest.raises(IndexError):
        experts[4]
