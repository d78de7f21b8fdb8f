"""The plan of a training against the bytes that its ranks really take."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from linearsr.cli import job
from linearsr.config import LatentConfig, LoRAConfig
from linearsr.denoiser import LinearSR
from linearsr.denoiser.lora import empty_adapters
from linearsr.errors import OptionError, WeightsError
from linearsr.latent import DCAutoencoder, load_autoencoder
from linearsr.training import count, engine, loop, lora, perceptual, plan
from linearsr.training.config import PerceptualConfig
from linearsr.training.data import Batch, Stored
from linearsr.training.engine import ZeroEngine
from linearsr.training.recipes import RECIPES, Recipe, override
from tests.helpers.dc_ae import save_attending_dc_ae
from tests.helpers.ranks import launch

WITHIN = 0.1
GPUS = 2
# Numbers in DeepSpeed's buffer; that of a GPU would be far larger than the model.
BUCKET = 1 << 18
# Four pairs for each of two ranks, in two micro-batches, so that gradients add up.
NARROW = (
    "model.denoiser.latent_channels=8",
    "model.denoiser.depth=8",
    "model.denoiser.width=64",
    "model.denoiser.tag_dim=null",
    "model.denoiser.stem_channels=[8, 8, 8]",
    "model.denoiser.stem_strides=[2, 2, 1]",
    "model.tags=null",
    "model.latent.factor=4",
    "data.patch=128",
    "data.batch=8",
    "validation.size=128",
    *(f"perceptual.{i}.channels=[8, 8, 8, 8, 8]" for i in range(3)),
    *(f"perceptual.{i}.crop=16" for i in range(3)),
)
# Threads free memory in any order, so the peak of one step may be below that of another.
STEPS = 2
RUNS = {
    "pretraining": ("pretrain", None, False),
    "pretraining, checkpointed": ("pretrain", None, True),
    "fine-tuning 3, which decodes": ("finetune", 3, False),
    "perceptual 3": ("perceptual", 3, True),
    "experts 0, adapters": ("experts", 0, False),
    "perceptual 3, adapters": ("perceptual", 3, True),
    "pretraining, latents": ("pretrain", None, True),
}
LORA = LoRAConfig(rank=4)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The recipe of Sana with few channels, and a DC-AE of few channels in a folder."""
    folder = tmp_path_factory.mktemp("dc-ae")
    save_attending_dc_ae(folder)
    return override(RECIPES["sana_1_6b"](), [*NARROW, f"model.latent.source={folder}"])


def _run(recipe: Recipe, name: str) -> plan.Run:
    kind, expert, checkpointing = RUNS[name]
    if name.endswith("adapters"):
        recipe = recipe.model_copy(update={"lora": LORA})
    run = plan.Run(recipe, kind, expert, name.endswith("latents"))  # type: ignore[arg-type]
    return run.changed(
        accumulation=2,
        activation_checkpointing=checkpointing,
        steps=1 + STEPS,
        report_every=1,
        checkpoint_every=1,
    )


def _batches(run: plan.Run, pairs: int) -> Iterator[Batch]:
    """Yield batches without keeping them, since one that dies in a step would lower its peak."""
    yield from (_batch(run, first, pairs) for first in itertools.count(0, pairs))


def _batch(run: plan.Run, first: int, pairs: int) -> Batch:
    model, side, numbers = run.recipe.model, run.data.patch, torch.arange(first, first + pairs)
    generator = torch.Generator().manual_seed(first)
    hr = torch.rand(pairs, 3, side, side, generator=generator) * 2 - 1
    batch = Batch(hr, hr[..., ::4, ::4].clone(), numbers)
    if not run.latents:
        return batch
    cells = side // model.latent.factor
    latent = torch.rand(pairs, model.denoiser.latent_channels, cells, cells, generator=generator)
    return batch._replace(hr=torch.empty(pairs, 3, 0, 0), stored=Stored(latent))


