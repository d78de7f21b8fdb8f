"""The training loop on a tiny real model: it learns, resumes exactly, and stops before NaN."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from linearsr.config import ModelConfig
from linearsr.denoiser import LinearSR
from linearsr.diffusion.experts import expert_at, ranges
from linearsr.errors import InputError, WeightsError
from linearsr.latent import SpaceToDepth
from linearsr.tags.encoder import TagEncoder, tag_encoder
from linearsr.training import export, loop
from linearsr.training.config import TimestepConfig, TrainConfig
from linearsr.training.data import (
    Batch,
    Batches,
    DataConfig,
    Photo,
    Photos,
    load_photos,
    same,
    stream,
)
from linearsr.training.ema import EMA, load_average
from linearsr.training.engine import TorchEngine
from linearsr.training.guard import Diverged
from tests.helpers.experts import random_experts

DATA = DataConfig(patch=32, batch=2, margin=8, degradations={"clean": 0.5, "mild": 0.5})


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name in ("astronaut", "coffee"):
        Image.fromarray(np.asarray(getattr(skimage.data, name)())).save(folder / f"{name}.png")
    return folder


def _config(**changes: object) -> TrainConfig:
    base = {"steps": 6, "warmup": 2, "report_every": 2, "checkpoint_every": 2, "bfloat16": False}
    return TrainConfig.model_validate({**base, "learning_rate": 2e-3, **changes})


def _stage(
    config: ModelConfig, train: TrainConfig, encoder: TagEncoder | None = None
) -> loop.TrainState:
    torch.manual_seed(0)
    engine = TorchEngine(LinearSR(config.denoiser), train, torch.device("cpu"))
    return loop.TrainState.start(engine, SpaceToDepth(config.latent), train, encoder)


def _weights(stage: loop.TrainState) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in stage.engine.module.parameters()])


def _batches(photos: Path, seed: int = 0, start: int = 0) -> Iterator[Batch]:
    return iter(Batches(load_photos(photos, DATA, seed), start))


def _quiet(stage: loop.TrainState, report: loop.Report) -> None:
    pass


def test_batches_are_seeded_and_keep_their_contract(photos: Path) -> None:
    first, again, other = (next(_batches(photos, seed)) for seed in (1, 1, 2))
    assert torch.equal(first.hr, again.hr) and torch.equal(first.lr, again.lr)
    assert not torch.equal(first.hr, other.hr)
    assert first.hr.shape == (2, 3, 32, 32) and first.lr.shape == (2, 3, 8, 8)
    assert first.hr.min() >= -1 and first.hr.max() <= 1 and first.lr.abs().max() <= 1


def test_a_pair_depends_on_its_number_only(photos: Path) -> None:
    """The order of data survives a restart, and is the same from one process or three."""
    later = next(_batches(photos, start=4))
    fourth = list(itertools.islice(_batches(photos), 3))[2]
    assert torch.equal(later.hr, fourth.hr) and later.numbers.tolist() == [4, 5]
    many = itertools.islice(stream(photos, DATA, 0, workers=3), 7)
    for ours, theirs in zip(_batches(photos), many, strict=False):
        assert torch.equal(ours.numbers, theirs.numbers) and torch.equal(ours.lr, theirs.lr)


@pytest.fixture
def named(photos: Path, tmp_path: Path) -> Path:
    """Photographs, and the output of `linearsr tag --json` for only one of them."""
    for path in photos.iterdir():
        shutil.copy(path, tmp_path)
    tags = [{"name": "face", "score": 0.9}, {"name": "flag", "score": 0.8}]
    lines = [{"file": "p/astronaut.png", "tags": tags}, {"file": "p/gone.png", "tags": []}]
    (tmp_path / "tags.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def test_tags_come_with_their_photograph_and_change_no_pixel(named: Path, photos: Path) -> None:
    """A pair is one of two crops; its tags are those of the photograph of that crop."""
    config = DATA.model_copy(update={"degradations": {"clean": 1.0}, "tag_dropout": 0.0})
    tagged, bare = (load_photos(folder, config, 0) for folder in (named, photos))
    astronaut = tagged.photos[0]()
    assert astronaut.tags == ("face", "flag")
    pairs = [tagged.pair(n) for n in range(10)]
    assert {pair.tags for pair in pairs} == {("face", "flag"), ()}
    for number, pair in enumerate(pairs):
        assert torch.equal(pair.lr, bare.pair(number).lr) and not bare.pair(number).tags
    # The colours tell which photograph a pair is from; its tags must agree.
    plain = [Photo(torch.full((3, 48, 48), s).byte(), (str(s),)) for s in (0, 255)]
    source = Photos([partial(same, photo) for photo in plain], config, 0)
    for pair in map(source.pair, range(20)):
        assert pair.tags == (str(int(pair.hr.float().mean().round())),)


def test_tags_are_dropped_as_often_as_asked_and_by_number(named: Path) -> None:
    photo = Photo(torch.zeros(3, 48, 48).byte(), ("night",))
    config = DATA.model_copy(update={"tag_dropout": 0.3, "degradations": {"clean": 1.0}})
    source = Photos([partial(same, photo)], config, 0)
    kept = [bool(source.pair(n).tags) for n in range(100)]
    assert 55 <= sum(kept) <= 85 and kept[:20] == [bool(source.pair(n).tags) for n in range(20)]
    batches = itertools.islice(stream(named, DATA, 0, workers=2), 3)
    for ours, theirs in zip(_batches(named), batches, strict=False):
        assert ours.tags == theirs.tags and len(ours.tags) == 2


@pytest.mark.parametrize(
    ("sidecar", "message"),
    [
        ("[1]", "not made by"),
        ('{"file": "astronaut.png", "tags": "cat"}', "not made by"),
        ("{", "not made by"),
        ('{"file": "p/tronaut.png", "tags": ["cat"]}', "lists none of the pictures"),
    ],
)
def test_an_invalid_tag_sidecar_is_refused(named: Path, sidecar: str, message: str) -> None:
    (named / "tags.jsonl").write_text(sidecar)
    with pytest.raises(InputError, match=rf"tags\.jsonl: {message}"):
        load_photos(named, DATA, 0)


def test_tags_change_training_and_their_absence_does_not(
    tagged_config: ModelConfig, photos: Path
) -> None:
    """The loss of a pair without tags is that of a model that gets no tags."""
    [model], latent = random_experts(tagged_config, 1), SpaceToDepth(tagged_config.latent)
    batch, encoder = next(_batches(photos)), tag_encoder(tagged_config)

    def losses(*tags: tuple[str, ...], encoder: TagEncoder | None = encoder) -> torch.Tensor:
        named = batch._replace(tags=tags)
        return loop.flow_loss(model, latent, named, _config(), encoder)[0].detach()

    without = losses(encoder=None)
    torch.testing.assert_close(losses((), ()), without)
    torch.testing.assert_close(losses(), without)
    mixed = losses(("cat", "grass"), ())
    torch.testing.assert_close(mixed[1], without[1])
    assert (mixed[0] - without[0]).abs() > 1e-4
    assert (mixed - losses(("dog",), ())).abs()[0] > 1e-5


def test_cross_attention_learns_from_tags_only(
    tagged_config: ModelConfig, named: Path, photos: Path
) -> None:
    for folder, learns in ((named, True), (photos, False)):
        stage = _stage(tagged_config, _config(steps=4), tag_encoder(tagged_config))
        before = {n: p.clone() for n, p in stage.engine.module.named_parameters()}
        after = dict(loop.run(stage, _batches(folder), _quiet).engine.module.named_parameters())
        moved = [n for n, p in before.items() if "tag" in n and not torch.equal(p, after[n])]
        assert bool(moved) == learns


def test_lr_lies_under_its_hr(photos: Path) -> None:
    """The downscaled HR patch is the clean LR patch, so there is no shift between the two."""
    clean = DATA.model_copy(update={"degradations": {"clean": 1.0}})
    batch = next(iter(Batches(load_photos(photos, clean, 3), 0)))
    mean = torch.nn.functional.avg_pool2d(batch.hr, 4)
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    shifted = torch.roll(mean, 1, dims=-1)
    error, shifted_error = ((batch.lr - m)[inner].abs().mean() for m in (mean, shifted))
    assert error < 0.03 and error < shifted_error / 2


MIXED = DATA.model_copy(update={"scales": (1.0, 4.0), "at_largest": 0.5})


def test_a_batch_has_one_scale_that_its_number_alone_decides(photos: Path) -> None:
    ours = list(itertools.islice(iter(Batches(load_photos(photos, MIXED, 0), 0)), 40))
    sides = [batch.lr.shape[-1] for batch in ours]
    assert set(sides) <= {8, 12, 16, 20, 24, 28, 32} and len(set(sides)) > 3
    assert 10 <= sides.count(8) <= 30
    assert all(batch.hr.shape == (2, 3, 32, 32) for batch in ours)
    later = itertools.islice(stream(photos, MIXED, 0, start=20, workers=2), 10)
    for batch, same_batch in zip(ours[10:20], later, strict=True):
        assert torch.equal(batch.lr, same_batch.lr)
    # Another batch size is another run; only pairs of the largest scale stay the same.
    assert [MIXED.scale_of(0, n) for n in (0, 1)] == [4 * 8 / sides[0]] * 2


def test_scales_below_the_largest_are_even_in_their_logarithm() -> None:
    config = DataConfig(batch=1, scales=(1.0, 4.0), at_largest=0.25)
    drawn = [config.scale_of(7, n) for n in range(4000)]
    smaller = np.array([s for s in drawn if s < 4])
    assert len(smaller) / 4000 == pytest.approx(0.75, abs=0.02)
    assert set(np.round(96 / smaller, 6) % 6) == {0.0} and smaller.min() == 1
    # Half of the scales between 1 and 4 (edges of bins) are below 2.
    assert (smaller < 1.94).mean() == pytest.approx(0.5, abs=0.05)


def test_lr_lies_under_its_hr_at_every_scale(photos: Path) -> None:
    clean = MIXED.model_copy(update={"degradations": {"clean": 1.0}})
    for batch in itertools.islice(iter(Batches(load_photos(photos, clean, 3), 0)), 12):
        up = torch.nn.functional.interpolate(batch.lr, (32, 32), mode="bicubic", antialias=True)
        errors = [
            (torch.roll(up, shift, dims=-1) - batch.hr)[..., 4:-4, 4:-4].abs().mean().item()
            for shift in (0, 1, -1)
        ]
        assert errors[0] == min(errors)


def test_at_largest_one_gives_the_pairs_of_a_single_scale(photos: Path) -> None:
    """The draw of a scale is independent of the draws of a pair, so crops and pixels are equal."""
    alone, often = (
        load_photos(photos, config, 0)
        for config in (DATA, MIXED.model_copy(update={"at_largest": 1.0}))
    )
    for number in range(6):
        for a, b in zip(alone.pair(number)[:2], often.pair(number)[:2], strict=True):
            assert torch.equal(a, b)


def test_clean_pairs_are_rare_where_they_would_be_the_truth_itself() -> None:
    config = DataConfig(scales=(1.0, 4.0), clean_near_one=0.05)
    near, far = config.presets_at(1.2), config.presets_at(1.5)
    assert far == config.degradations
    assert near["clean"] == pytest.approx(0.05) and sum(near.values()) == pytest.approx(1)
    assert near["mild"] / near["seesr"] == pytest.approx(far["mild"] / far["seesr"])
    only = DataConfig(scales=(1.0, 4.0), degradations={"clean": 1.0})
    assert only.presets_at(1.0) == {"clean": 1.0}


@pytest.mark.parametrize("scales", [(0.5, 4.0), (1.0, 3.0), (3.0, 2.0)])
def test_scales_that_cannot_be_drawn_are_refused(scales: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="must lie from 1 to the scale, 4"):
        DataConfig(scales=scales)


def test_too_small_or_no_photographs_are_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="photograph"):
        load_photos(tmp_path, DATA, 0)
    with pytest.raises(InputError, match="2032 px"):
        load_photos(photos, DataConfig(patch=2000), 0)


def test_training_lowers_the_loss_on_one_batch(small_config: ModelConfig, photos: Path) -> None:
    batches = itertools.repeat(next(_batches(photos)))
    train = _config(
        steps=60, timesteps={"at_one": 1.0}, report_every=20, checkpoint_every=20, decay=0.1
    )
    stage = loop.run(_stage(small_config, train), batches, _quiet)
    losses = [h["loss"] for h in stage.progress.history]
    assert losses[-1] < 0.9 * losses[0]


def test_resuming_gives_the_same_weights_as_never_stopping(
    small_config: ModelConfig, photos: Path, tmp_path: Path
) -> None:
    train = _config()
    whole = loop.run(_stage(small_config, train), _batches(photos), _quiet)

    def save_at_four(stage: loop.TrainState, report: loop.Report) -> bool:
        if report.step == 4:
            stage.save(tmp_path)
        return report.step == 4

    stopped = loop.run(_stage(small_config, train), _batches(photos), save_at_four)
    assert stopped.progress.step == 4
    resumed = _stage(small_config, train)
    resumed.load(tmp_path)
    loop.run(resumed, _batches(photos, start=resumed.progress.seen), _quiet)
    assert torch.equal(_weights(whole), _weights(resumed))
    assert [h["loss"] for h in whole.progress.history] == [
        h["loss"] for h in resumed.progress.history
    ]
    for name, average in whole.ema.average.items():
        assert torch.equal(average, resumed.ema.average[name])


def test_a_checkpoint_of_another_config_is_refused(
    small_config: ModelConfig, tmp_path: Path
) -> None:
    _stage(small_config, _config()).save(tmp_path)
    wider = small_config.denoiser.model_copy(update={"width": 48})
    other = small_config.model_copy(update={"denoiser": wider})
    with pytest.raises(WeightsError, match="cannot be resumed"):
        _stage(other, _config()).load(tmp_path)
    with pytest.raises(WeightsError, match="do not fit the config"):
        export.average(tmp_path, other)


def test_the_average_is_the_same_kept_by_one_rank_or_by_three(
    small_config: ModelConfig, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = LinearSR(small_config.denoiser)
    averages = [EMA(model, 0.9, rank, 3) for rank in range(3)]
    whole = EMA(model, 0.9)
    for step in range(3):
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter))
        for average in (*averages, whole):
            average.update(step)
    sizes = [sum(t.numel() for t in a.average.values()) for a in averages]
    assert max(sizes) < 1.5 * min(sizes)
    for average in averages[:2]:
        average.save(tmp_path)
    with pytest.raises(WeightsError, match=r"found 2 of 3 files ema"):
        load_average(tmp_path)
    averages[2].save(tmp_path)
    together = load_average(tmp_path)
    assert together.keys() == whole.average.keys()
    assert all(torch.equal(t, whole.average[name]) for name, t in together.items())


def test_a_poisoned_batch_stops_training_before_it_reaches_the_weights(
    small_config: ModelConfig, photos: Path, tmp_path: Path
) -> None:
    good = next(_batches(photos))

    def batches() -> Iterator[Batch]:
        yield good
        yield good._replace(hr=good.hr * torch.nan)

    stage = _stage(small_config, _config())
    with pytest.raises(Diverged, match="step 1"):
        loop.run(stage, batches(), _quiet)
    assert torch.isfinite(_weights(stage)).all()
    assert stage.progress.step == 1


def test_a_rate_a_thousand_times_too_high_is_stopped(
    small_config: ModelConfig, photos: Path
) -> None:
    train = _config(steps=200, learning_rate=2.0)
    stage = _stage(small_config, train)
    with pytest.raises(Diverged):
        loop.run(stage, itertools.repeat(next(_batches(photos))), _quiet)
    assert stage.progress.step < 60


def test_a_weight_that_is_not_finite_is_never_written(
    small_config: ModelConfig, tmp_path: Path
) -> None:
    stage = _stage(small_config, _config())
    next(stage.engine.module.parameters()).data.view(-1)[0] = torch.nan
    with pytest.raises(Diverged, match="nothing was saved"):
        stage.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_pixel_loss_counts_at_high_snr_only(small_config: ModelConfig, photos: Path) -> None:
    batch = next(_batches(photos))
    model, latent = LinearSR(small_config.denoiser), SpaceToDepth(small_config.latent)

    def loss(low: float, high: float, weight: float) -> float:
        span = {"low": low, "high": high, "at_one": 0.0}
        train = _config(timesteps=span, pixel_weight=weight)
        return loop.flow_loss(model, latent, batch, train)[0].mean().item()

    assert loss(0.3, 1.0, 1.0) == loss(0.3, 1.0, 0.0)
    assert loss(0.0, 0.2, 1.0) > loss(0.0, 0.2, 0.0)


@pytest.mark.parametrize("expert", range(4))
def test_timesteps_stay_in_an_experts_range(small_config: ModelConfig, expert: int) -> None:
    bounds = small_config.sampling.boundaries
    low, high = ranges(bounds)[expert]
    config = TimestepConfig(low=low, high=high, at_one=0.3)
    t = loop.draw_timesteps(torch.rand(4000, 2), config)
    assert {expert_at(x, bounds) for x in t.tolist()} == {expert}
    assert ((t == 1).float().mean().item() > 0.25) == (expert == 0)


def test_timesteps_follow_the_logit_normal() -> None:
    config = TimestepConfig(mean=0.5, spread=1.0, at_one=0.0)
    logits = torch.logit(loop.draw_timesteps(torch.rand(20000, 2), config))
    assert logits.mean().item() == pytest.approx(0.5, abs=0.03)
    assert logits.std().item() == pytest.approx(1.0, abs=0.03)


def test_draws_of_neighbouring_pairs_are_independent() -> None:
    t, noise = loop.draw(torch.arange(400), torch.Size([4, 3, 3]), _config())
    flat = noise.flatten(1)
    assert abs(flat.mean()) < 0.05 and abs(flat.std() - 1) < 0.05
    correlation = (flat[:-1] * flat[1:]).mean(dim=1)
    assert correlation.mean().abs() < 0.03
    assert torch.logit(t[t < 1]).std() > 0.8


def test_learning_rate_warms_up_holds_falls_to_zero_and_is_lowered_by_restarts() -> None:
    train = _config(steps=100, warmup=10, decay=0.5, learning_rate=1.0)
    rates = [loop.learning_rate(s, train) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[49] == 1
    assert rates[75] == pytest.approx(0.5) and rates[99] == pytest.approx(0.02)
    assert loop.learning_rate(20, train, attempt=2) == pytest.approx(0.09)


def test_the_rate_follows_steps_or_minutes_whichever_is_further() -> None:
    train = _config(steps=100, warmup=1, decay=0.5, learning_rate=1.0, minutes=10)
    assert loop.learning_rate(20, train, minutes=2.0) == 1
    assert loop.learning_rate(20, train, minutes=7.5) == pytest.approx(0.5)
    assert loop.learning_rate(75, train, minutes=2.0) == pytest.approx(0.5)
    assert loop.learning_rate(90, train, minutes=7.5) == pytest.approx(0.2)
    assert loop.learning_rate(20, train, minutes=11.0) == 0


def _clock(seconds: float) -> Callable[[], float]:
    """Return a clock that advances by so many seconds at each call."""
    return map(seconds.__mul__, itertools.count()).__next__


def test_a_stage_ends_with_its_minutes_and_goes_on_with_what_is_left(
    small_config: ModelConfig, photos: Path, tmp_path: Path
) -> None:
    train = _config(steps=50, minutes=2.0, report_every=1, checkpoint_every=1)

    def begin() -> loop.TrainState:
        stage = _stage(small_config, train)
        stage.clock = _clock(20)
        return stage

    def save_at_four(stage: loop.TrainState, report: loop.Report) -> bool:
        if report.step == 4:
            stage.save(tmp_path)
        return report.step == 4

    whole = loop.run(begin(), _batches(photos), _quiet)
    assert whole.progress.step == 6 and whole.finished
    assert [h["step"] for h in whole.progress.history] == [1, 2, 3, 4, 5, 6]
    loop.run(begin(), _batches(photos), save_at_four)
    resumed = begin()
    resumed.load(tmp_path)
    assert resumed.progress.minutes == pytest.approx(4 / 3) and not resumed.finished
    loop.run(resumed, _batches(photos, start=resumed.progress.seen), _quiet)
    assert resumed.progress.step == 6 and torch.equal(_weights(whole), _weights(resumed))
    # Nothing is left of the same budget; a larger one has time left.
    again = loop.run(resumed, iter(()), _quiet)
    assert again.progress.step == 6
    resumed.config = train.model_copy(update={"minutes": 2.5})
    assert not resumed.finished


def test_a_stage_with_time_left_ends_with_its_steps(
    small_config: ModelConfig, photos: Path
) -> None:
    stage = _stage(small_config, _config(minutes=60.0))
    stage.clock = _clock(1)
    loop.run(stage, _batches(photos), _quiet)
    assert stage.progress.step == 6 and stage.progress.minutes == pytest.approx(0.1)


def test_checkpoints_without_minutes_are_read(small_config: ModelConfig, tmp_path: Path) -> None:
    """Such checkpoints were written before there was a budget."""
    _stage(small_config, _config()).save(tmp_path)
    progress = json.loads((tmp_path / loop.PROGRESS).read_text())
    del progress["minutes"]
    (tmp_path / loop.PROGRESS).write_text(json.dumps(progress))
    assert loop.read_progress(tmp_path).minutes == 0


# Accumulation and checkpointing

# Roundings of float32 that sums in another order may differ by, of the norm of a gradient.
FLOAT32 = 64 * torch.finfo(torch.float32).eps
WIDER = DATA.model_copy(update={"batch": 6})


def _gradient(stage: loop.TrainState, batch: Batch) -> torch.Tensor:
    """Return the gradient that one step of the loop takes."""
    taken: list[torch.Tensor] = []
    step = stage.engine.step

    def note(rate: float) -> float:
        gradients = [p.grad for p in stage.engine.module.parameters() if p.grad is not None]
        taken.append(torch.cat([gradient.flatten().clone() for gradient in gradients]))
        return step(rate)

    stage.engine.step = note  # type: ignore[method-assign]
    loop.run(stage, iter([batch]), lambda *_: True)
    return taken[0]


def _random_stage(config: ModelConfig, train: TrainConfig) -> loop.TrainState:
    [model] = random_experts(config, 1)
    encoder = tag_encoder(config)
    engine = TorchEngine(model, train, torch.device("cpu"))
    return loop.TrainState.start(engine, SpaceToDepth(config.latent), train, encoder)


@pytest.mark.parametrize("accumulation", [2, 3, 6])
@pytest.mark.parametrize("changes", [{}, {"pixel_weight": 1.0, "pixel_below": 0.9}])
def test_micro_batches_add_up_to_the_gradient_of_the_whole_batch(
    tagged_config: ModelConfig, photos: Path, accumulation: int, changes: dict[str, float]
) -> None:
    """Some pairs have tags, and some are near enough for the pixel loss."""
    batch = next(iter(Batches(load_photos(photos, WIDER, 0), 0)))
    batch = batch._replace(tags=(("cat",), (), ("dog", "grass"), (), (), ("woman",)))
    whole, parts = (
        _gradient(_random_stage(tagged_config, train), batch)
        for train in (
            _config(report_every=1, **changes),
            _config(report_every=1, accumulation=accumulation, **changes),
        )
    )
    assert (whole - parts).norm() <= FLOAT32 * whole.norm()


def test_accumulation_changes_no_report(small_config: ModelConfig, photos: Path) -> None:
    histories = []
    for accumulation in (1, 3):
        train = _config(steps=4, report_every=1, accumulation=accumulation)
        batches = iter(Batches(load_photos(photos, WIDER, 0), 0))
        stage = loop.run(_stage(small_config, train), batches, _quiet)
        assert (stage.progress.step, stage.progress.seen) == (4, 24)
        histories.append(stage.progress.history)
    for whole, parts in zip(*histories, strict=True):
        for name in set(whole) - {"images_per_second"}:
            assert parts[name] == pytest.approx(whole[name], rel=1e-3), name


@pytest.mark.parametrize("bfloat16", [False, True])
def test_checkpointed_blocks_have_the_same_gradient_and_keep_less(
    small_config: ModelConfig, photos: Path, bfloat16: bool
) -> None:
    """A block is computed again by the same operations, so not even rounding differs."""
    denoiser = small_config.denoiser.model_copy(update={"depth": 6})
    config = small_config.model_copy(update={"denoiser": denoiser})
    batch, gradients, kept = next(_batches(photos)), [], []
    for checkpointing in (False, True):
        train = _config(report_every=1, activation_checkpointing=checkpointing, bfloat16=bfloat16)
        stage, storages = _random_stage(config, train), {}

        def keep(tensor: torch.Tensor, storages: dict[int, int] = storages) -> torch.Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            gradients.append(_gradient(stage, batch))
        kept.append(sum(storages.values()))
    assert torch.equal(*gradients)
    assert kept[1] < 0.5 * kept[0]


def test_a_poisoned_micro_batch_stops_training_before_it_reaches_the_weights(
    small_config: ModelConfig, photos: Path
) -> None:
    """The second micro-batch of three is poisoned; the other two are fine."""
    batch = next(iter(Batches(load_photos(photos, WIDER, 0), 0)))
    batch.hr[2] = torch.nan
    stage = _stage(small_config, _config(accumulation=3, activation_checkpointing=True))
    before = _weights(stage)
    with pytest.raises(Diverged, match="step 0: not finite"):
        loop.run(stage, iter([batch]), _quiet)
    assert torch.equal(before, _weights(stage))


def test_the_guard_sees_the_largest_activation_of_all_micro_batches(
    small_config: ModelConfig, photos: Path
) -> None:
    batch = next(iter(Batches(load_photos(photos, WIDER, 0), 0)))
    batch.hr[0] *= 100
    peaks = []
    for accumulation in (1, 6):
        train = _config(report_every=1, accumulation=accumulation)
        stage = loop.run(_random_stage(small_config, train), iter([batch]), lambda *_: True)
        peaks.append(stage.progress.history[0]["activation"])
    assert peaks[1] == pytest.approx(peaks[0], rel=1e-5)


def test_a_batch_that_cannot_be_split_evenly_is_refused(
    small_config: ModelConfig, photos: Path
) -> None:
    with pytest.raises(ValueError, match="2 pairs cannot be split into 3 equal parts"):
        loop.run(_stage(small_config, _config(accumulation=3)), _batches(photos), _quiet)
