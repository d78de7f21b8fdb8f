"""Adapters (LoRA) in the stages of a cluster: their base, memory, refusals, and the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from ray.cluster_utils import Cluster
from ray.train import Checkpoint

from linearsr import weights
from linearsr.config import LoRAConfig
from linearsr.digests import digest_tensors
from linearsr.distributed.train import trainer
from linearsr.distributed.train.config import StageConfig
from linearsr.distributed.train.esgf import export_outcomes, run_stage, write_bundle
from linearsr.distributed.train.start import check_start
from linearsr.distributed.train.trainer import Outcome, _claim
from linearsr.distributed.train.validation import validate_checkpoint
from linearsr.errors import LinearSRError, OptionError, WeightsError
from linearsr.pipeline.upscaler import Upscaler
from linearsr.storage.location import locate
from linearsr.training import export, loop, lora, perceptual
from linearsr.training.recipes import Recipe, override
from tests.denoiser.test_lora import bytes_of
from tests.distributed.train.test_jobs import EXPERT, JUDGED, JUDGED_DATA, _two_experts
from tests.distributed.train.test_memory import _quiet_ray
from tests.helpers.experts import random_experts
from tests.helpers.lora import LORA, random_adapters, random_base, save_adapted
from tests.helpers.runs import stage_of
from tests.training.test_lora import checkpoint_of


@pytest.fixture(scope="module")
def adapted(recipe: Recipe) -> Recipe:
    return override(recipe, [f"lora={LORA.model_dump_json()}", "lora.rank=4"])


@pytest.fixture(scope="module")
def start(adapted: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapted(tmp_path_factory.mktemp("start") / "weights", adapted.model)


def stage(recipe: Recipe, photos: Path, storage: Path, start: Path, expert: int) -> StageConfig:
    plain = stage_of(recipe, photos, storage, "run")
    fields = {**plain.model_dump(), "start": str(start), "expert": expert, "kind": "perceptual"}
    return StageConfig.model_validate(fields)


def test_a_worker_holds_the_base_once_for_all_experts_that_it_runs(
    adapted: Recipe,
    photos: Path,
    tmp_path: Path,
    start: Path,
    lpips_trunk: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The trained expert, the first one and the one before it: one base and three adapters."""
    _quiet_ray(monkeypatch)
    fields = [f"perceptual.{i}.trunk={lpips_trunk}" for i in range(3)]
    job = stage(override(adapted, fields), photos, tmp_path, start, 3)
    held: list[int] = []

    def run(state: loop.TrainState, *_: object) -> None:
        objective = state.objective
        assert isinstance(objective, perceptual.Perceptual) and objective.before is not None
        held.append(bytes_of(state.engine.module, objective.first, objective.before))
        expected = random_adapters(adapted.model, 3)
        for name, parameter in lora.trained(state.engine.module).items():
            assert torch.equal(parameter.detach(), expected[lora.plain_name(name)])

    monkeypatch.setattr(loop, "run", run)
    assert trainer._worker({"stage": job.model_dump_json()}) is None
    own = 4 * sum(tensor.numel() for tensor in random_adapters(adapted.model, 3).values())
    assert held == [bytes_of(random_base(adapted.model)) + 3 * own]


def test_a_checkpoint_of_adapters_is_validated_among_the_others(
    adapted: Recipe, photos: Path, tmp_path: Path, start: Path
) -> None:
    base = weights.load_base(start).state_dict()
    origin = lora.Origin(LORA, digest_tensors(base), str(start))
    checkpoint = checkpoint_of(tmp_path / "checkpoint", adapted.model, 2, origin)
    settings = ['validation.metrics=["psnr@4"]', 'validation.knee={"psnr@4": true}']
    job = stage(override(adapted, settings), photos, tmp_path, start, 2)
    metrics = validate_checkpoint(Checkpoint(str(checkpoint)), job.model_dump_json())
    assert metrics["psnr@4"] > 3
    other = checkpoint_of(tmp_path / "other", adapted.model, 2, origin._replace(digest="0" * 64))
    with pytest.raises(WeightsError, match="another base"):
        validate_checkpoint(Checkpoint(str(other)), job.model_dump_json())