def _state(run: plan.Run, trunk: Path) -> loop.TrainState:
    model, train = run.recipe.model, run.train
    experts = [LinearSR(model.denoiser) for _ in range(4)]
    trained, frozen = experts[run.expert or 0], experts.__getitem__
    if run.lora is not None:
        lora.inject(trained, run.lora)
    held = _Counting(trained, train, torch.device("cpu"))
    if run.lora is not None:
        adapters = {name: torch.rand(t.shape) for name, t in _adapters(run).items()}
        frozen = lora.sharing(held.module, run.lora, lambda _: adapters)
    objective = None
    if isinstance(train, PerceptualConfig):
        train = train.model_copy(update={"trunk": str(trunk)})
        objective = perceptual.objective(model, train, run.expert or 0, frozen, held)
    autoencoder = load_autoencoder(model.latent, "cpu", held.dtype)
    return loop.TrainState.start(held, autoencoder, train, None, objective)


def _adapters(run: plan.Run) -> dict[str, Tensor]:
    assert run.lora is not None
    return empty_adapters(run.recipe.model.denoiser, run.lora)


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _allocated(prof: profile) -> int:
    """Return the most bytes that the allocator held at once, more than at the beginning."""
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


class _Counting(ZeroEngine):
    """Also counts the gradients that one micro-batch leaves to the next."""

    gradients = 0

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        if last:
            self.gradients = _bytes(p.grad for p in lora.trained(self.module).values())
        super().backward(loss, last=last)


def _measure(recipe: Recipe, trunk: Path) -> dict[str, dict[str, int]]:
    """Take steps of each run, and return the bytes of this rank's parts after the first."""
    engine.BUCKET = BUCKET
    return {name: _measure_run(_run(recipe, name), trunk) for name in RUNS}


def _measure_run(run: plan.Run, trunk: Path) -> dict[str, int]:
    state = _state(run, trunk)
    held = state.engine
    assert isinstance(held, _Counting) and isinstance(state.autoencoder, DCAutoencoder)
    batches = _batches(run, run.data.batch // held.world)
    loop.run(state, batches, lambda *_: True)  # one step, after which all memory is there
    peaks = []
    for _ in range(STEPS):
        gc.collect()  # or tensors of this step that die in the next one would lower its peak
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
            loop.run(state, batches, lambda *_: True)
        peaks.append(_allocated(prof))
    zero = held.zero.optimizer
    states = [x for own in zero.optimizer.state.values() for x in own.values()]
    frozen = [getattr(state.objective, name, None) for name in ("first", "before")]
    own = {p.untyped_storage().data_ptr() for p in held.module.parameters()}
    sizes = {
        "weights": _bytes(held.module.parameters()),
        "gradients": held.gradients,
        "optimizer": _bytes(
            [*filter(torch.is_tensor, states), *zero.single_partition_of_fp32_groups]
        ),
        "ema": _bytes(state.ema.average.values()),
        # Beside latents in shards it is on the CPU, whose memory the plan does not count.
        "autoencoder": 0 if run.latents else _bytes(state.autoencoder.model.parameters()),
        "frozen": sum(
            _bytes(p for p in model.parameters() if p.untyped_storage().data_ptr() not in own)
            for model in frozen
            if model is not None
        ),
        "peak": max(peaks),
    }
    held.close()
    return sizes


@pytest.fixture(scope="module")
def measured(
    narrow: Recipe, lpips_trunk: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, dict[str, int]]]:
    folder = tmp_path_factory.mktemp("ranks") / "run"
    return launch(folder, _measure, GPUS, narrow, lpips_trunk)


@pytest.mark.parametrize("name", RUNS)
def test_plan_is_within_a_tenth_of_the_bytes_of_two_ranks(
    name: str, narrow: Recipe, measured: list[dict[str, dict[str, int]]]
) -> None:
    planned = plan.memory(_run(narrow, name), GPUS)
    for rank in measured:
        found = dict(rank[name])
        peak = found.pop("peak")
        for part, size in found.items():
            assert getattr(planned, part) == pytest.approx(size, rel=WITHIN), part
        activations = peak - found["gradients"] - 2 * BUCKET
        assert planned.working == pytest.approx(activations, rel=WITHIN)


def test_peak_counts_tensors_while_they_live_and_no_view_twice() -> None:
    start = torch.ones(1000)
    with count.Peak() as peak:
        twice = start * 2
        view = twice.view(10, 100)
        assert peak.bytes == 4000
        del twice, view
        assert peak.bytes == 0
        start.add_(1)
        kept = [torch.zeros(500, dtype=torch.bfloat16) for _ in range(2)]
    assert (peak.bytes, peak.peak) == (2000, 4000) and len(kept) == 2


