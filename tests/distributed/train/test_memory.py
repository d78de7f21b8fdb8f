"""Each process holds one expert at a time; counted on a narrow model, without a cluster."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.train import Checkpoint
from safetensors import safe_open
from torch import Tensor

from linearsr import weights
from linearsr.denoiser import LinearSR
from linearsr.diffusion.experts import EXPERTS
from linearsr.distributed.train import trainer
from linearsr.distributed.train.config import StageConfig
from linearsr.distributed.train.esgf import write_bundle
from linearsr.distributed.train.start import check_start
from linearsr.distributed.train.validation import validate_checkpoint
from linearsr.errors import OptionError
from linearsr.storage.location import locate
from linearsr.training import loop
from linearsr.training.ema import EMA
from linearsr.training.engine import TorchEngine
from linearsr.training.guard import Diverged
from linearsr.training.recipes import Recipe, override
from tests.helpers.experts import random_experts
from tests.helpers.runs import stage_of

CPU = torch.device("cpu")


class Peak:
    """The largest number of bytes alive just after weights were loaded or written."""

    def __init__(self) -> None:
        self.baseline = self._bytes()
        self.experts, self.bytes = 0, 0

    def look(self) -> None:
        self.bytes = max(self.bytes, self._bytes() - self.baseline)
        self.experts = max(self.experts, sum(not m.embed.weight.is_meta for m in self._models()))

    @staticmethod
    def _models() -> list[LinearSR]:
        gc.collect()
        return [m for m in gc.get_objects() if type(m) is LinearSR]

    @staticmethod
    def _bytes() -> int:
        gc.collect()
        kinds = (Tensor, torch.nn.Parameter)
        tensors = [t for t in gc.get_objects() if type(t) in kinds and t.device == CPU]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())


@pytest.fixture
def peak(monkeypatch: pytest.MonkeyPatch) -> Iterator[Peak]:
    # Objects that exist already are neither counted nor looked at again: that takes seconds in a
    # process with all tests.
    gc.freeze()
    peak = Peak()

    def after(target: str) -> None:
        module, _, name = target.rpartition(".")
        original = pytest.importorskip(module).__dict__[name]

        def looked_at(*arguments: Any, **named: Any) -> Any:
            result = original(*arguments, **named)
            peak.look()
            return result

        monkeypatch.setattr(target, looked_at)

    for target in ("training.export.load", "training.export.load_average"):
        after(f"linearsr.{target}")
    for target in ("_load_expert", "save_file"):
        after(f"linearsr.weights.bundle.{target}")
    yield peak
    gc.unfreeze()


@pytest.fixture(scope="module")
def wide(recipe: Recipe) -> Recipe:
    """A bundle whose weights are much larger than the tensors of a small picture."""
    fields = ("model.denoiser.width=192", 'validation.metrics=["psnr@4"]')
    return override(recipe, [*fields, 'validation.knee={"psnr@4": true}'])


@pytest.fixture(scope="module")
def start(wide: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    experts = [m.state_dict() for m in random_experts(wide.model, 4)]
    weights.save(folder, wide.model, experts, {}, dtype=torch.float32)
    return folder


@pytest.fixture(scope="module")
def size(wide: Recipe) -> int:
    """The bytes of one expert in float32."""
    with torch.device("meta"):
        return 4 * sum(p.numel() for p in LinearSR(wide.model.denoiser).parameters())


@pytest.fixture(scope="module")
def checkpoint(wide: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    EMA(LinearSR(wide.model.denoiser), 0.9, 0, 1).save(folder)
    return folder


def _stage(
    wide: Recipe, photos: Path, storage: Path, start: Path, expert: int | None, kind: str
) -> StageConfig:
    stage = stage_of(wide, photos, storage, "run")
    fields = {**stage.model_dump(), "start": str(start), "expert": expert, "kind": kind}
    return StageConfig.model_validate(fields)


def test_checking_a_start_loads_no_weights(
    wide: Recipe, photos: Path, tmp_path: Path, start: Path, peak: Peak
) -> None:
    check_start(_stage(wide, photos, tmp_path, start, 2, "experts"))
    other = override(wide, ["model.denoiser.depth=3"])
    with pytest.raises(OptionError, match="denoiser config of these weights differs"):
        check_start(_stage(other, photos, tmp_path, start, 2, "experts"))
    peak.look()
    assert (peak.experts, peak.bytes) == (0, 0)


def test_a_start_with_another_number_of_experts_is_refused(
    wide: Recipe, photos: Path, tmp_path: Path, start: Path
) -> None:
    stage = _stage(wide, photos, tmp_path, start, 1, "experts")
    two = wide.model_copy(update={"experts": wide.experts[:2]})
    with pytest.raises(OptionError, match="have 4 experts and the recipe has 2"):
        check_start(stage.model_copy(update={"recipe": two}))


def test_the_driver_exports_one_expert_at_a_time(
    wide: Recipe, checkpoint: Path, tmp_path: Path, size: int, peak: Peak
) -> None:
    write_bundle(locate(tmp_path / "out"), wide.model, [locate(checkpoint)] * 4, {})
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 4
    # The expert in float32, and at the end its copy in bfloat16.
    assert size <= peak.bytes < 2 * size and peak.experts == 1


@pytest.mark.parametrize("expert", [None, 2])
def test_validation_holds_one_expert_at_a_time(
    expert: int | None,
    wide: Recipe,
    photos: Path,
    tmp_path: Path,
    start: Path,
    checkpoint: Path,
    size: int,
    peak: Peak,
) -> None:
    kind = "pretrain" if expert is None else "experts"
    stage = _stage(wide, photos, tmp_path, start, expert, kind)
    metrics = validate_checkpoint(Checkpoint(str(checkpoint)), stage.model_dump_json())
    assert set(metrics) == {"psnr@4"}
    assert size <= peak.bytes < 2 * size and peak.experts == 1


def _quiet_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace Ray and DeepSpeed as a worker uses them, for one rank in this process."""
    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    reporter = SimpleNamespace(leads=True, stops=lambda: False, checkpoint=lambda *_, **__: None)
    fake: dict[str, Callable[..., Any]] = {
        "ray.train.get_context": lambda: context,
        "ray.train.get_checkpoint": lambda: None,
        f"{trainer.__name__}.get_device": lambda: CPU,
        f"{trainer.__name__}.ZeroEngine": TorchEngine,
        f"{trainer.__name__}.broadcast_from_rank_zero": lambda value: value,
        f"{trainer.__name__}._Reporter": lambda *_: _Entered(reporter),
        f"{trainer.__name__}.batches": lambda *_: iter(()),
        f"{trainer.__name__}.closing": _Entered,
    }
    for target, value in fake.items():
        monkeypatch.setattr(target, value)