def test_weights_are_written_with_the_base_of_the_stages_start(
    adapted: Recipe, tmp_path: Path, start: Path
) -> None:
    base = weights.load_base(start).state_dict()
    origin = lora.Origin(LORA, digest_tensors(base), str(start))
    checkpoints = [
        locate(checkpoint_of(tmp_path / str(n), adapted.model, n, origin)) for n in range(4)
    ]
    write_bundle(locate(tmp_path / "out"), adapted.model, checkpoints, {"licence": "test"})
    assert weights.read_lora(tmp_path / "out") == LORA
    assert digest_tensors(weights.load_base(tmp_path / "out").state_dict()) == origin.digest
    gone = checkpoint_of(
        tmp_path / "moved", adapted.model, 0, origin._replace(source=str(tmp_path / "gone"))
    )
    with pytest.raises(WeightsError, match="gone"):
        write_bundle(locate(tmp_path / "out"), adapted.model, [locate(gone)] * 4, {})


def test_starting_weights_without_a_fitting_base_are_refused_before_any_work(
    adapted: Recipe, recipe: Recipe, photos: Path, tmp_path: Path, start: Path
) -> None:
    whole = tmp_path / "whole"
    experts = [m.state_dict() for m in random_experts(recipe.model, 4)]
    weights.save(whole, recipe.model, experts, {})
    with pytest.raises(OptionError, match="these weights are 4 whole experts"):
        check_start(stage(adapted, photos, tmp_path, whole, 2))
    wider = override(adapted, ["lora.rank=8"])
    with pytest.raises(OptionError, match=r'set lora=\{"rank":4'):
        check_start(stage(wider, photos, tmp_path, start, 2))
    one = tmp_path / "one"
    weights.save(one, export.single(recipe.model), experts[:1], {})
    check_start(stage(adapted, photos, tmp_path, one, 2))
    check_start(stage(adapted, photos, tmp_path, start, 2))
    # Without lora, whole experts go on from merged ones.
    check_start(stage(recipe, photos, tmp_path, start, 2))


def test_a_run_goes_on_with_the_lora_that_it_was_started_with(
    adapted: Recipe, recipe: Recipe, photos: Path, tmp_path: Path, start: Path
) -> None:
    wider = override(adapted, ["lora.rank=8"])
    for first, others in ((adapted, (recipe, wider)), (recipe, (adapted,))):
        storage = tmp_path / str(len(others))
        storage.mkdir()
        for _ in range(2):
            _claim(stage(first, photos, storage, start, 2))
        for other in others:
            with pytest.raises(OptionError, match="started with another lora"):
                _claim(stage(other, photos, storage, start, 2))


@pytest.mark.thorough
def test_experts_and_perceptual_stage_train_adapters_into_one_bundle(
    cluster: Cluster,
    recipe: Recipe,
    photos: Path,
    photograph: Image.Image,
    whole: Outcome,
    tmp_path: Path,
    lpips_trunk: Path,
) -> None:
    """Two experts from one pretraining; then one of them goes on behind the other."""
    fields = (*EXPERT, *JUDGED, f"trunk={lpips_trunk}")
    settings = [f"perceptual.0.{field}" for field in fields]
    settings += [f"experts.{i}.{field}" for i in range(2) for field in EXPERT]
    two = override(
        _two_experts(recipe), [*settings, *JUDGED_DATA, f"lora={LORA.model_dump_json()}"]
    )
    home = stage_of(two, photos, tmp_path, "experts").cluster
    before = [locate(whole.run.path)]
    for kind in ("experts", "perceptual"):
        outcomes = run_stage(kind, two, home, before, anyway=True)  # type: ignore[arg-type]
        export_outcomes(outcomes, two, locate(tmp_path / kind))
        before = [outcome.run for outcome in outcomes]
    first, second = tmp_path / "experts", tmp_path / "perceptual"
    digests = {
        digest_tensors(weights.load_base(folder).state_dict())
        for folder in (first, second, tmp_path / "experts" / "experts-start")
    }
    assert len(digests) == 1, "the base is that of pretraining"
    changed = []
    for number in range(2):
        a, b = (weights.load_adapters(folder, number) for folder in (first, second))
        assert a is not None and b is not None
        changed.append(any(not torch.equal(a[name], b[name]) for name in a))
    assert changed == [False, True]
    upscaler = Upscaler.load(second, "cpu")
    assert upscaler(photograph, steps=4).size == (256, 192)
    other = override(two, [f"lora={LoRAConfig(rank=2).model_dump_json()}"])
    with pytest.raises(LinearSRError, match="adapters of these weights have another shape"):
        run_stage("perceptual", other, home.model_copy(update={"name": "x"}), before, anyway=True)
