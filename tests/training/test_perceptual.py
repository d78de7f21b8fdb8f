"""The perceptual stage: its losses, its starting points, and exact resuming."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from linearsr.config import DenoiserConfig, LatentConfig, ModelConfig
from linearsr.denoiser import LinearSR
from linearsr.diffusion.experts import ranges
from linearsr.diffusion.path import clean_guess, euler_step
from linearsr.errors import LinearSRError, WeightsError
from linearsr.imaging.resample import resize
from linearsr.latent import Autoencoder, DCAutoencoder, SpaceToDepth
from linearsr.tags.encoder import tag_encoder
from linearsr.training import discriminator, loop, perceptual
from linearsr.training.config import PerceptualConfig
from linearsr.training.data import Batch
from linearsr.training.engine import TorchEngine
from linearsr.training.guard import Diverged
from tests.helpers.experts import random_experts
from tests.helpers.lpips_trunk import real_lpips_trunk

CPU = torch.device("cpu")
REAL_TRUNK = real_lpips_trunk()
# A small config with a discriminator and several detours in few steps.
QUICK = {
    "steps": 6,
    "warmup": 2,
    "learning_rate": 2e-3,
    "report_every": 2,
    "checkpoint_every": 2,
    "betas": (0.5, 0.99),
    "channels": (8, 8, 8, 8, 8),
    "gan": 0.1,
    "gan_warmup": 4,
    "detour": 0.5,
}


def config_of(model: ModelConfig, expert: int, trunk: Path, **changes: object) -> PerceptualConfig:
    low, high = ranges(model.sampling.boundaries)[expert]
    span = {"low": low, "high": high}
    fields = {**QUICK, "timesteps": span, "trunk": str(trunk), **changes}
    return PerceptualConfig.model_validate(fields)


def stage_of(
    model: ModelConfig,
    config: PerceptualConfig,
    expert: int = 2,
    autoencoder: Autoencoder | None = None,
) -> loop.TrainState:
    experts = random_experts(model, len(model.sampling.boundaries) + 1)
    denoiser = LinearSR(model.denoiser)
    denoiser.load_state_dict(experts[expert].state_dict())
    engine = TorchEngine(denoiser, config, CPU)
    objective = perceptual.objective(model, config, expert, experts.__getitem__, engine)
    encoder = tag_encoder(model) if model.tags else None
    autoencoder = autoencoder or SpaceToDepth(model.latent)
    return loop.TrainState.start(engine, autoencoder, config, encoder, objective)


def objective_of(stage: loop.TrainState) -> perceptual.Perceptual:
    assert isinstance(stage.objective, perceptual.Perceptual)
    return stage.objective


def batches(start: int = 0, size: int = 3, side: int = 32) -> Iterator[Batch]:
    for first in itertools.count(start, size):
        numbers = range(first, first + size)
        coarse = np.stack([np.random.default_rng(n).standard_normal((3, 8, 8)) for n in numbers])
        hr = resize(torch.from_numpy(coarse).float(), side, side).tanh()
        yield Batch(hr, resize(hr, side // 4, side // 4), torch.tensor(numbers))


def quiet(stage: loop.TrainState, report: loop.Report) -> None:
    pass


def weights_of(stage: loop.TrainState) -> Tensor:
    critic = objective_of(stage).critic
    models = [stage.engine.module, *([critic.model] if critic else [])]
    return torch.cat([p.detach().flatten() for m in models for p in m.parameters()])


# Losses


def test_hinge_loss_equals_its_formula() -> None:
    real, fake = (
        [torch.randn(3, 1, n, n, generator=torch.Generator().manual_seed(s)) for n in (4, 2)]
        for s in (0, 1)
    )
    expected = np.mean(
        [
            np.maximum(0, 1 - r.double().numpy()).mean()
            + np.maximum(0, 1 + f.double().numpy()).mean()
            for r, f in zip(real, fake, strict=True)
        ]
    )
    assert discriminator.hinge(real, fake).item() == pytest.approx(expected, rel=1e-6)
    each = [np.mean([-f[i].double().mean().item() for f in fake]) for i in range(3)]
    assert discriminator.fooled(fake).tolist() == pytest.approx(each, rel=1e-5)
    assert discriminator.hinge([torch.tensor([2.0])], [torch.tensor([-2.0])]) == 0


def test_discriminator_is_spectrally_normalised_and_judges_two_scales() -> None:
    torch.manual_seed(0)
    model = discriminator.Discriminator((48, 48, 96, 192, 192))
    pictures = torch.randn(2, 3, 96, 96), torch.randn(2, 3, 96, 96)
    for _ in range(30):  # each pass in training estimates the largest singular value better
        scores = model(*pictures)
    assert [tuple(s.shape) for s in scores] == [(2, 1, 12, 12), (2, 1, 6, 6)]
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [48, 48, 96, 192, 192, 1]
    for convolution in convolutions:
        matrix = convolution.weight.detach().double().flatten(1).numpy()
        assert np.linalg.svd(matrix, compute_uv=False)[0] == pytest.approx(1, rel=0.05)
    other = model(pictures[0], pictures[1].flip(0))
    assert not torch.allclose(scores[0], other[0]), "the LR picture is an input too"


def test_the_distance_is_weighted_l1_and_lpips(
    small_config: ModelConfig, lpips_trunk: Path
) -> None:
    """The truth is LPIPS in float64, written out from the paper's formula (1)."""
    config = config_of(small_config, 2, lpips_trunk, l1=3.0, lpips=0.5)
    objective = objective_of(stage_of(small_config, config))
    assert objective.lpips is not None
    batch = next(batches(size=2, side=64))
    other = next(batches(start=9, size=2, side=64)).hr
    judge = objective.lpips.double()
    scaled = [judge.scaling_layer(p.double()) for p in (other, batch.hr)]
    lpips = torch.zeros(2, dtype=torch.float64)
    features = zip(*(judge.net(p) for p in scaled), judge.lins, strict=True)
    for a, b, linear in features:
        units = [f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10) for f in (a, b)]
        weights = linear.model[-1].weight[0, :, 0, 0]
        change = (units[0] - units[1]).square()
        lpips += (change * weights[None, :, None, None]).sum(1).mean((1, 2))
    l1 = (other - batch.hr).double().abs().flatten(1).mean(1)
    judge.float()
    distance = objective.distance(other, batch.hr)
    assert lpips.min() > 0
    torch.testing.assert_close(distance.double(), 3.0 * l1 + 0.5 * lpips, rtol=1e-4, atol=1e-6)


