"""Stages that train adapters on one frozen base, on DC-AE latents: from photographs to pictures."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from PIL import Image

from linearsr import weights
from linearsr.config import DenoiserConfig, LatentConfig, LoRAConfig, ModelConfig
from linearsr.denoiser.lora import adapt, empty_adapters
from linearsr.digests import digest_tensors
from linearsr.errors import LinearSRError, WeightsError
from linearsr.latent import load_autoencoder
from linearsr.pipeline.upscaler import Upscaler
from linearsr.training import export, loop, lora, perceptual
from linearsr.training.__main__ import main
from linearsr.training.ema import EMA
from linearsr.training.engine import TorchEngine
from linearsr.training.guard import Diverged
from linearsr.training.recipes import override, sana_1_6b
from linearsr.weights.merge import merge
from tests.helpers.dc_ae import save_dc_ae
from tests.helpers.lora import LORA, random_adapters, random_base
from tests.helpers.tag_models import save_gemma
from tests.training.test_perceptual import batches, config_of, objective_of, quiet

CPU = torch.device("cpu")
EXPERT = 2


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """A model on latents of a narrow DC-AE."""
    source = save_dc_ae(tmp_path_factory.mktemp("ae") / "ae", factor=4)
    shape = DenoiserConfig(
        latent_channels=4, depth=2, width=32, head_dim=16, stem_channels=(8, 8, 8)
    )
    latent = LatentConfig(kind="dc-ae", factor=4, scale=0.5, source=str(source))
    return ModelConfig(name="learned", denoiser=shape, latent=latent)


def stage_of(
    model: ModelConfig, trunk: Path, seed: int = 0, shape: LoRAConfig = LORA, **changes: object
) -> loop.TrainState:
    """Return a perceptual stage of an expert's adapters, on a random base of this seed."""
    config = config_of(model, EXPERT, trunk, crop=5, **changes)
    base = random_base(model)
    with torch.no_grad():
        base.out.bias += seed
    origin = lora.Origin(shape, digest_tensors(base.state_dict()), "here")
    denoiser = lora.inject(deepcopy(base), shape, random_adapters(model, EXPERT, shape))
    engine = TorchEngine(denoiser, config, CPU)
    others = lora.sharing(denoiser, shape, lambda n: random_adapters(model, n, shape))
    objective = perceptual.objective(model, config, EXPERT, others, engine)
    autoencoder = load_autoencoder(model.latent)
    return loop.TrainState.start(engine, autoencoder, config, None, objective, origin)


def adapters_of(stage: loop.TrainState) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in lora.trained(stage.engine.module).values()])


def frozen_of(stage: loop.TrainState) -> torch.Tensor:
    frozen = [p.flatten() for p in stage.engine.module.parameters() if not p.requires_grad]
    return torch.cat(frozen).clone()


def test_only_adapters_are_trained_averaged_and_saved(
    learned: ModelConfig, lpips_trunk: Path, tmp_path: Path
) -> None:
    stage = stage_of(learned, lpips_trunk, steps=6)
    before, frozen = adapters_of(stage).clone(), frozen_of(stage)
    loop.run(stage, batches(), quiet)
    assert (adapters_of(stage) != before).float().mean() > 0.9
    assert torch.equal(frozen_of(stage), frozen)
    count = sum(t.numel() for t in empty_adapters(learned.denoiser, LORA).values())
    assert isinstance(stage.engine, TorchEngine)
    state = stage.engine.optimizer.state.values()
    assert sum(tensors["exp_avg"].numel() for tensors in state) == count
    assert sum(tensor.numel() for tensor in stage.ema.average.values()) == count
    stage.save(tmp_path)
    saved = torch.load(tmp_path / "torch.pt", weights_only=True)
    assert sum(tensor.numel() for tensor in saved["model"].values()) == count


