"""DeepSpeed ZeRO-1 over one and two ranks of gloo: shards, equal results, resuming, refusals."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from linearsr.config import ModelConfig
from linearsr.denoiser import LinearSR
from linearsr.diffusion.experts import ranges
from linearsr.digests import digest_tensors
from linearsr.errors import WeightsError
from linearsr.imaging.resample import resize
from linearsr.latent import SpaceToDepth
from linearsr.tags.encoder import tag_encoder
from linearsr.training import loop, lora, perceptual
from linearsr.training.config import PerceptualConfig, TrainConfig
from linearsr.training.data import Batch
from linearsr.training.ema import load_average
from linearsr.training.engine import Engine, TorchEngine, ZeroEngine
from linearsr.training.guard import Diverged
from tests.helpers.experts import random_experts
from tests.helpers.lora import LORA, random_base
from tests.helpers.ranks import launch

CPU = torch.device("cpu")
GLOBAL_BATCH, STEPS, SAVED_AT = 4, 50, 25
# Sixteen roundings of bfloat16's eight bits.
BFLOAT16 = 16 * torch.finfo(torch.bfloat16).eps


def _train(**changes: object) -> TrainConfig:
    base = {"steps": STEPS, "warmup": 2, "clip": 0.1, "report_every": 1, "checkpoint_every": 1}
    # Curves are compared up to the rounding of float32, on any processor.
    base["bfloat16"] = False
    return TrainConfig.model_validate({**base, "learning_rate": 2e-3, **changes})


def _stage(
    model: ModelConfig, train: TrainConfig, engine: type[TorchEngine] | type[ZeroEngine]
) -> loop.TrainState:
    torch.manual_seed(0)
    denoiser = LinearSR(model.denoiser)
    return loop.TrainState.start(engine(denoiser, train, CPU), SpaceToDepth(model.latent), train)


def _batches(engine: Engine, start: int = 0) -> Iterator[Batch]:
    """Yield this rank's part of the global batches from pair `start` on."""
    mine = GLOBAL_BATCH // engine.world
    for first in itertools.count(start + engine.rank * mine, GLOBAL_BATCH):
        numbers = range(first, first + mine)
        coarse = np.stack([np.random.default_rng(n).standard_normal((3, 8, 8)) for n in numbers])
        hr = resize(torch.from_numpy(coarse).float(), 32, 32).tanh()
        yield Batch(hr, resize(hr, 8, 8), torch.tensor(numbers))


def _losses(stage: loop.TrainState) -> list[float]:
    return [entry["loss"] for entry in stage.progress.history]


def _weights(stage: loop.TrainState) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in stage.engine.module.parameters()])


def _quiet(stage: loop.TrainState, report: loop.Report) -> None:
    pass


def _difference(losses: list[float], expected: list[float]) -> float:
    assert len(losses) == len(expected)
    return max(abs(a - b) / b for a, b in zip(losses, expected, strict=True))


# Jobs, which run on every rank


def _curve(model: ModelConfig, save_to: Path) -> dict[str, Any]:
    stage = _stage(model, _train(), ZeroEngine)

    def save(stage: loop.TrainState, report: loop.Report) -> None:
        if report.step == SAVED_AT:
            # Each rank writes to its own folder, as in Ray Train; they are merged later.
            own = save_to / str(stage.engine.rank)
            own.mkdir(parents=True)
            stage.save(own)

    loop.run(stage, _batches(stage.engine), save)
    assert isinstance(stage.engine, ZeroEngine)
    adamw = stage.engine.zero.optimizer.optimizer
    tensors = [x for own in adamw.state.values() for x in own.values() if torch.is_tensor(x)]
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)  # by this rank
    return {"losses": _losses(stage), "bytes": held}


def _resume(model: ModelConfig, folder: Path) -> dict[str, Any]:
    stage = _stage(model, _train(), ZeroEngine)
    stage.load(folder)
    assert stage.progress.step == SAVED_AT
    loop.run(stage, _batches(stage.engine, stage.progress.seen), _quiet)
    return {"losses": _losses(stage)}