def test_gan_weight_grows_until_its_warmup_ends(
    small_config: ModelConfig, lpips_trunk: Path
) -> None:
    stage = stage_of(small_config, config_of(small_config, 2, lpips_trunk))
    objective, batch = objective_of(stage), next(batches())
    extra = {}
    for step in (0, 1, 4, 40):
        stage.progress.step = step
        total, parts, _ = objective.losses(stage, batch)
        assert (parts > 0).all()
        assert objective.critic is not None
        real, fake, lr_picture = objective.shown[-1]
        assert torch.equal(real, batch.hr) and not fake.requires_grad
        extra[step] = (total - parts).detach()
        with torch.no_grad():
            fooling = discriminator.fooled(objective.critic.model(fake, lr_picture))
        weight = 0.1 * min(1.0, step / 4)
        torch.testing.assert_close(extra[step], weight * fooling, rtol=0.1, atol=1e-4)
    assert not extra[0].any() and extra[4].abs().min() > extra[1].abs().min() > 0


def test_discriminator_learns_to_tell_real_from_generated(
    small_config: ModelConfig, lpips_trunk: Path
) -> None:
    critic = perceptual.Critic(
        config_of(small_config, 2, lpips_trunk, discriminator_rate=5e-3), CPU
    )
    engine = stage_of(small_config, config_of(small_config, 2, lpips_trunk)).engine
    batch = next(batches(size=4))
    lr_picture = resize(batch.lr, 32, 32)
    shown = [perceptual.Shown(batch.hr, -batch.hr, lr_picture)]
    losses = [critic.step(shown, engine, 1.0) for _ in range(40)]
    assert losses[0] == pytest.approx(2, abs=0.3) and losses[-1] < 0.7 * losses[0]
    still = [p.detach().clone() for p in critic.model.parameters()]
    critic.step([perceptual.Shown(batch.hr, lr_picture, lr_picture)], engine, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(still, critic.model.parameters(), strict=True))


