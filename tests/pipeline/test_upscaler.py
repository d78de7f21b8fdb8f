"""Upscaling with a tiny real model: sizes, seeds, tiles, stages, memory errors."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC
from PIL import Image

from linearsr import Options, Upscaler, weights
from linearsr.config import Acceleration, DenoiserConfig, LatentConfig, ModelConfig, Solver
from linearsr.diffusion.experts import Segment
from linearsr.errors import OptionError, WeightsError
from linearsr.imaging.files import Picture, from_pil
from linearsr.imaging.resample import resize
from linearsr.pipeline import upscaler
from linearsr.pipeline.device import best_dtype
from linearsr.pipeline.memory import OutOfMemory, memory_errors
from linearsr.pipeline.state import UpscaleState
from linearsr.pipeline.upscaler import Progress
from linearsr.tags.base import Tag, TaggerConfig
from tests.helpers.experts import random_experts

SOLVERS: tuple[Solver | None, ...] = (None, "euler", "dpm", "adams")


@pytest.fixture(scope="module")
def small(small_bundle: Path) -> Upscaler:
    return Upscaler.load(small_bundle, "cpu")


@pytest.fixture
def unrounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents stay as they are between two experts."""
    monkeypatch.setattr(upscaler, "FOLDED", torch.float32)


@pytest.fixture(scope="module")
def picture(photograph: Image.Image) -> Picture:
    return from_pil(photograph)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (256, 192)),
        ({"scale": 2}, (128, 96)),
        ({"scale": 3}, (192, 144)),
        ({"width": 100}, (100, 75)),
        ({"height": 100}, (133, 100)),
        ({"width": 33, "height": 77}, (33, 77)),
    ],
)
def test_result_has_the_requested_size(
    small: Upscaler, photograph: Image.Image, options: dict[str, int], size: tuple[int, int]
) -> None:
    assert small(photograph, steps=1, **options).size == size


@pytest.fixture(scope="module")
def scaling(scaling_bundle: Path) -> Upscaler:
    """An upscaler whose config allows every scale from 1 to 4, in float32."""
    return Upscaler(weights.load(scaling_bundle, dtype=torch.float32))