def test_accumulation_and_checkpointing_lower_the_working_memory_alone(narrow: Recipe) -> None:
    run = _run(narrow, "pretraining")
    whole, parts, again = (
        plan.memory(run.changed(accumulation=a, activation_checkpointing=c), GPUS)
        for a, c in ((1, False), (4, False), (4, True))
    )
    assert whole.working > 3 * parts.working > 3 * again.working
    assert whole[:-1] == parts[:-1] == again[:-1]
    assert plan.pair_flops(run.changed(activation_checkpointing=True)) > plan.pair_flops(run)


def test_optimizer_and_average_are_shared_by_all_gpus(narrow: Recipe) -> None:
    run = _run(narrow, "pretraining")
    one, four = plan.memory(run, 1), plan.memory(run, 4)
    assert one.optimizer == pytest.approx(4 * four.optimizer, rel=1e-3)
    assert one.ema == pytest.approx(4 * four.ema, rel=1e-3)
    assert (one.weights, one.gradients) == (four.weights, four.gradients)


def test_the_advice_of_a_refusal_makes_the_run_fit(narrow: Recipe) -> None:
    """Every setting that the message names is applied, and the plan is then accepted."""
    found = plan.needs(narrow, GPUS)
    least = min(plan.memory(run.changed(accumulation=4), GPUS).total for run in plan.runs(narrow))
    limit = 1.01 * max(least, plan.memory(_run(narrow, "pretraining"), GPUS).total) / 0.9 / 1e9
    with pytest.raises(OptionError, match="can be used") as refused:
        plan.check(found, GPUS, limit)
    message = str(refused.value)
    assert "fine-tuning 3" in message and "--set finetune.3.accumulation=" in message
    words = message.replace(")", " ").replace(";", " ").split()
    settings = [after for word, after in itertools.pairwise(words) if word == "--set"]
    assert "--gpus" not in words
    plan.check(plan.needs(override(narrow, settings), GPUS), GPUS, limit)


def test_a_model_larger_than_any_gpu_is_refused_without_a_setting(narrow: Recipe) -> None:
    with pytest.raises(OptionError, match="take GPUs with more memory"):
        plan.check(plan.needs(narrow, GPUS), GPUS, 1e-6)


def test_gpus_that_cannot_share_a_batch_are_refused(narrow: Recipe) -> None:
    with pytest.raises(OptionError, match=r"data\.batch 8 cannot be shared by 3 workers"):
        plan.needs(narrow, 3)


def test_the_command_prints_all_parts_and_ends_with_two_if_it_cannot_fit(
    narrow: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [part for setting in NARROW for part in ("--set", setting)]
    source = narrow.model.latent.source
    words = ["--recipe=sana_1_6b", "--gpus=2", f"--set=model.latent.source={source}", *settings]
    assert job.run("plan", [*words, "--gpu-memory=80"]) == 0
    table = capsys.readouterr().out
    for name in ("pretraining", "fine-tuning 3", "perceptual 2-3", "activations", "EMA", "hours"):
        assert name in table
    assert job.run("plan", [*words, "--latents"]) == 0
    assert capsys.readouterr().out != table  # fewer hours
    assert job.run("plan", [*words, "--gpu-memory=0.05"]) == 2
    captured = capsys.readouterr()
    assert captured.out == table and "take GPUs with more memory" in captured.err
    assert job.run("plan", [*words, "--gpus=0"]) == 2
    assert "--gpus" in capsys.readouterr().err


def test_latents_of_a_folder_that_is_not_dc_ae_are_refused(narrow: Recipe, tmp_path: Path) -> None:
    latent = LatentConfig.model_validate(
        {**narrow.model.latent.model_dump(), "source": str(tmp_path)}
    )
    model = narrow.model.model_copy(update={"latent": latent})
    with pytest.raises(WeightsError, match="not a folder of an AutoencoderDC"):
        plan.needs(narrow.model_copy(update={"model": model}), GPUS)