# The starting points of the trained expert


@pytest.mark.parametrize("expert", [1, 2, 3])
def test_pairs_arrive_as_sampling_brings_them(
    small_config: ModelConfig, lpips_trunk: Path, expert: int
) -> None:
    """Each way is repeated pair by pair: direct, by the previous expert, by the trained one."""
    config = config_of(small_config, expert, lpips_trunk)
    stage, batch = stage_of(small_config, config, expert), next(batches(size=24))
    objective, experts = objective_of(stage), random_experts(small_config, 4)
    bounds = ranges(small_config.sampling.boundaries)
    with torch.no_grad():
        conditions = loop.Conditions.of(batch, stage.engine.module, stage.autoencoder, None)
        latent, t = objective.arrive(stage, batch, conditions)
        middle, by_before, by_itself = objective._detours(batch.numbers, t)
        drawn, noise = loop.draw(batch.numbers, latent.shape[1:], config)
        assert torch.equal(drawn, t) and t.unique().numel() == 24
        assert ((bounds[expert][0] < t) & (t <= bounds[expert][1])).all()
        assert by_itself.any() and by_before.any() == (expert > 1)
        assert 4 < (by_before | by_itself).sum() < 20 and not (by_before & by_itself).any()
        for i in range(24):
            z, at, end = noise[i : i + 1], torch.ones(1), t[i : i + 1]
            condition = conditions.only(torch.arange(24) == i).encode
            if by_before[i] or by_itself[i]:
                other = expert if by_itself[i] else expert - 1
                stop = middle[i : i + 1]
                assert bounds[other][0] < stop <= bounds[other][1] and stop >= end
                z = euler_step(z, experts[0](z, at, condition(experts[0])), at, stop)
                z = euler_step(z, experts[other](z, stop, condition(experts[other])), stop, end)
            else:
                z = euler_step(z, experts[0](z, at, condition(experts[0])), at, end)
            torch.testing.assert_close(latent[i : i + 1], z, rtol=1e-4, atol=1e-4)


def test_the_picture_that_is_judged_is_the_decoded_guess(
    small_config: ModelConfig, lpips_trunk: Path
) -> None:
    stage, batch = stage_of(small_config, config_of(small_config, 2, lpips_trunk)), next(batches())
    objective, model = objective_of(stage), stage.engine.module
    objective.losses(stage, batch)
    with torch.no_grad():
        conditions = loop.Conditions.of(batch, model, stage.autoencoder, None)
        latent, t = objective.arrive(stage, batch, conditions)
        guess = clean_guess(latent, model(latent, t, conditions.encode(model)), t)
        picture = stage.autoencoder.decode(guess, conditions.lr_picture)
    torch.testing.assert_close(objective.shown[0].fake, picture)


def test_a_crop_is_judged_where_it_lies(small_config: ModelConfig, lpips_trunk: Path) -> None:
    """With a lossless latent, the judged crop is that of the picture; each pair has its own."""
    whole, part = (
        stage_of(small_config, config_of(small_config, 2, lpips_trunk, crop=crop))
        for crop in (None, 5)
    )
    batch = next(batches(size=6, side=64))
    shown = []
    for stage in (whole, part):
        objective_of(stage).losses(stage, batch)
        shown.append(objective_of(stage).shown[0])
    places = set()
    for i in range(6):
        rng = np.random.default_rng([0, i, 4])
        top, left = (4 * int(rng.integers(16 - 5 + 1)) for _ in range(2))
        places.add((top, left))
        for full, cut in zip(*shown, strict=True):
            assert cut.shape == (6, 3, 20, 20)
            expected = full[i, :, top : top + 20, left : left + 20]
            torch.testing.assert_close(cut[i], expected, rtol=0, atol=1e-5)
    assert len(places) > 2