class _Entered:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __enter__(self) -> Any:
        return self.value

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("kind", "expert", "experts"),
    [
        ("pretrain", None, 1),
        ("experts", 3, 1),
        # Its pairs need the trained expert, the first one, and the one before.
        ("perceptual", 1, 2),
        ("perceptual", 3, 3),
    ],
)
def test_a_worker_holds_the_experts_of_its_objective_also_after_a_divergence(
    kind: str,
    expert: int | None,
    experts: int,
    wide: Recipe,
    photos: Path,
    tmp_path: Path,
    start: Path,
    lpips_trunk: Path,
    peak: Peak,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _quiet_ray(monkeypatch)
    fields = [f"perceptual.{i}.trunk={lpips_trunk}" for i in range(3)]
    stage = _stage(override(wide, fields), photos, tmp_path, start, expert, kind)
    attempts: list[int] = []
    with safe_open(start / f"{EXPERTS[expert or 0]}.safetensors", "pt") as file:
        trained = file.get_tensor("out.weight")

    def run(state: loop.TrainState, *_: object) -> None:
        peak.look()
        attempts.append(state.progress.attempt)
        assert torch.equal(state.engine.module.out.weight, trained)
        assert state.engine.module.training and state.engine.module.out.weight.requires_grad
        if attempts == [0]:
            raise Diverged("too much")

    monkeypatch.setattr(loop, "run", run)
    assert trainer._worker({"stage": stage.model_dump_json()}) is None
    assert attempts == [0, 1] and peak.experts == experts