def test_frozen_experts_of_the_objective_share_the_base_in_training(
    learned: ModelConfig, lpips_trunk: Path
) -> None:
    stage = stage_of(learned, lpips_trunk)
    objective = objective_of(stage)
    assert objective.before is not None
    ours = stage.engine.module.embed.weight.data_ptr()
    assert objective.first.embed.weight.data_ptr() == ours
    assert objective.before.embed.weight.data_ptr() == ours


def test_training_adapters_lowers_the_perceptual_loss(
    learned: ModelConfig, lpips_trunk: Path
) -> None:
    stage = stage_of(learned, lpips_trunk, steps=40, gan=0, learning_rate=3e-3, detour=0)
    one = next(batches())

    def same() -> object:
        while True:
            yield one

    losses = [h["loss"] for h in loop.run(stage, same(), quiet).progress.history]  # type: ignore[arg-type]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_stage_of_adapters_resumes_exactly(
    learned: ModelConfig, lpips_trunk: Path, tmp_path: Path, bfloat16: bool
) -> None:
    whole = loop.run(stage_of(learned, lpips_trunk, bfloat16=bfloat16), batches(), quiet)

    def save_at_four(stage: loop.TrainState, report: loop.Report) -> bool:
        if report.step == 4:
            stage.save(tmp_path)
        return report.step == 4

    loop.run(stage_of(learned, lpips_trunk, bfloat16=bfloat16), batches(), save_at_four)
    resumed = stage_of(learned, lpips_trunk, bfloat16=bfloat16)
    resumed.load(tmp_path)
    loop.run(resumed, batches(resumed.progress.seen), quiet)
    assert torch.equal(adapters_of(whole), adapters_of(resumed))
    for name, average in whole.ema.average.items():
        assert torch.equal(average, resumed.ema.average[name])
    assert [h["loss"] for h in resumed.progress.history] == [
        h["loss"] for h in whole.progress.history
    ]


def test_a_checkpoint_of_another_base_or_shape_is_not_resumed(
    learned: ModelConfig, lpips_trunk: Path, tmp_path: Path
) -> None:
    stage = stage_of(learned, lpips_trunk)
    stage.save(tmp_path)
    before = adapters_of(stage).clone()
    wider = LoRAConfig(rank=8, alpha=8)
    for other in (
        stage_of(learned, lpips_trunk, seed=1),
        stage_of(learned, lpips_trunk, shape=wider),
    ):
        with pytest.raises(WeightsError, match=r"adapters .* same shape on the same base"):
            other.load(tmp_path)
    assert torch.equal(adapters_of(stage), before)


def test_the_guard_stops_a_stage_of_adapters_before_any_weight_changes(
    learned: ModelConfig, lpips_trunk: Path
) -> None:
    good = next(batches())
    stage = stage_of(learned, lpips_trunk)
    with pytest.raises(Diverged, match="step 1"):
        loop.run(stage, iter([good, good._replace(hr=good.hr * math.nan)]), quiet)
    assert torch.isfinite(adapters_of(stage)).all()


# Export


def checkpoint_of(folder: Path, model: ModelConfig, number: int, origin: lora.Origin) -> Path:
    """Write the checkpoint of an expert's random adapters; two ranks share it."""
    adapters = random_adapters(model, number, origin.config)
    trained = lora.inject(random_base(model), origin.config, adapters)
    folder.mkdir()
    for rank in range(2):
        EMA(trained, 0.9, rank, 2, origin).save(folder)
    return folder