def test_gradients_reach_the_expert_through_a_frozen_dc_ae(lpips_trunk: Path) -> None:
    from diffusers import AutoencoderDC

    torch.manual_seed(0)
    dc_ae = AutoencoderDC(
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
    )
    latent = LatentConfig(kind="dc-ae", factor=4, scale=0.5, source="here")
    model = ModelConfig(
        name="learned",
        denoiser=DenoiserConfig(
            latent_channels=4, depth=1, width=32, head_dim=16, stem_channels=(8, 8, 8)
        ),
        latent=latent,
    )
    config = config_of(model, 1, lpips_trunk, crop=5)
    stage = stage_of(model, config, 1, DCAutoencoder(latent, dc_ae))
    sizes = []
    decode = dc_ae.decode
    dc_ae.decode = lambda z: sizes.append(tuple(z.shape)) or decode(z)
    stage.objective.losses(stage, next(batches(size=2))).total.mean().backward()
    assert sizes == [(2, 4, 5, 5)]
    assert all(p.grad is not None and p.grad.any() for p in stage.engine.module.blocks.parameters())
    assert all(p.grad is None for p in dc_ae.parameters())


def test_bfloat16_leaves_no_weight_without_a_gradient(
    small_config: ModelConfig, lpips_trunk: Path
) -> None:
    """The expert's own detour casts its weights without gradients before the trained pass."""
    config = config_of(small_config, 1, lpips_trunk, bfloat16=True, detour=1.0)
    stage = stage_of(small_config, config, 1)
    with stage.engine.precision():
        losses = stage.objective.losses(stage, next(batches()))
    losses.total.mean().backward()
    assert losses.reported.dtype == torch.float32
    assert all(p.grad is not None for p in stage.engine.module.parameters())


# Whole stages


def test_only_the_trained_expert_and_the_discriminator_change(
    small_config: ModelConfig, lpips_trunk: Path
) -> None:
    stage = stage_of(small_config, config_of(small_config, 2, lpips_trunk))
    objective, experts = objective_of(stage), random_experts(small_config, 4)
    assert objective.before is not None and objective.lpips is not None
    judge = {k: v.clone() for k, v in objective.lpips.state_dict().items()}
    before = weights_of(stage)
    loop.run(stage, batches(), quiet)
    for frozen, start in ((objective.first, experts[0]), (objective.before, experts[1])):
        for a, b in zip(frozen.parameters(), start.parameters(), strict=True):
            assert torch.equal(a, b) and a.grad is None
    assert all(torch.equal(v, objective.lpips.state_dict()[k]) for k, v in judge.items())
    assert (weights_of(stage) != before).float().mean() > 0.9
    history = stage.progress.history
    assert [h["step"] for h in history] == [2, 4, 6]
    assert all(0.5 < h["discriminator"] < 3 and h["loss"] > 0 for h in history)


def test_training_lowers_the_perceptual_loss(small_config: ModelConfig, lpips_trunk: Path) -> None:
    config = config_of(small_config, 2, lpips_trunk, steps=40, gan=0.03, learning_rate=3e-3)
    one = itertools.repeat(next(batches()))
    stage = loop.run(stage_of(small_config, config), one, quiet)
    losses = [h["loss"] for h in stage.progress.history]
    assert losses[-1] < 0.8 * losses[0]


def test_resuming_gives_the_same_weights_as_never_stopping(
    small_config: ModelConfig, lpips_trunk: Path, tmp_path: Path
) -> None:
    config = config_of(small_config, 2, lpips_trunk)
    whole = loop.run(stage_of(small_config, config), batches(), quiet)

    def save_at_four(stage: loop.TrainState, report: loop.Report) -> bool:
        if report.step == 4:
            stage.save(tmp_path)
        return report.step == 4

    loop.run(stage_of(small_config, config), batches(), save_at_four)
    resumed = stage_of(small_config, config)
    resumed.load(tmp_path)
    loop.run(resumed, batches(resumed.progress.seen), quiet)
    assert torch.equal(weights_of(whole), weights_of(resumed))
    for key in ("loss", "discriminator"):
        values, expected = ([h[key] for h in s.progress.history] for s in (resumed, whole))
        assert values == expected
    for name, average in whole.ema.average.items():
        assert torch.equal(average, resumed.ema.average[name])


