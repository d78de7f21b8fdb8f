"""LinearSR equals diffusers' Sana, depends on its conditions, and can be trained."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from torch import Tensor

from linearsr.config import DenoiserConfig
from linearsr.denoiser import LinearSR
from linearsr.diffusion.path import Preconditioning
from linearsr.errors import OptionError
from linearsr.weights.convert import from_diffusers

SMALL = DenoiserConfig(
    latent_channels=6,
    depth=2,
    width=64,
    head_dim=16,
    tag_dim=10,
    tag_heads=4,
    stem_channels=(8, 8, 12),
    stem_strides=(2, 2, 1),
)

# In float64: a network adds to its rounding of 1e-16, and no mistake is as small as this.
EXACT = 1e-10


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Make every parameter random, so that no zero bias or unit norm hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1 and "table" not in name and "modulation" not in name:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.3 * noise)


def small(**changes: Any) -> LinearSR:
    torch.manual_seed(0)
    model = LinearSR(DenoiserConfig(**{**SMALL.model_dump(), **changes}))
    randomise(model)
    return model.eval()


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


class Pair:
    """A diffusers Sana of random weights, and the model that our converter made from its folder."""

    def __init__(self, folder: Path, qk_norm: str | None, **options: Any) -> None:
        diffusers: Any = pytest.importorskip("diffusers")
        torch.manual_seed(0)
        self.sana = diffusers.SanaTransformer2DModel(
            in_channels=6,
            out_channels=6,
            num_attention_heads=4,
            attention_head_dim=32,
            num_layers=3,
            num_cross_attention_heads=4,
            cross_attention_head_dim=32,
            cross_attention_dim=128,
            caption_channels=24,
            qk_norm=qk_norm,
            sample_size=8,
            **options,
        ).eval()
        randomise(self.sana)
        self.sana.save_pretrained(folder)
        self.config, tensors, _, _ = from_diffusers(folder)
        self.ours = LinearSR(self.config)
        self.ours.load_state_dict(tensors)
        self.ours.eval()

    @torch.no_grad()
    def error(self, latent: Tensor, t: Tensor, tags: Tensor, mask: Tensor | None = None) -> float:
        b, _, h, w = latent.shape
        condition = self.ours.condition(normal(b, 3, 32 * h, 32 * w), tags=tags, tag_mask=mask)
        theirs = self.sana(latent, tags, 1000 * t, encoder_attention_mask=mask, return_dict=False)
        return relative(self.ours(latent, t, condition), theirs[0])


@pytest.fixture(scope="module", params=[None, "rms_norm_across_heads"], ids=["plain", "qk_norm"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("sana"), request.param)


@pytest.mark.parametrize("t", [0.0, 0.1234, 0.875, 1.0])
def test_converted_model_equals_diffusers_sana(pair: Pair, t: float) -> None:
    assert pair.error(normal(1, 6, 6, 9), torch.tensor([t]), normal(1, 5, 24)) < 1e-4


@pytest.mark.parametrize(("h", "w"), [(1, 1), (1, 7), (6, 9)])
def test_batch_with_a_timestep_per_sample_equals_diffusers_sana(pair: Pair, h: int, w: int) -> None:
    t = torch.tensor([0.9, 0.04])
    assert pair.error(normal(2, 6, h, w), t, normal(2, 5, 24)) < 1e-4


def test_tag_mask_works_as_diffusers_mask(pair: Pair) -> None:
    """Two samples have 2 and 5 tags; the padding is so large that attention to it would show."""
    mask = torch.tensor([[True] * 2 + [False] * 3, [True] * 5])
    tags = normal(2, 5, 24).masked_fill(~mask[..., None], 50.0)
    latent, t = normal(2, 6, 6, 9), torch.tensor([0.3, 0.7])
    assert pair.error(latent, t, tags, mask) < 1e-4
    with torch.no_grad():
        picture = normal(2, 3, 192, 288)
        masked = pair.ours(latent, t, pair.ours.condition(picture, tags=tags, tag_mask=mask))
        bare = pair.ours(latent, t, pair.ours.condition(picture, tags=tags))
        alone = pair.ours.condition(picture[:1], tags=tags[:1, :2])
        assert relative(masked[:1], pair.ours(latent[:1], t[:1], alone)) < 1e-5
    assert relative(bare, masked) > 1e-2


def test_timestep_scale_of_the_source_is_kept(tmp_path: Path) -> None:
    """A Sana that was trained on [0, 1] gets its t there; diffusers scales it in the pipeline."""
    pair = Pair(tmp_path, None, timestep_scale=0.001)
    assert pair.config.timestep_scale == pytest.approx(1.0)


def test_converted_stem_adds_nothing(pair: Pair) -> None:
    latent, t, tags = normal(1, 6, 6, 9), torch.tensor([0.5]), normal(1, 5, 24)
    pictures = normal(1, 3, 192, 288, seed=2), 100 * normal(1, 3, 192, 288, seed=3)
    with torch.no_grad():
        a, b = (pair.ours(latent, t, pair.ours.condition(p, tags=tags)) for p in pictures)
    assert torch.equal(a, b)
    assert pair.ours.stem(pictures[0]).abs().max() > 0


def test_picture_tags_and_timestep_change_the_output() -> None:
    model = small()
    latent, picture, tags, t = normal(1, 6, 4, 5), normal(1, 3, 16, 20), normal(1, 3, 10), 0.4
    with torch.no_grad():
        base = model(latent, torch.tensor([t]), model.condition(picture, tags=tags))
        others = [
            model(latent, torch.tensor([t]), model.condition(-picture, tags=tags)),
            model(latent, torch.tensor([t]), model.condition(picture, tags=-tags)),
            model(latent, torch.tensor([t]), model.condition(picture)),
            model(latent, torch.tensor([t + 0.01]), model.condition(picture, tags=tags)),
        ]
    assert all(relative(other, base) > 1e-3 for other in others)


def test_without_tags_no_part_of_tag_attention_runs() -> None:
    model = small()
    assert model.tags is not None
    parts = [*model.tags.modules(), *(m for n, m in model.named_modules() if "tag_attention" in n)]
    ran: list[torch.nn.Module] = []
    for part in parts:
        part.register_forward_hook(lambda module, *_: ran.append(module))
    latent, picture, t = normal(1, 6, 4, 5), normal(1, 3, 16, 20), torch.tensor([0.4])
    model(latent, t, model.condition(picture))
    assert not ran
    condition = model.condition(picture, tags=normal(1, 3, 10))
    assert ran
    ran.clear()
    model(latent, t, condition)
    # condition() has computed keys and values; a step computes queries only.
    names = {module: name for name, module in model.named_modules()}
    again = {names[module].split("tag_attention")[-1] for module in ran}
    assert again == {"", ".q", ".norm_q", ".out"}


def test_tags_are_refused_by_a_model_without_tag_attention() -> None:
    model = small(tag_dim=None)
    assert not any("tag" in name for name, _ in model.named_parameters())
    with pytest.raises(OptionError, match="trained without tags"):
        model.condition(normal(1, 3, 16, 20), tags=normal(1, 3, 10))


def test_lr_latent_is_required_and_changes_the_output() -> None:
    model = small(condition_latent=True)
    picture, latent, t = normal(1, 3, 16, 20), normal(1, 6, 4, 5), torch.tensor([0.4])
    with pytest.raises(OptionError, match="lr_latent"):
        model.condition(picture)
    with torch.no_grad():
        a, b = (model(latent, t, model.condition(picture, s * latent)) for s in (1, -1))
    assert relative(a, b) > 1e-3


def test_preconditioned_prediction_equals_the_formula() -> None:
    """The weights give F as a bare network; skip, scale and input follow EDM, written out here."""
    bare, model = small().double(), small(prediction="preconditioned").double()
    latent, picture = normal(3, 6, 4, 5).double(), normal(3, 3, 16, 20).double()
    t = torch.tensor([0.0, 0.35, 1.0], dtype=torch.float64)
    s = t.view(-1, 1, 1, 1)
    power = (1 - s) ** 2 + s**2
    with torch.no_grad():
        inner = bare((1 - s) / power * latent, t, bare.condition(picture))
        ours = model(latent, t, model.condition(picture))
    assert relative(ours, (2 * s - 1) / power * latent - inner / power.sqrt()) < EXACT
    c = Preconditioning.at(t)
    assert relative(ours, c.skip * latent + c.output_scale * inner) < EXACT


def test_clean_estimate_at_t_one_does_not_depend_on_the_noise() -> None:
    model = small(prediction="preconditioned").double()
    t = torch.ones(1, dtype=torch.float64)
    with torch.no_grad():
        condition = model.condition(normal(1, 3, 16, 20).double())
        noises = normal(1, 6, 4, 5, seed=2).double(), normal(1, 6, 4, 5, seed=3).double()
        a, b = (z - model(z, t, condition) for z in noises)
    assert a.norm() > 0.1
    assert relative(a, b) < EXACT


@pytest.mark.parametrize("prediction", ["velocity", "preconditioned"])
def test_samples_of_a_batch_do_not_affect_each_other(prediction: str) -> None:
    model = small(prediction=prediction, condition_latent=True).double()
    shapes = (3, 6, 4, 5), (3, 3, 16, 20), (3, 2, 10)
    latent, picture, tags = (normal(*shape).double() for shape in shapes)
    t = torch.tensor([0.05, 0.5, 1.0], dtype=torch.float64)
    with torch.no_grad():
        together = model(latent, t, model.condition(picture, latent, tags))
        apart = [
            model(latent[i], t[i], model.condition(picture[i], latent[i], tags[i]))
            for i in torch.arange(3).split(1)
        ]
    assert relative(together, torch.cat(apart)) < EXACT


@pytest.mark.parametrize("prediction", ["velocity", "preconditioned"])
def test_gradients_reach_every_parameter(prediction: str) -> None:
    model = small(prediction=prediction, condition_latent=True).train()
    latent, t = normal(2, 6, 4, 5), torch.tensor([0.3, 0.8])
    condition = model.condition(normal(2, 3, 16, 20), latent, normal(2, 3, 10))
    model(latent, t, condition).pow(2).mean().backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not dead


def test_untrained_model_predicts_zero() -> None:
    """The output layer is zero, so that training starts from the path's own guess."""
    model = LinearSR(SMALL)
    out = model(normal(1, 6, 4, 5), torch.tensor([0.3]), model.condition(normal(1, 3, 16, 20)))
    assert not out.any()


@pytest.mark.parametrize(("h", "w"), [(1, 1), (1, 6), (5, 1), (3, 8)])
def test_latents_of_any_size_are_denoised(h: int, w: int) -> None:
    model = small(prediction="preconditioned", condition_latent=True)
    latent = normal(2, 6, h, w)
    condition = model.condition(normal(2, 3, 4 * h, 4 * w), latent, normal(2, 1, 10))
    with torch.no_grad():
        out = model(latent, torch.tensor([0.2, 1.0]), condition)
    assert out.shape == latent.shape
    assert out.isfinite().all()


def test_a_sample_whose_tags_are_all_padding_stays_finite() -> None:
    model = small()
    mask = torch.tensor([[False, False], [True, False]])
    latent, t = normal(2, 6, 4, 5), torch.tensor([0.2, 0.9])
    condition = model.condition(normal(2, 3, 16, 20), tags=normal(2, 2, 10), tag_mask=mask)
    model(latent, t, condition).sum().backward()
    with torch.no_grad():
        assert model(latent, t, condition).isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