def _tagged(model: ModelConfig, engine: type[TorchEngine] | type[ZeroEngine]) -> dict[str, Any]:
    """Run with tags for one pair of each global batch, so that one of two ranks has none."""
    stage = _stage(model, _train(steps=6), engine)
    stage.encoder = tag_encoder(model)
    batches = (
        batch._replace(tags=tuple(() if n % GLOBAL_BATCH else ("cat",) for n in batch.numbers))
        for batch in _batches(stage.engine)
    )
    return {"losses": _losses(loop.run(stage, batches, _quiet))}


def _perceptual(
    model: ModelConfig, engine: type[TorchEngine] | type[ZeroEngine], trunk: Path, folder: Path
) -> dict[str, Any]:
    """Run a perceptual stage of eight steps, and its last four again from a checkpoint."""
    low, high = ranges(model.sampling.boundaries)[2]
    train = PerceptualConfig.model_validate(
        {
            **_train(steps=8).model_dump(),
            "timesteps": {"low": low, "high": high},
            "channels": (8, 8, 8, 8, 8),
            **{"trunk": str(trunk), "gan": 0.1, "gan_warmup": 2, "detour": 0.5},
        }
    )

    def begin() -> loop.TrainState:
        experts = random_experts(model, 4)
        held = engine(experts[2].requires_grad_(True), train, CPU)
        objective = perceptual.objective(model, train, 2, experts.__getitem__, held)
        autoencoder = SpaceToDepth(model.latent)
        return loop.TrainState.start(held, autoencoder, train, None, objective)

    def save(stage: loop.TrainState, report: loop.Report) -> None:
        if report.step == 4:
            stage.save(folder)

    stage = begin()
    loop.run(stage, _batches(stage.engine), save)
    stage.engine.close()
    again = begin()
    again.load(folder)
    loop.run(again, _batches(again.engine, again.progress.seen), _quiet)
    results = {"losses": _losses(stage), "again": _losses(again)}
    assert isinstance(stage.objective, perceptual.Perceptual) and stage.objective.critic
    critic = [p.detach().double().norm().item() for p in stage.objective.critic.model.parameters()]
    beside = [entry["discriminator"] for entry in stage.progress.history]
    return {**results, "critic": critic, "discriminator": beside}


def _accumulated(model: ModelConfig, save_to: Path, bfloat16: bool) -> dict[str, Any]:
    """Run ten steps in micro-batches; the last five again from a checkpoint, in whole batches."""
    fields = {"steps": 10, "bfloat16": bfloat16, "activation_checkpointing": True}
    train = _train(accumulation=2, **fields)

    def save(stage: loop.TrainState, report: loop.Report) -> None:
        if report.step == 5:
            stage.save(save_to)

    stage = _stage(model, train, ZeroEngine)
    loop.run(stage, _batches(stage.engine), save)
    assert stage.engine.module.checkpoint_blocks
    stage.engine.close()
    whole = _stage(model, _train(**fields), ZeroEngine)
    whole.load(save_to)
    loop.run(whole, _batches(whole.engine, whole.progress.seen), _quiet)
    return {"losses": _losses(stage), "again": _losses(whole)}