@pytest.mark.parametrize(
    ("options", "size", "scale"),
    [
        ({"scale": 1}, (64, 48), 1),
        ({"scale": 1.5}, (96, 72), 1.5),
        ({"scale": 2.3}, (147, 110), 2.3),
        ({"width": 100}, (100, 75), 100 / 64),
        ({"height": 131}, (175, 131), 131 / 48),
        ({"width": 100, "height": 50}, (100, 50), 100 / 64),
        ({"width": 33}, (33, 25), 1),
        ({"width": 300}, (300, 225), 4),
    ],
)
def test_network_runs_at_the_nearest_trained_scale(
    scaling: Upscaler,
    picture: Picture,
    options: dict[str, float],
    size: tuple[int, int],
    scale: float,
) -> None:
    request = Options.parse(steps=1, **options)
    job = scaling.prepare(picture, request)
    assert job.scale == scale and job.size == (round(48 * scale), round(64 * scale))
    assert job.latents[0].shape[-2:] == tuple(-(-side // 4) for side in job.size)
    assert scaling.upscale(picture, request).pixels.shape[1:] == size[::-1]


@pytest.mark.parametrize("scale", [1, 1.5, 2, 2.37, 4])
def test_tile_sees_its_part_of_the_bicubic_picture_at_any_scale(
    scaling: Upscaler, picture: Picture, scale: float
) -> None:
    odd = dataclasses.replace(picture, pixels=picture.pixels[:, :47, :61])
    job = scaling.prepare(odd, Options(scale=scale), tile=8)
    assert len(job.tiles) > 4
    height, width = job.size
    assert (height, width) == (round(47 * scale), round(61 * scale))
    whole = resize(odd.pixels[None] * 2 - 1, height, width)
    below, beside = (4 * (-(-side // 4)) - side for side in job.size)
    whole = torch.nn.functional.pad(whole, (0, beside, 0, below), mode="replicate")
    for tile in job.tiles:
        part = job.enlarged_lr(tile, 4, scaling.device)
        torch.testing.assert_close(part, tile.scaled(4).crop(whole), atol=2e-5, rtol=0)


@pytest.mark.parametrize("scale", [1, 1.5, 2.37])
def test_zero_model_gives_bicubic_at_any_scale_and_tile(
    scaling: Upscaler, picture: Picture, scale: float
) -> None:
    bundle = scaling.config, [silent(m) for m in scaling.experts]
    quiet = Upscaler(weights.Bundle(*bundle, {}))
    bicubic = resize(picture.pixels[None], round(48 * scale), round(64 * scale))[0].clamp(0, 1)
    for tile in ("off", 20):
        result = quiet.upscale(picture, Options(scale=scale, steps=1, tile=tile)).pixels
        torch.testing.assert_close(result, bicubic, atol=2e-5, rtol=0)


def test_tile_option_counts_input_pixels_at_any_scale(scaling: Upscaler, picture: Picture) -> None:
    for scale, cells in ((1, 8), (2, 16), (4, 32)):
        options = Options(scale=scale, tile=32)
        assert list(scaling.tile_sizes(picture, options)) == [cells]


def test_model_of_one_scale_shrinks_its_result(small: Upscaler, picture: Picture) -> None:
    job = small.prepare(picture, Options(scale=1.5))
    assert job.scale == 4 and job.size == (192, 256)
    assert small.upscale(picture, Options(scale=1.5, steps=1)).pixels.shape == (3, 72, 96)


def test_detail_blends_the_first_steps_result_with_the_last(
    scaling: Upscaler, picture: Picture
) -> None:
    """Latents are pixels here, so a blend of latents is one of pictures, but for clamping."""

    def made(**options: object) -> torch.Tensor:
        request = Options.parse(scale=1.5, seed=5, tile=20, colour_fix="none", **options)
        return scaling.upscale(grey, request).pixels

    grey = dataclasses.replace(picture, pixels=0.4 + picture.pixels / 5)
    for solver in ("euler", "adams"):
        one, full = made(steps=1), made(steps=5, solver=solver)
        assert torch.equal(made(steps=5, solver=solver, detail=0), one)
        assert torch.equal(made(steps=5, solver=solver, detail=1), full)
        assert min(one.min(), full.min()) > 0 and max(one.max(), full.max()) < 1
        half = made(steps=5, solver=solver, detail=0.25)
        torch.testing.assert_close(half, torch.lerp(one, full, 0.25), atol=1e-5, rtol=0)
        assert (full - one).abs().max() > 1e-2


def test_detail_zero_takes_one_forward(small: Upscaler, picture: Picture) -> None:
    calls: list[int] = []
    hooks = [m.register_forward_hook(lambda *_: calls.append(1)) for m in small.experts]
    small.upscale(picture, Options(steps=20, detail=0))
    for hook in hooks:
        hook.remove()
    assert len(calls) == 1


def test_state_holds_the_first_guess_only_for_requests_that_blend(
    small: Upscaler, picture: Picture
) -> None:
    """The batch holds requests at their first step and later ones."""
    details = (0.5, 1.0, 0.5)
    jobs = [
        small.prepare(picture, Options(seed=seed, steps=6, detail=detail), tile=20)
        for seed, detail in enumerate(details)
    ]
    begun = small.denoise(jobs[2], Segment(0, 0, 2))
    batch = [(jobs[0], Segment(0, 0, 2)), (jobs[1], Segment(0, 0, 2)), (begun, Segment(0, 2, 4))]
    results = small.denoise_batch(batch)
    assert [len(result.guess) for result in results] == [len(job.tiles) for job in jobs[:1]] + [
        0,
        len(begun.tiles),
    ]
    assert all(map(torch.equal, results[2].guess, begun.guess))
    alone = small.denoise(jobs[0], Segment(0, 0, 1))
    for ours, theirs in zip(results[0].guess, alone.guess, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=0)
        assert ours.untyped_storage().nbytes() == ours.nbytes


def test_prepare_follows_the_models_plan(small: Upscaler, picture: Picture) -> None:
    """The plan has each expert once, at the timesteps that the config names."""
    sampling = small.config.sampling.model_copy(update={"plans": ((1.0, 0.9, 0.5, 0.2),)})
    config = small.config.model_copy(update={"sampling": sampling})
    planned = Upscaler(weights.Bundle(config, small.experts, {}))
    job = planned.prepare(picture, Options(steps=4))
    assert job.timesteps == (1.0, 0.9, 0.5, 0.2, 0.0)
    assert job.segments == ((0, 0, 1), (1, 1, 2), (2, 2, 3), (3, 3, 4))
    assert (
        planned.prepare(picture, Options(steps=3)).timesteps
        == small.prepare(picture, Options(steps=3)).timesteps
    )


@pytest.mark.parametrize("size", [(1, 1), (1, 37), (200, 3), (5, 5)])
def test_tiny_and_narrow_pictures_are_upscaled(small: Upscaler, size: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8))
    assert small(image, steps=2).size == (size[0] * 4, size[1] * 4)


def test_seed_decides_the_pixels(small: Upscaler, picture: Picture) -> None:
    first, again, other = (
        small.upscale(picture, Options(steps=4, seed=s)).pixels for s in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_threads_sharing_an_upscaler_get_the_same_pixels(small: Upscaler, picture: Picture) -> None:
    requests = [Options(steps=2, seed=seed, tile=16) for seed in range(6)]
    alone = [small.upscale(picture, options).pixels for options in requests]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda options: small.upscale(picture, options).pixels, requests))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_one_step_does_not_depend_on_the_seed(small: Upscaler, picture: Picture) -> None:
    """At t = 1 the preconditioned network gets no noise: the result is the conditional mean."""
    a, b = (small.upscale(picture, Options(steps=1, seed=s)).pixels for s in (1, 2))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("solver", [None, "dpm", "adams"])
@pytest.mark.parametrize("steps", [1, 4, 20])
def test_stages_by_hand_equal_one_call(
    small: Upscaler, picture: Picture, steps: int, solver: Solver | None
) -> None:
    options = Options(steps=steps, solver=solver)
    job = small.prepare(picture, options)
    experts = []
    for segment in job.segments:
        job = small.denoise(job, segment)
        experts.append(segment.expert)
    assert experts == sorted(set(experts))
    assert torch.equal(small.finish(job).pixels, small.upscale(picture, options).pixels)


def _segments(jobs: Sequence[UpscaleState], expert: int) -> list[tuple[UpscaleState, Segment]]:
    """Return each job with its segment of one expert."""
    return [(job, next(s for s in job.segments if s.expert == expert)) for job in jobs]


def test_batch_gives_each_request_its_result_alone(tagged: Upscaler, picture: Picture) -> None:
    """The requests differ in seed, steps, shape, tags, number of tiles and timesteps."""
    corner = dataclasses.replace(picture, pixels=picture.pixels[:, :16, :24])
    requests: list[tuple[Picture, int | None, Options]] = [
        (picture, 20, Options(seed=1, steps=4)),
        (picture, 20, Options(seed=2, steps=5)),
        (picture, None, Options(seed=3, steps=4)),
        (corner, None, Options(seed=4, steps=4, tags=("cat",))),
        (corner, None, Options(seed=5, steps=4, tags=("dog",))),
        (corner, None, Options(seed=6, steps=4)),
        (corner, None, Options(seed=7, steps=6)),
    ]
    jobs = [tagged.prepare(of, options, tile) for of, tile, options in requests]
    for expert in (0, 2):
        batch = _segments(jobs, expert)
        together = tagged.denoise_batch(batch)
        for (job, segment), result in zip(batch, together, strict=True):
            alone = tagged.denoise(job, segment)
            assert len(result.latents) == len(job.tiles)
            for ours, theirs in zip(result.latents, alone.latents, strict=True):
                torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=0)
                assert ours.untyped_storage().nbytes() == ours.nbytes  # no other tokens beside it


def test_batch_without_room_gives_the_same_bits_as_alone(small: Upscaler, picture: Picture) -> None:
    """The limit is one cell, so each request goes through the model alone."""
    jobs = [small.prepare(picture, Options(seed=seed), tile=20) for seed in (1, 2)]
    batch = _segments(jobs, 0)
    for (job, segment), result in zip(batch, small.denoise_batch(batch, cells=1), strict=True):
        alone = small.denoise(job, segment)
        assert all(map(torch.equal, result.latents, alone.latents))


@pytest.mark.parametrize("solver", ["euler", "dpm", "adams"])
def test_segments_give_the_bits_of_one_run_with_any_solver(
    small: Upscaler, picture: Picture, solver: Solver, unrounded: None
) -> None:
    """Each segment has the same expert; the previous step is part of the state."""
    job = small.prepare(picture, Options(steps=6, solver=solver), tile=20)
    whole = small.denoise(job, Segment(1, 0, 6))
    for first, last in pairwise((0, 1, 2, 4, 5, 6)):
        job = small.denoise(job, Segment(1, first, last))
    assert all(map(torch.equal, job.latents, whole.latents))


def test_rounding_between_experts_moves_few_pixels_by_a_level(
    picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most pixels stay the same, and what travels has half of the bytes."""
    tiny = Upscaler(weights.load("linearsr-tiny", dtype=torch.float32))
    options = Options(steps=4, solver="dpm")
    rounded = tiny.upscale(picture, options).pixels
    travels = tiny.prepare(picture, options).latents
    monkeypatch.setattr(upscaler, "FOLDED", torch.float32)
    exact = tiny.upscale(picture, options).pixels
    ours, theirs = ((255 * pixels).round() for pixels in (rounded, exact))
    assert (ours - theirs).abs().max() <= 2
    assert 0 < (ours != theirs).float().mean() < 0.15
    whole = tiny.prepare(picture, options).latents
    assert 2 * sum(x.nbytes for x in travels) == sum(x.nbytes for x in whole)


def test_state_holds_the_previous_step_only_if_the_next_one_needs_it(
    small: Upscaler, picture: Picture
) -> None:
    kept = {}
    for solver in ("euler", "dpm", "adams"):
        job = small.prepare(picture, Options(steps=5, solver=solver), tile=20)
        kept[solver] = []
        for step in range(5):
            job = small.denoise(job, Segment(0, step, step + 1))
            assert len(job.previous) in (0, len(job.tiles))
            assert all(p.untyped_storage().nbytes() == p.nbytes for p in job.previous)
            kept[solver].append(bool(job.previous))
    assert kept == {
        "euler": [False] * 5,
        "dpm": [False, True, True, False, False],
        "adams": [True, True, True, True, False],
    }


def test_batch_does_not_mix_solvers(small_bundle: Path, picture: Picture, unrounded: None) -> None:
    """The batch holds requests of every solver, some at their first step and some later."""
    small = Upscaler(weights.load(small_bundle, dtype=torch.float32))
    jobs = [
        small.prepare(picture, Options(seed=seed, steps=steps, solver=solver), tile=20)
        for seed, (steps, solver) in enumerate(
            [(6, "euler"), (6, "dpm"), (6, "adams"), (6, "adams"), (7, "dpm"), (6, "dpm")]
        )
    ]
    begun = [small.denoise(job, Segment(0, 0, 2)) for job in jobs[:5]] + [jobs[5]]
    batch = [(job, Segment(1, 2, 5)) for job in begun[:5]] + [(begun[5], Segment(1, 0, 4))]
    assert [bool(job.previous) for job in begun] == [False, True, True, True, True, False]
    for (job, segment), result in zip(batch, small.denoise_batch(batch), strict=True):
        alone = small.denoise(job, segment)
        assert len(result.previous) == len(alone.previous)
        ours, theirs = (of.latents + of.previous for of in (result, alone))
        for tensor, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(tensor, expected, atol=1e-4, rtol=0)
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_solver_is_the_models_own_by_default(small: Upscaler, picture: Picture) -> None:
    by = {s: small.upscale(picture, Options(steps=5, solver=s)).pixels for s in SOLVERS}
    assert torch.equal(by[None], by["euler"])
    assert not torch.equal(by["dpm"], by["euler"]) and not torch.equal(by["adams"], by["dpm"])
    assert small.describe(Options())["solver"] == "euler"
    assert small.describe(Options(solver="dpm"))["solver"] == "dpm"


def test_batch_refuses_segments_of_several_experts(small: Upscaler, picture: Picture) -> None:
    job = small.prepare(picture, Options(steps=4))
    with pytest.raises(ValueError, match="one expert"):
        small.denoise_batch([(job, segment) for segment in job.segments[:2]])


def test_batch_gives_up_unwanted_requests_between_tiles(small: Upscaler, picture: Picture) -> None:
    jobs = [small.prepare(picture, Options(seed=seed), tile=20) for seed in (1, 2)]
    batch = _segments(jobs, 0)
    forwards: list[int] = []
    hook = small.experts[0].register_forward_hook(lambda *_: forwards.append(1))
    calls: list[int] = []

    def wanted(place: int) -> bool:
        calls.append(place)
        return place == 0 or calls.count(1) == 1

    kept, left = small.denoise_batch(batch, cells=1, wanted=wanted)
    hook.remove()
    tiles = len(jobs[0].tiles)
    assert tiles > 2 and calls == [0, 1] * tiles
    assert len(forwards) == tiles + 1
    assert left is jobs[1]
    alone = small.denoise(*batch[0])
    assert all(map(torch.equal, kept.latents, alone.latents))


def test_tag_keys_are_computed_once_for_all_tiles_and_steps(
    tagged: Upscaler, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tagged.prepare(picture, Options(steps=8, tags=("cat",)), tile=20)
    model, calls = tagged.experts[0], []
    tag_keys = model.tag_keys
    monkeypatch.setattr(model, "tag_keys", lambda tags: (calls.append(1), tag_keys(tags))[1])
    segment = job.segments[0]
    tagged.denoise(job, segment)
    assert segment.stop - segment.start > 1 and len(job.tiles) > 1
    assert len(calls) == 1


def test_planning_and_some_denoisers_load_no_decoder(learned: Upscaler, picture: Picture) -> None:
    """Without condition latent, a denoiser needs no decoder; a whole upscaler loads one."""
    folder = Path(str(learned.config.latent.source)).parent / "weights"
    assert "autoencoder" in vars(learned)
    part = Upscaler.load(folder, "cpu", only=[0])
    job = part.prepare(picture, Options(steps=2))
    part.denoise(job, job.segments[0])
    assert "autoencoder" not in vars(part)


def test_denoise_state_has_no_picture_and_suffices(small: Upscaler, picture: Picture) -> None:
    job = small.prepare(picture, Options(steps=2))
    work = job.denoise_state()
    assert not hasattr(work, "picture") and not hasattr(work, "options")
    segment = job.segments[0]
    alone = small.denoise(work, segment)
    assert all(map(torch.equal, alone.latents, small.denoise(job, segment).latents))


def test_load_only_loads_the_chosen_experts(
    small: Upscaler, small_bundle: Path, picture: Picture
) -> None:
    part = Upscaler.load(small_bundle, "cpu", only=(1,))
    assert [model.out.weight.device.type for model in part.experts] == [
        "meta",
        "cpu",
        "meta",
        "meta",
    ]
    ((job, segment),) = _segments([small.prepare(picture, Options(steps=4))], 1)
    ours, theirs = (of.denoise(job, segment).latents for of in (part, small))
    assert all(map(torch.equal, ours, theirs))
    with pytest.raises(WeightsError, match="structure is not loaded here"):
        part.denoise(job, job.segments[0])


def test_each_segment_is_denoised_by_its_own_expert(small: Upscaler, picture: Picture) -> None:
    """Zeroing one expert changes the result exactly if the plan uses it."""
    before = small.upscale(picture, Options(steps=4)).pixels
    for expert, used in enumerate([True, True, True, False]):
        weight = small.experts[expert].out.weight
        saved = weight.clone()
        weight.zero_()
        after = small.upscale(picture, Options(steps=4)).pixels
        weight.copy_(saved)
        assert torch.equal(before, after) != used


def test_tile_sees_its_part_of_the_bicubic_picture(small: Upscaler, picture: Picture) -> None:
    job = small.prepare(picture, Options(), tile=20)
    assert len(job.tiles) > 4
    whole = resize(job.lr, *(4 * n for n in job.lr.shape[-2:]))
    for tile in job.tiles:
        torch.testing.assert_close(
            job.enlarged_lr(tile, 4, small.device), tile.scaled(4).crop(whole)
        )


def test_tiles_share_noise_where_they_overlap(small: Upscaler, picture: Picture) -> None:
    job = small.prepare(picture, Options(seed=3), tile=20)
    whole = small.prepare(picture, Options(seed=3), tile=None).latents[0]
    for tile, latent in zip(job.tiles, job.latents, strict=True):
        assert torch.equal(latent, tile.crop(whole))


def test_zero_model_gives_bicubic_for_any_tile(small: Upscaler, picture: Picture) -> None:
    """If the predicted residual is zero, tiling, blending and colour fix must add nothing."""
    bundle = small.config, [silent(m) for m in small.experts]
    quiet = Upscaler(weights.Bundle(*bundle, {}))
    bicubic = resize(picture.pixels[None], 192, 256)[0].clamp(0, 1)
    for tile in ("off", 20):
        result = quiet.upscale(picture, Options(steps=1, tile=tile)).pixels
        torch.testing.assert_close(result, bicubic, atol=2e-5, rtol=0)


def silent(model: torch.nn.Module) -> torch.nn.Module:
    """Return a copy whose output layer is zero."""
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    torch.nn.init.zeros_(copy.out.weight)
    torch.nn.init.zeros_(copy.out.bias)
    return copy.requires_grad_(False)


def test_result_keeps_alpha_and_metadata(small: Upscaler, picture: Picture) -> None:
    alpha = torch.linspace(0, 1, 64).expand(1, 48, 64)
    source = dataclasses.replace(picture, alpha=alpha, bits=16, icc=None, exif=None)
    result = small.upscale(source, Options(steps=1))
    assert result.alpha is not None
    assert result.alpha.shape == (1, 192, 256)
    assert result.bits == 16
    assert result.alpha.min() >= 0 and result.alpha.max() <= 1


def test_progress_names_the_experts(small: Upscaler, picture: Picture) -> None:
    seen: list[Progress] = []
    small.upscale(picture, Options(steps=20), seen.append)
    assert [one.step for one in seen] == [*range(1, 21), 20]
    assert [one.fraction for one in seen] == [step / 20 for step in range(21)]
    firsts = {one.expert: one.step for one in reversed(seen)}
    assert firsts == {"structure": 1, "refinement": 5, "texture": 7, "polish": 20}


def test_progress_counts_each_step_on_each_tile(small: Upscaler, picture: Picture) -> None:
    seen: list[Progress] = []
    small.upscale(picture, Options(steps=2, tile=40), seen.append)
    tiles = seen[0].tiles
    assert tiles > 2 and seen[0] == Progress("structure", 1, tiles, 1, 2, 0)
    assert [one.fraction for one in seen] == [i / (2 * tiles) for i in range(2 * tiles + 1)]
    assert {(one.tile, one.step) for one in seen} == {
        (tile, step) for tile in range(1, tiles + 1) for step in (1, 2)
    }


def test_out_of_memory_tries_smaller_tiles(
    small: Upscaler, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = _limit_memory(small, monkeypatch, largest=50)
    small.upscale(picture, Options(steps=1))
    assert tried == [320, 160, 80, 40]


@pytest.mark.parametrize("tile", [64, "off"])
def test_out_of_memory_keeps_a_chosen_tile(
    small: Upscaler, picture: Picture, monkeypatch: pytest.MonkeyPatch, tile: int | str
) -> None:
    tried = _limit_memory(small, monkeypatch, largest=50)
    with pytest.raises(OutOfMemory, match="--tile"):
        small.upscale(picture, Options(steps=1, tile=tile))
    assert tried == [64 if tile == 64 else None]


def _limit_memory(
    small: Upscaler, monkeypatch: pytest.MonkeyPatch, largest: int
) -> list[int | None]:
    """Raise torch's own error for tiles above `largest`; return a list of the sizes tried."""
    tried: list[int | None] = []
    prepare = small.prepare

    @memory_errors()
    def limited(picture: Picture, options: Options, tile: int | None) -> UpscaleState:
        tried.append(tile)
        if tile is None or tile > largest:
            torch.empty(2**60)
        return prepare(picture, options, tile)

    monkeypatch.setattr(small, "prepare", limited)
    return tried


@pytest.mark.parametrize(
    "fields",
    [
        {"scale": 5},
        {"scale": 0.9},
        {"scale": float("nan")},
        {"detail": 1.1},
        {"detail": -0.1},
        {"steps": 0},
        {"steps": 51},
        {"seed": -1},
        {"tile": "big"},
        {"tile": 0},
        {"colour_fix": "magic"},
        {"solver": "magic"},
        {"width": 0},
        {"unknown": 1},
    ],
)
def test_options_name_the_bad_field(fields: dict[str, object]) -> None:
    with pytest.raises(OptionError, match=next(iter(fields))):
        Options.parse(**fields)


def test_finish_falls_back_to_the_cpu_when_the_device_is_full(
    small: Upscaler, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, whole = small.prepare(picture, Options(steps=1)), small.upscale(picture, Options(steps=1))
    for segment in job.segments:
        job = small.denoise(job, segment)
    finished, devices = Upscaler._finish_on, []

    def with_little_room(self: Upscaler, job: UpscaleState, device: torch.device) -> Picture:
        devices.append(device.type)
        if device.type != "cpu":
            raise OutOfMemory
        monkeypatch.setattr(self, "device", device)  # the only other device here
        return finished(self, job, device)

    monkeypatch.setattr(Upscaler, "_finish_on", with_little_room)
    monkeypatch.setattr(small, "device", torch.device("meta"))
    assert torch.equal(small.finish(job).pixels, whole.pixels)
    assert devices == ["meta", "cpu"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_finish_on_a_gpu_gives_the_same_picture(small_bundle: Path, picture: Picture) -> None:
    on_gpu = Upscaler.load(small_bundle, "cuda")
    job = on_gpu.prepare(picture, Options(steps=1))
    for segment in job.segments:
        job = on_gpu.denoise(job, segment)
    here = on_gpu._finish_on(job, torch.device("cpu")).pixels
    torch.testing.assert_close(on_gpu.finish(job).pixels, here, atol=2 / 255, rtol=0)


@pytest.mark.parametrize("way", Acceleration.model_fields)
def test_acceleration_is_refused_on_a_cpu(small_bundle: Path, way: str) -> None:
    with pytest.raises(OptionError, match=f"{way}: only for CUDA, and the device is cpu"):
        Upscaler.load(small_bundle, "cpu", acceleration=Acceleration(**{way: True}))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("way", Acceleration.model_fields)
def test_acceleration_gives_the_same_picture(
    small_bundle: Path, picture: Picture, way: str
) -> None:
    if way == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    plain = Upscaler.load(small_bundle, "cuda")
    fast = Upscaler.load(small_bundle, "cuda", acceleration=Acceleration(**{way: True}))
    results = [u.upscale(picture, Options(steps=1)).pixels for u in (plain, fast)]
    torch.testing.assert_close(*results, atol=4 / 255, rtol=0)


@pytest.mark.parametrize("tags", [(), ("cat", "grass")])
def test_graphs_on_a_cpu_give_the_same_bits(
    tagged: Upscaler, picture: Picture, tags: tuple[str, ...]
) -> None:
    """All that a GPU runs but the recording itself: a graph for each shape of a tile."""
    bundle = weights.Bundle(tagged.config, copy.deepcopy(tagged.experts), {})
    recorded = Upscaler(bundle, acceleration=Acceleration(cuda_graph=True))
    options = Options(steps=4, tags=tags, tile=24, solver="dpm")
    for seed in (0, 1):  # the second picture replays the graphs of the first
        ours, theirs = (
            u.upscale(picture, options.model_copy(update={"seed": seed})).pixels
            for u in (recorded, tagged)
        )
        assert torch.equal(ours, theirs)


@pytest.mark.skipif(not hasattr(torch.nn.functional, "scaled_mm"), reason="needs PyTorch 2.10")
def test_fp8_changes_pixels_a_little_and_is_recorded(picture: Picture) -> None:
    plain, rounded = (
        Upscaler(weights.load("linearsr-tiny"), acceleration=Acceleration(fp8=fp8))
        for fp8 in (False, True)
    )
    for steps in (1, 2):
        options = Options(steps=steps)
        ours, theirs = (u.upscale(picture, options).pixels for u in (rounded, plain))
        error = float((ours - theirs).square().mean())
        assert 45 < -10 * math.log10(error) < 70
    assert rounded.describe(options)["fp8"] == "True"
    assert "fp8" not in plain.describe(options)


@pytest.mark.parametrize("tags", [("cat",), "auto"])
def test_model_without_tags_refuses_tags(
    small: Upscaler, picture: Picture, tags: tuple[str, ...] | str
) -> None:
    with pytest.raises(OptionError, match="without tags"):
        small.upscale(picture, Options.parse(tags=tags))


@pytest.fixture(scope="module")
def tagged(tagged_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Upscaler:
    """An upscaler with tags, loaded from a bundle, which holds the config of the encoder."""
    folder = tmp_path_factory.mktemp("tagged")
    experts = [m.state_dict() for m in random_experts(tagged_config, 4)]
    weights.save(folder, tagged_config, experts, {}, dtype=torch.float32)
    return Upscaler.load(folder, "cpu")


@pytest.mark.parametrize(
    ("text", "tags"),
    [("cat, grass ,,", ("cat", "grass")), ("", ()), ("auto", "auto"), ("auto,", ("auto",))],
)
def test_options_split_tags_at_commas(text: str, tags: object) -> None:
    assert Options.parse(tags=text).tags == tags


def test_tags_change_every_experts_result(tagged: Upscaler, picture: Picture) -> None:
    corner = dataclasses.replace(picture, pixels=picture.pixels[:, :8, :8])
    cat, dog, none = (
        tagged.prepare(corner, Options(steps=20, tags=tags)) for tags in (("cat",), ("dog",), ())
    )
    # The beginning of the text, and a word.
    assert cat.tags is not None and cat.tags.shape == (1, 2, 16) and none.tags is None
    for segment in cat.segments:
        latents = [tagged.denoise(job, segment).latents[0] for job in (cat, dog, none)]
        assert len({float(latent.double().sum()) for latent in latents}) == 3


def test_denoising_needs_no_tag_encoder(
    tagged: Upscaler, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state carries the embeddings, so later stages may run without the text model."""
    options = Options(steps=2, tags=("cat", "grass"))
    whole = tagged.upscale(picture, options).pixels
    job = tagged.prepare(picture, options)
    monkeypatch.setattr(tagged, "encoder", None)
    for segment in job.segments:
        job = tagged.denoise(job, segment)
    assert torch.equal(tagged.finish(job).pixels, whole)


def test_automatic_tags_are_the_taggers_and_are_recorded(
    tagged: Upscaler, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def load(config: TaggerConfig, device: str) -> object:
        loaded.append(device)
        return lambda pixels: [Tag("light" if pixels.mean() > 0.9 else "dark", 0.8)]

    monkeypatch.setattr(upscaler, "load_tagger", load)
    options = Options(steps=1, tags="auto")
    chosen = tagged.with_tags(picture, options)
    white = dataclasses.replace(picture, pixels=torch.ones(3, 8, 8))
    assert chosen.tags == ("dark",) and tagged.with_tags(white, options).tags == ("light",)
    assert loaded == ["cpu"]
    assert tagged.describe(chosen)["tags"] == "dark"
    automatic, explicit = (tagged.upscale(picture, o).pixels for o in (options, chosen))
    assert torch.equal(automatic, explicit)
    assert tagged.prepare(picture, chosen).options.tags == ("dark",)
    with pytest.raises(ValueError, match="with_tags"):
        tagged.prepare(picture, options)


def test_load_names_an_unusable_device(small_bundle: Path) -> None:
    with pytest.raises(OptionError, match="nonsense"):
        Upscaler.load(small_bundle, "nonsense")


@pytest.mark.parametrize(
    ("amx", "avx512", "best"),
    [
        (False, False, torch.float32),
        (True, False, torch.bfloat16),
        (False, True, torch.bfloat16),
    ],
)
def test_best_dtype_is_bfloat16_only_with_hardware_support(
    monkeypatch: pytest.MonkeyPatch, amx: bool, avx512: bool, best: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert best_dtype(torch.device("cpu")) == best
    assert best_dtype(torch.device("cuda")) == torch.bfloat16
    assert best_dtype(torch.device("mps")) == torch.float32


def test_bfloat16_is_close_to_float32_and_finite(small: Upscaler, small_bundle: Path) -> None:
    """bfloat16 is the default on CUDA and on CPUs with AMX or AVX512-BF16."""
    half = Upscaler(weights.load(small_bundle, dtype=torch.bfloat16))
    for size in [(1, 1), (7, 5), (40, 33)]:
        source = from_pil(Image.effect_mandelbrot(size, (-2, -1, 1, 1), 50).convert("RGB"))
        ours, theirs = (u.upscale(source, Options(steps=4)).pixels for u in (half, small))
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Upscaler:
    """A model on a tiny random DC-AE that compresses eight times, twice the model's scale."""
    torch.manual_seed(0)
    sides = {
        "block_types": ("ResBlock",) * 4,
        "block_out_channels": (8, 8, 16, 16),
        "layers_per_block": (1, 1, 1, 1),
        "qkv_multiscales": ((),) * 4,
    }
    both = {f"{side}_{key}": v for side in ("encoder", "decoder") for key, v in sides.items()}
    folder = tmp_path_factory.mktemp("learned")
    AutoencoderDC(latent_channels=8, attention_head_dim=8, **both).save_pretrained(folder / "ae")
    config = ModelConfig(
        name="learned",
        denoiser=DenoiserConfig(
            latent_channels=8, depth=1, width=32, stem_channels=(4, 4, 4), stem_strides=(2, 2, 2)
        ),
        latent=LatentConfig(kind="dc-ae", factor=8, scale=0.4, source=str(folder / "ae")),
    )
    experts = [m.state_dict() for m in random_experts(config, 4)]
    weights.save(folder / "weights", config, experts, {}, dtype=torch.float32)
    return Upscaler.load(folder / "weights", "cpu")


@pytest.mark.parametrize("size", [(1, 1), (13, 7), (64, 48)])
@pytest.mark.parametrize("tile", ["off", 16])
def test_learned_latent_works_with_another_factor_than_the_scale(
    learned: Upscaler, size: tuple[int, int], tile: int | str
) -> None:
    image = Image.effect_mandelbrot(size, (-2, -1, 1, 1), 50).convert("RGB")
    result = learned.upscale(from_pil(image), Options.parse(steps=2, tile=tile))
    assert result.pixels.shape == (3, 4 * size[1], 4 * size[0])
    assert torch.isfinite(result.pixels).all()