def test_a_checkpoint_without_its_discriminator_is_refused(
    small_config: ModelConfig, lpips_trunk: Path, tmp_path: Path
) -> None:
    config = config_of(small_config, 2, lpips_trunk)
    stage_of(small_config, config).save(tmp_path)
    wider = config.model_copy(update={"channels": (8, 8, 8, 8, 16)})
    with pytest.raises(WeightsError, match="cannot be resumed from"):
        stage_of(small_config, wider).load(tmp_path)
    (tmp_path / perceptual.DISCRIMINATOR).unlink()
    with pytest.raises(WeightsError, match="cannot be resumed from"):
        stage_of(small_config, config).load(tmp_path)


def test_the_guard_stops_for_nan_before_any_weight_changes(
    small_config: ModelConfig, lpips_trunk: Path
) -> None:
    def poisoned() -> Iterator[Batch]:
        good = next(batches())
        yield good
        yield good._replace(hr=good.hr * torch.nan)

    stage = stage_of(small_config, config_of(small_config, 2, lpips_trunk))
    with pytest.raises(Diverged, match="step 1"):
        loop.run(stage, poisoned(), quiet)
    assert torch.isfinite(weights_of(stage)).all()


def test_a_discriminator_that_is_not_finite_ends_the_stage(
    small_config: ModelConfig, lpips_trunk: Path
) -> None:
    stage = stage_of(small_config, config_of(small_config, 2, lpips_trunk))
    critic = objective_of(stage).critic
    assert critic is not None
    batch, before = next(batches()), weights_of(stage)
    shown = perceptual.Shown(batch.hr * math.nan, batch.hr, batch.hr)
    with pytest.raises(Diverged, match="discriminator"):
        critic.step([shown], stage.engine, 1.0)
    assert torch.equal(weights_of(stage), before)


def test_zero_weights_load_neither_lpips_nor_discriminator(
    small_config: ModelConfig, tmp_path: Path
) -> None:
    config = config_of(small_config, 1, tmp_path / "none", lpips=0, gan=0)
    stage = stage_of(small_config, config, 1)
    loop.run(stage, batches(), quiet)
    stage.save(tmp_path)
    assert not (tmp_path / perceptual.DISCRIMINATOR).exists()
    assert all(h["discriminator"] == 0 for h in stage.progress.history)


def test_a_missing_trunk_is_named_before_anything_starts(
    small_config: ModelConfig, tmp_path: Path
) -> None:
    config = config_of(small_config, 2, tmp_path / "gone.pth")
    with pytest.raises(LinearSRError, match=r"gone\.pth"):
        perceptual.check(config)


def test_tags_guide_frozen_experts_as_well(tagged_config: ModelConfig, lpips_trunk: Path) -> None:
    stage = stage_of(tagged_config, config_of(tagged_config, 2, lpips_trunk, gan=0))
    batch = next(batches(size=2))
    latents = []
    for tags in (("cat",), ("dog",)):
        named = batch._replace(tags=(tags, ()))
        with torch.no_grad():
            conditions = loop.Conditions.of(
                named, stage.engine.module, stage.autoencoder, stage.encoder
            )
            latents.append(objective_of(stage).arrive(stage, named, conditions)[0])
    assert not torch.allclose(latents[0][0], latents[1][0])
    torch.testing.assert_close(latents[0][1], latents[1][1])


@pytest.mark.skipif(REAL_TRUNK is None, reason="needs the real trunk")
def test_lpips_with_its_real_trunk_has_the_published_value(small_config: ModelConfig) -> None:
    objective = objective_of(stage_of(small_config, config_of(small_config, 2, REAL_TRUNK, l1=0)))
    torch.manual_seed(123)
    a, b = (torch.rand(10, 3, 100, 100) * 2 - 1 for _ in range(2))
    assert objective.distance(a, b).mean().item() == pytest.approx(0.1008, abs=1e-4)