def _adapters(
    model: ModelConfig,
    engine: type[TorchEngine] | type[ZeroEngine],
    save_to: Path | None,
    load_from: Path | None = None,
    bfloat16: bool = False,
) -> dict[str, Any]:
    """Train adapters on a frozen base for eight steps, or for the last four from a checkpoint."""
    train = _train(steps=8, bfloat16=bfloat16)
    base = random_base(model)
    origin = lora.Origin(LORA, digest_tensors(base.state_dict()), "here")
    torch.manual_seed(0)
    held = engine(lora.inject(base, LORA), train, CPU)
    autoencoder = SpaceToDepth(model.latent)
    stage = loop.TrainState.start(held, autoencoder, train, origin=origin)

    def save(stage: loop.TrainState, report: loop.Report) -> None:
        if report.step == 4 and save_to is not None:
            own = save_to / str(stage.engine.rank)
            own.mkdir(parents=True)
            stage.save(own)

    if load_from is not None:
        stage.load(load_from)
    loop.run(stage, _batches(stage.engine, stage.progress.seen), save)
    frozen = [p.detach() for p in stage.engine.module.parameters() if not p.requires_grad]
    same = zip(frozen, random_base(model).parameters(), strict=True)
    result: dict[str, Any] = {
        "losses": _losses(stage),
        "frozen": all(torch.equal(a.float(), b.to(a.dtype).float()) for a, b in same),
        "moved": all(p.any().item() for p in lora.trained(stage.engine.module).values()),
        "trained": sum(p.numel() for p in lora.trained(stage.engine.module).values()),
    }
    if isinstance(stage.engine, ZeroEngine):
        adamw = stage.engine.zero.optimizer.optimizer
        state = [x for own in adamw.state.values() for x in own.values() if torch.is_tensor(x)]
        result["optimizer"] = sum(tensor.numel() for tensor in state)
        stage.engine.close()
    return result


def _timed(model: ModelConfig) -> dict[str, Any]:
    """Run with a budget of two minutes; the clock of the second rank is twice as fast."""
    stage = _stage(model, _train(minutes=2.0), ZeroEngine)
    pace = 10.0 * (1 + stage.engine.rank)
    stage.clock = map(pace.__mul__, itertools.count()).__next__
    loop.run(stage, _batches(stage.engine), _quiet)
    rates = [entry["learning_rate"] for entry in stage.progress.history]
    return {"steps": stage.progress.step, "minutes": stage.progress.minutes, "rates": rates}


def _stopped(stage: loop.TrainState, batches: Iterator[Batch]) -> dict[str, Any]:
    """Return where and why a run diverged, and whether its last step kept the weights."""
    kept = {"weights": _weights(stage)}

    def keep(stage: loop.TrainState, report: loop.Report) -> None:
        kept["weights"] = _weights(stage)

    with pytest.raises(Diverged) as diverged:
        loop.run(stage, batches, keep)
    untouched = torch.equal(kept["weights"], _weights(stage))
    stage.engine.close()
    return {"step": stage.progress.step, "why": str(diverged.value), "untouched": untouched}


def _poisoned_batch(model: ModelConfig, train: TrainConfig) -> dict[str, Any]:
    stage = _stage(model, train, ZeroEngine)

    def batches() -> Iterator[Batch]:
        for step, batch in enumerate(_batches(stage.engine)):
            poisoned = step == 3 and stage.engine.rank == 1
            yield batch._replace(hr=batch.hr * torch.nan) if poisoned else batch

    return _stopped(stage, batches())


def _poisoned_gradient(model: ModelConfig, train: TrainConfig) -> dict[str, Any]:
    stage = _stage(model, train, ZeroEngine)

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        poisoned = stage.progress.step == 3 and stage.engine.rank == 1
        return gradient * torch.nan if poisoned else gradient

    stage.engine.module.embed.weight.register_hook(poison)
    return _stopped(stage, _batches(stage.engine))


def _refusal(stage: loop.TrainState, folder: Path) -> str:
    with pytest.raises(WeightsError) as error:
        stage.load(folder)
    return str(error.value)


def _refusals(model: ModelConfig, broken: list[Path]) -> dict[str, Any]:
    low, high = _train(), _train(bfloat16=True)
    fast = _stage(model, _train(learning_rate=2.0), ZeroEngine)
    stops = {
        "batch": _poisoned_batch(model, low),
        "gradient": _poisoned_gradient(model, low),
        "bfloat16 gradient": _poisoned_gradient(model, high),
        "rate": _stopped(fast, _batches(fast.engine)),
    }
    stage = _stage(model, low, ZeroEngine)
    return {"stops": stops, "broken": [_refusal(stage, folder) for folder in broken]}