def test_checkpoints_become_a_bundle_with_their_base_once(
    learned: ModelConfig, tmp_path: Path
) -> None:
    base = random_base(learned)
    origin = lora.Origin(LORA, digest_tensors(base.state_dict()), "there")
    first = tmp_path / "pretraining"
    first.mkdir()
    EMA(base.requires_grad_(True), 0.9).save(first)
    trained = [checkpoint_of(tmp_path / str(n), learned, n, origin) for n in (1, 2, 3)]
    export.bundle(tmp_path / "out", learned, [first, *trained], {}, lambda: random_base(learned))
    bundle = weights.load(tmp_path / "out", dtype=torch.bfloat16)
    # The base itself is an expert with adapters of zeros.
    for name, tensor in random_base(learned).bfloat16().state_dict().items():
        if name in bundle.experts[0].state_dict():
            assert torch.equal(bundle.experts[0].state_dict()[name], tensor)
    for number in (1, 2, 3):
        expected = {k: v.bfloat16() for k, v in random_adapters(learned, number).items()}
        adapters = weights.load_adapters(tmp_path / "out", number)
        assert adapters is not None
        assert all(torch.equal(adapters[name], tensor) for name, tensor in expected.items())
        ours = export.load(trained[number - 1], learned, lambda: random_base(learned))
        shared = adapt(random_base(learned), random_adapters(learned, number), LORA)
        weight = "blocks.1.ffn.expand"
        assert torch.equal(ours.get_submodule(weight).weight, shared.get_submodule(weight).weight)


def test_checkpoints_that_do_not_belong_together_are_refused(
    learned: ModelConfig, tmp_path: Path
) -> None:
    digest = digest_tensors(random_base(learned).state_dict())
    origin = lora.Origin(LORA, digest, "there")
    wide = origin._replace(config=LoRAConfig(rank=8))
    strange = origin._replace(digest="0" * 64)
    trained, wider, other = (
        checkpoint_of(tmp_path / str(i), learned, 1, one)
        for i, one in enumerate((origin, wide, strange))
    )
    whole = tmp_path / "whole"
    whole.mkdir()
    EMA(random_base(learned).requires_grad_(True), 0.9).save(whole)
    changed = tmp_path / "changed"
    changed.mkdir()
    model = random_base(learned)
    with torch.no_grad():
        model.out.bias += 1
    EMA(model.requires_grad_(True), 0.9).save(changed)

    def refusal(*checkpoints: Path, base: export.Base | None = lambda: random_base(learned)) -> str:
        with pytest.raises(LinearSRError) as error:
            export.bundle(tmp_path / "out", learned, checkpoints, {}, base)
        assert not (tmp_path / "out").exists() and "\n" not in str(error.value)
        return str(error.value)

    assert "another shape" in refusal(trained, trained, wider, trained)
    assert "another base than those" in refusal(trained, trained, other, trained)
    assert "another base than this one" in refusal(trained, *[trained] * 3, base=lambda: model)
    assert "has whole weights" in refusal(changed, *[trained] * 3)
    assert "base that they need is in there" in refusal(*[trained] * 4, base=None)
    narrower = learned.denoiser.model_copy(update={"depth": 1})
    small = learned.model_copy(update={"denoiser": narrower})
    with pytest.raises(WeightsError, match="do not fit the config"):
        export.adapters(trained, small, origin)


