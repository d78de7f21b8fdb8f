"""The training loop on a tiny real model: it learns, resumes exactly, and refuses to go NaN."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from linearsr.config import ModelConfig
from linearsr.denoiser import LinearSR
from linearsr.errors import InputError
from linearsr.latent import SpaceToDepth
from linearsr.noise.experts import expert_at, ranges
from linearsr.training import loop
from linearsr.training.data import Batch, DataConfig, Patches
from linearsr.training.recipes import RECIPES

DATA = DataConfig(patch=32, batch=2, margin=8, degradations={"clean": 0.5, "mild": 0.5})


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name in ("astronaut", "coffee"):
        Image.fromarray(np.asarray(getattr(skimage.data, name)())).save(folder / f"{name}.png")
    return folder


def _config(**changes: object) -> loop.TrainConfig:
    base = {"steps": 6, "warmup": 2, "report_every": 2, "learning_rate": 2e-3}
    return loop.TrainConfig.model_validate({**base, **changes})


def _state(config: ModelConfig, train: loop.TrainConfig) -> loop.State:
    torch.manual_seed(0)
    return loop.start(LinearSR(config.denoiser), train)


def _weights(state: loop.State) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in state.model.parameters()])


def test_batches_are_seeded_and_keep_their_contract(photos: Path) -> None:
    first, again, other = (next(iter(Patches(photos, DATA, seed))) for seed in (1, 1, 2))
    assert torch.equal(first.hr, again.hr) and torch.equal(first.lr, again.lr)
    assert not torch.equal(first.hr, other.hr)
    assert first.hr.shape == (2, 3, 32, 32) and first.lr.shape == (2, 3, 8, 8)
    assert first.hr.min() >= -1 and first.hr.max() <= 1 and first.lr.abs().max() <= 1


def test_lr_lies_under_its_hr(photos: Path) -> None:
    """Downscaling the HR patch gives the clean LR patch: no shift between the two."""
    clean = DATA.model_copy(update={"degradations": {"clean": 1.0}})
    batch = next(iter(Patches(photos, clean, 3)))
    mean = torch.nn.functional.avg_pool2d(batch.hr, 4)
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    shifted = torch.roll(mean, 1, dims=-1)
    error, shifted_error = ((batch.lr - m)[inner].abs().mean() for m in (mean, shifted))
    assert error < 0.03 and error < shifted_error / 2


def test_too_small_or_no_photographs_are_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="photograph"):
        Patches(tmp_path, DATA, 0)
    with pytest.raises(InputError, match="2000 px"):
        Patches(photos, DataConfig(patch=2000), 0)


def test_training_lowers_the_loss_on_one_batch(small_config: ModelConfig, photos: Path) -> None:
    batches = itertools.repeat(next(iter(Patches(photos, DATA, 0))))
    train = _config(steps=60, timesteps={"at_one": 1.0}, report_every=20, decay=0.1)
    losses: list[float] = []
    ae = SpaceToDepth(small_config.latent)
    loop.run(_state(small_config, train), ae, batches, train, lambda s, r: losses.append(r.loss))
    assert losses[-1] < 0.9 * losses[0]


def test_resuming_gives_the_same_weights_as_never_stopping(
    small_config: ModelConfig, photos: Path, tmp_path: Path
) -> None:
    train = _config()
    ae = SpaceToDepth(small_config.latent)
    fixed = list(itertools.islice(Patches(photos, DATA, 0), 6))
    whole = loop.run(_state(small_config, train), ae, iter(fixed), train, lambda s, r: None)

    def save_at_four(state: loop.State, report: loop.Report) -> None:
        if report.step == 4:
            loop.save(state, tmp_path / "state.pt")

    loop.run(_state(small_config, train), ae, iter(fixed), train, save_at_four)
    resumed = _state(small_config, train)
    loop.restore(resumed, tmp_path / "state.pt")
    loop.run(resumed, ae, iter(fixed[4:]), train, lambda s, r: None)
    assert torch.equal(_weights(whole), _weights(resumed))
    for ours, theirs in zip(whole.ema.parameters(), resumed.ema.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_poisoned_batch_stops_training_before_it_reaches_the_weights(
    small_config: ModelConfig, photos: Path
) -> None:
    good = next(iter(Patches(photos, DATA, 0)))

    def batches() -> Iterator[Batch]:
        yield good
        yield Batch(good.hr * torch.nan, good.lr)

    train = _config()
    state = _state(small_config, train)
    with pytest.raises(loop.Diverged, match="step 1"):
        loop.run(state, SpaceToDepth(small_config.latent), batches(), train, lambda s, r: None)
    assert torch.isfinite(_weights(state)).all()
    assert state.step == 1


@pytest.mark.parametrize("expert", range(4))
def test_timesteps_stay_in_an_experts_range(small_config: ModelConfig, expert: int) -> None:
    bounds = small_config.sampling.boundaries
    low, high = ranges(bounds)[expert]
    config = loop.TimestepConfig(low=low, high=high, at_one=0.3)
    t = loop.draw_timesteps(4000, config, torch.Generator().manual_seed(0))
    assert {expert_at(x, bounds) for x in t.tolist()} == {expert}
    assert ((t == 1).float().mean().item() > 0.25) == (expert == 0)


def test_timesteps_follow_the_logit_normal() -> None:
    config = loop.TimestepConfig(mean=0.5, spread=1.0, at_one=0.0)
    t = loop.draw_timesteps(20000, config, torch.Generator().manual_seed(0))
    logits = torch.logit(t)
    assert logits.mean().item() == pytest.approx(0.5, abs=0.03)
    assert logits.std().item() == pytest.approx(1.0, abs=0.03)


def test_learning_rate_warms_up_holds_and_falls_to_zero() -> None:
    train = _config(steps=100, warmup=10, decay=0.5, learning_rate=1.0)
    rates = [loop.learning_rate(s, train) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[49] == 1
    assert rates[75] == pytest.approx(0.5) and rates[99] == pytest.approx(0.02)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_train_each_expert_on_its_own_range(name: str) -> None:
    recipe = RECIPES[name]()
    trained = [(e.timesteps.low, e.timesteps.high) for e in recipe.experts]
    assert trained == ranges(recipe.model.sampling.boundaries)
    LinearSR(recipe.model.denoiser)