def _bfloat16(model: ModelConfig, folder: Path) -> dict[str, Any]:
    """Run ten steps, and the last five again by another engine from a checkpoint."""
    train = _train(steps=10, bfloat16=True)
    stage = _stage(model, train, ZeroEngine)

    def save(stage: loop.TrainState, report: loop.Report) -> None:
        if report.step == 5:
            stage.save(folder)

    loop.run(stage, _batches(stage.engine), save)
    stage.engine.close()
    again = _stage(model, train, ZeroEngine)
    again.load(folder)
    loop.run(again, _batches(again.engine, again.progress.seen), _quiet)
    dtypes = sorted({str(p.dtype) for p in again.engine.module.parameters()})
    again.engine.close()
    other = _stage(model, _train(steps=10), ZeroEngine)
    other.load(folder)
    loop.run(other, _batches(other.engine, other.progress.seen), _quiet)
    losses = {"losses": _losses(stage), "again": _losses(again), "other": _losses(other)}
    return {**losses, "dtypes": dtypes}


def _own_choice(model: ModelConfig) -> list[str]:
    """Return the precision of "auto" if only the first rank's processor multiplies bfloat16."""
    first = dist.get_rank() == 0
    with (
        mock.patch.object(torch.cpu, "_is_amx_tile_supported", return_value=first),
        mock.patch.object(torch.cpu, "_is_avx512_bf16_supported", return_value=False),
    ):
        stage = _stage(model, _train(bfloat16="auto"), ZeroEngine)
    return sorted({str(p.dtype) for p in stage.engine.module.parameters()})


# Tests of the results of the ranks


class Curves:
    """A run on one rank and a run on two, each with a checkpoint of its middle."""

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        self.model = model
        self.ranks: dict[int, list[Any]] = {}
        self.checkpoints: dict[int, Path] = {}
        for world in (1, 2):
            parts = folder / f"parts-of-{world}"
            # No compiler is found without a PATH.
            no_compiler = "" if world == 1 else None
            self.ranks[world] = launch(
                folder / f"run-{world}", _curve, world, model, parts, path=no_compiler
            )
            self.checkpoints[world] = folder / f"checkpoint-{world}"
            for part in parts.iterdir():
                shutil.copytree(part, self.checkpoints[world], dirs_exist_ok=True)

    def losses(self, world: int) -> list[float]:
        return self.ranks[world][0]["losses"]