# All stages


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Changes that make `sana_1_6b` narrow: its stages, its DC-AE of factor 32, its tags."""
    home = tmp_path_factory.mktemp("sana")
    words = ["cat", "dog", "grass", "woman", "space", "suit", ","]
    stages = ["pretrain", *(f"{kind}.{i}" for kind in ("experts", "finetune") for i in range(4))]
    judged = [f"perceptual.{i}" for i in range(3)]
    return [
        *(f"model.denoiser.{x}" for x in ("depth=2", "width=32", "head_dim=16", "tag_dim=16")),
        *(f"model.denoiser.{x}" for x in ("tag_heads=2", "latent_channels=4")),
        "model.denoiser.stem_channels=[8, 8, 8]",
        "model.sampling.steps=4",
        f"model.latent.source={save_dc_ae(home / 'ae')}",
        f"model.tags.source={save_gemma(home / 'gemma', 16, words)}",
        *(f"data.{x}" for x in ("patch=128", "batch=2", "margin=8")),
        'data.degradations={"clean": 1.0}',
        *(f"{stage}.{x}" for stage in (*stages, *judged) for x in ("steps=4", "warmup=1")),
        *(f"{stage}.learning_rate=0.002" for stage in (*stages, *judged)),
        *(f"{stage}.ema=0.5" for stage in (*stages, *judged)),
        *(f"{stage}.channels=[8, 8, 8, 8, 8]" for stage in judged),
        *(f"{stage}.crop=2" for stage in judged),
        'lora={"rank": 4, "alpha": 8}',
    ]


def test_the_recipe_has_one_lora_for_all_stages_after_pretraining(settings: list[str]) -> None:
    recipe = override(sana_1_6b(), settings)
    assert recipe.lora_of("pretrain") is None
    assert all(recipe.lora_of(kind) == LORA for kind in ("experts", "finetune", "perceptual"))
    assert override(sana_1_6b(), ["lora={}"]).lora == LoRAConfig()
    for wrong in ("lora.rank=0", 'lora={"layers": ["out"]}', 'lora={"layers": []}'):
        with pytest.raises(LinearSRError, match="lora"):
            override(sana_1_6b(), ["lora={}", wrong])


def test_all_stages_on_a_narrow_dc_ae_make_a_bundle_of_adapters_that_upscales(
    settings: list[str],
    photograph: Image.Image,
    lpips_trunk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    photos, out = tmp_path / "photos", tmp_path / "runs"
    photos.mkdir()
    photograph.resize((256, 192)).save(photos / "photo.png")
    monkeypatch.setenv("LINEARSR_LPIPS_TRUNK", str(lpips_trunk))

    def run(*stage: str, more: tuple[str, ...] = ()) -> int:
        chosen = [part for setting in (*settings, *more) for part in ("--set", setting)]
        places = [f"--photos={photos}", f"--out={out}", "--workers=0", "--recipe=sana_1_6b"]
        monkeypatch.setattr("sys.argv", ["training", *stage, *places, *chosen])
        return main()

    assert run("pretrain") == 0
    for number in range(4):
        assert run("expert", f"--index={number}") == 0
    assert run("perceptual", "--index=2") == 0
    assert run("perceptual", "--index=3") == 0
    capsys.readouterr()
    # Started again with another rank, the stage does not go on.
    assert run("perceptual", "--index=3", more=("lora.rank=8", "perceptual.2.steps=6")) == 1
    assert "shape" in capsys.readouterr().err
    assert run("bundle") == 0
    folder = out / "linearsr-1.6b"
    upscaler = Upscaler.load(folder, "cpu")
    taken = ["expert-0", "expert-1", "perceptual-2", "perceptual-3"]
    assert json.loads(upscaler.provenance["stages"]) == taken
    base = export.load(out / "pretrain", upscaler.config)
    assert digest_tensors(weights.load_base(folder).state_dict()) == digest_tensors(
        base.state_dict()
    )
    for number, name in enumerate(taken):
        adapters = weights.load_adapters(folder, number)
        assert adapters is not None
        origin = lora.Origin(LORA, digest_tensors(base.state_dict()), "")
        trained = export.adapters(out / name, upscaler.config, origin)
        assert trained is not None
        assert all(torch.equal(adapters[k], v.bfloat16()) for k, v in trained.items())
        # Photographs have no tags, so nothing is learnt about them.
        assert all(v.any() for k, v in trained.items() if "tag" not in k)
    # The perceptual stage went on from the adapters of the experts' stage.
    texture = [export.adapters(out / x, upscaler.config, origin) for x in ("expert-2", taken[2])]
    assert texture[0] is not None and texture[1] is not None
    a, b = (torch.cat([t.flatten() for t in x.values()]) for x in texture if x is not None)
    assert torch.cosine_similarity(a, b, dim=0) > 0.5 and not torch.equal(a, b)
    result = upscaler(photograph, steps=4, tags=("cat",), seed=1)
    assert result.size == (256, 192)
    merge(folder, tmp_path / "merged")
    merged = Upscaler.load(tmp_path / "merged", "cpu")(photograph, steps=4, tags=("cat",), seed=1)
    difference = torch.tensor(list(result.tobytes())).float() - torch.tensor(list(merged.tobytes()))
    assert difference.abs().mean() < 2  # of 255