@pytest.fixture(scope="module")
def curves(small_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Curves:
    return Curves(tmp_path_factory.mktemp("curves"), small_config)


def test_two_ranks_hold_half_of_the_optimizer_each(curves: Curves) -> None:
    (whole,), halves = ([rank["bytes"] for rank in curves.ranks[world]] for world in (1, 2))
    assert halves == pytest.approx([whole / 2] * 2, rel=0.1)


def test_the_loss_curve_is_the_same_on_one_rank_two_ranks_and_plain_torch(curves: Curves) -> None:
    plain = _stage(curves.model, _train(), TorchEngine)
    loop.run(plain, _batches(plain.engine), _quiet)
    one, two = curves.losses(1), curves.losses(2)
    assert len(one) == STEPS and one[-1] < 0.8 * one[0]
    assert _difference(two, one) < 1e-3
    assert _difference(one, _losses(plain)) < 1e-3
    assert curves.ranks[2][0]["losses"] == curves.ranks[2][1]["losses"]


@pytest.mark.parametrize(("saved", "resumed"), [(2, 2), (2, 1), (1, 2)])
def test_a_run_resumes_on_any_number_of_ranks(
    curves: Curves, saved: int, resumed: int, tmp_path: Path
) -> None:
    ranks = launch(tmp_path / "run", _resume, resumed, curves.model, curves.checkpoints[saved])
    for rank in ranks:
        difference = _difference(rank["losses"], curves.losses(saved))
        assert difference == 0 if saved == resumed else difference < 1e-3


def test_two_ranks_keep_the_same_average_of_weights_as_one(curves: Curves) -> None:
    one, two = (load_average(curves.checkpoints[world]) for world in (1, 2))
    assert one.keys() == dict(LinearSR(curves.model.denoiser).named_parameters()).keys()
    assert one.keys() == two.keys()
    for name, average in one.items():
        torch.testing.assert_close(two[name], average, rtol=1e-4, atol=1e-5)


def _broken(curves: Curves, folder: Path) -> list[Path]:
    """Return checkpoints with a truncated shard, of two ranks and of one, or a missing one."""
    checkpoints = [curves.checkpoints[world] for world in (2, 1, 2)]
    copies = [shutil.copytree(c, folder / str(i)) for i, c in enumerate(checkpoints)]
    shards = [next(copy.glob("*/zero_pp_rank_0_*")) for copy in copies]
    for shard in shards[:2]:
        shard.write_bytes(shard.read_bytes()[:1000])
    shards[2].unlink()
    return copies


def test_all_ranks_stop_for_a_fault_of_one_rank(curves: Curves, tmp_path: Path) -> None:
    """One rank alone meets NaNs and damage; a rate is a thousand times too high."""
    broken = _broken(curves, tmp_path)
    first, second = launch(tmp_path / "run", _refusals, 2, curves.model, broken)
    assert first["stops"] == second["stops"]
    for kind in ("batch", "gradient", "bfloat16 gradient"):
        stop = first["stops"][kind]
        assert stop["step"] == 3 and stop["untouched"] and "not finite" in stop["why"]
    assert first["stops"]["rate"]["step"] < STEPS
    for cut_short, other in zip(first["broken"][:2], second["broken"][:2], strict=True):
        assert "cannot be resumed" in cut_short and "another rank" in other
    assert "found 1 of 2 files" in first["broken"][2] == second["broken"][2]


def test_bfloat16_trains_and_resumes(small_config: ModelConfig, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for rank in launch(tmp_path / "run", _bfloat16, 2, small_config, folder):
        assert rank["dtypes"] == ["torch.bfloat16"]
        assert all(map(math.isfinite, rank["losses"])) and rank["losses"][-1] < rank["losses"][0]
        assert rank["again"] == rank["losses"]
        # A run may continue on a processor where bfloat16 is slow; its rounding changes the loss.
        assert rank["other"][:5] == rank["losses"][:5] and rank["other"] != rank["losses"]
        assert rank["other"] == pytest.approx(rank["losses"], rel=BFLOAT16)
    assert all(t.dtype == torch.float32 for t in load_average(folder).values())


@pytest.mark.parametrize(("bfloat16", "within"), [(False, 1e-3), (True, BFLOAT16)])
def test_two_ranks_in_micro_batches_take_the_steps_of_plain_torch(
    small_config: ModelConfig, tmp_path: Path, bfloat16: bool, within: float
) -> None:
    """A checkpoint may be continued with another accumulation."""
    plain = _stage(small_config, _train(steps=10), TorchEngine)
    expected = _losses(loop.run(plain, _batches(plain.engine), _quiet))
    (tmp_path / "saved").mkdir()
    arguments = (small_config, tmp_path / "saved", bfloat16)
    for rank in launch(tmp_path / "run", _accumulated, 2, *arguments):
        assert _difference(rank["losses"], expected) < within
        assert _difference(rank["again"], expected) < within


def test_bfloat16_is_off_on_all_ranks_if_one_processor_is_slow_at_it(
    small_config: ModelConfig, tmp_path: Path
) -> None:
    assert launch(tmp_path / "run", _own_choice, 2, small_config) == [["torch.float32"]] * 2


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bfloat16_auto_chooses_the_dtype_that_the_processor_is_fast_at(
    small_config: ModelConfig, monkeypatch: pytest.MonkeyPatch, fast: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    engine = TorchEngine(LinearSR(small_config.denoiser), _train(bfloat16="auto"), CPU)
    with engine.precision():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_a_rank_without_tags_keeps_in_step_with_one_that_has_some(
    tagged_config: ModelConfig, tmp_path: Path
) -> None:
    """Both ranks reduce the same gradients, also those of the cross-attention."""
    alone = _tagged(tagged_config, TorchEngine)["losses"]
    for rank in launch(tmp_path / "ranks", _tagged, 2, tagged_config, ZeroEngine):
        assert _difference(rank["losses"], alone) < 1e-4


def test_a_perceptual_stage_is_the_same_on_one_rank_and_two_and_resumes(
    small_config: ModelConfig, lpips_trunk: Path, tmp_path: Path
) -> None:
    """The discriminator is a plain copy on each rank, and stays one."""
    for name in ("plain", "zero"):
        (tmp_path / name).mkdir()
    plain = _perceptual(small_config, TorchEngine, lpips_trunk, tmp_path / "plain")
    arguments = (small_config, ZeroEngine, lpips_trunk, tmp_path / "zero")
    first, second = launch(tmp_path / "run", _perceptual, 2, *arguments)
    assert first == second and first["again"] == first["losses"]
    assert _difference(first["losses"], plain["losses"]) < 1e-3
    assert _difference(first["discriminator"], plain["discriminator"]) < 1e-3
    assert _difference(first["critic"], plain["critic"]) < 1e-2  # the biases are small


def _merged(parts: Path, folder: Path) -> Path:
    for part in parts.iterdir():
        shutil.copytree(part, folder, dirs_exist_ok=True)
    return folder


def test_adapters_train_and_resume_on_any_number_of_ranks(
    small_config: ModelConfig, tmp_path: Path
) -> None:
    """The optimizer has two moments for each number of the adapters, shared by the ranks."""
    plain = _adapters(small_config, TorchEngine, None)
    assert plain["frozen"] and plain["moved"]
    parts = tmp_path / "parts"
    both = launch(tmp_path / "two", _adapters, 2, small_config, ZeroEngine, parts)
    checkpoint = _merged(parts, tmp_path / "checkpoint")
    for rank in both:
        assert rank["frozen"] and _difference(rank["losses"], plain["losses"]) < 1e-3
        assert rank["optimizer"] == pytest.approx(plain["trained"], rel=0.1)
    size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    # Weights, masters, two moments and the average, of the adapters alone; the base is larger.
    assert size < 4 * 6 * plain["trained"] + 200_000
    for world, exact in ((2, True), (1, False)):
        again = launch(
            tmp_path / f"again-{world}",
            _adapters,
            world,
            small_config,
            ZeroEngine,
            None,
            checkpoint,
        )
        for rank in again:
            difference = _difference(rank["losses"], both[0]["losses"])
            assert difference == 0 if exact else difference < 1e-3
            assert rank["frozen"]


def test_adapters_train_in_bfloat16_on_a_base_in_bfloat16(
    small_config: ModelConfig, tmp_path: Path
) -> None:
    parts = tmp_path / "parts"
    arguments = (small_config, ZeroEngine, parts, None, True)
    both = launch(tmp_path / "run", _adapters, 2, *arguments)
    checkpoint = _merged(parts, tmp_path / "checkpoint")
    arguments = (small_config, ZeroEngine, None, checkpoint, True)
    again = launch(tmp_path / "again", _adapters, 2, *arguments)
    for rank in both:
        assert rank["frozen"] and rank["moved"]
    assert again[0]["losses"] == both[0]["losses"]
    assert all(t.dtype == torch.float32 for t in load_average(checkpoint).values())


def test_ranks_whose_clocks_differ_end_together(small_config: ModelConfig, tmp_path: Path) -> None:
    first, second = launch(tmp_path / "run", _timed, 2, small_config)
    assert first == second and first["minutes"] == 2.0 and first["steps"] == 6
