"""Pairs made in batches agree with the plain degradations and with Pillow's JPEG."""

from __future__ import annotations

import io
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from linearsr.imaging import degradation as degrade
from linearsr.imaging.degradation import Preset
from linearsr.imaging.resample import resize
from tests.helpers.pictures import picture
from tools.train_bundled import pairs as device_pairs
from tools.train_bundled.pairs import Atlas, degraded, filtered, jpeg, pairs

CPU = torch.device("cpu")
MIX: dict[Preset, float] = {"clean": 0.5, "web": 0.5}


def atlas(shrinks: int = 1) -> Atlas:
    photos = [(picture(seed=seed) * 255).byte() for seed in range(2)]
    return Atlas(photos, shrinks, CPU, seed=0)


def pillow(x: Tensor, quality: int) -> Tensor:
    buffer = io.BytesIO()
    pixels = (x * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1).float() / 255


@pytest.mark.parametrize("sides", [(40, 40), (57, 91)])
def test_each_picture_is_filtered_by_its_own_kernel(sides: tuple[int, int]) -> None:
    x = torch.rand(4, 3, *sides)
    kernels = torch.cat(
        [device_pairs.gaussian_kernels(2, (0.2, 3.0), CPU), device_pairs.sinc_kernels(2, CPU)]
    )
    expected = torch.cat([degrade._filter(x[i : i + 1], kernels[i]) for i in range(4)])
    torch.testing.assert_close(filtered(x, kernels), expected, rtol=0, atol=1e-5)


def test_blur_kernels_equal_those_of_the_plain_degradations() -> None:
    """The kernels are round Gaussians of a known width and a sinc filter of a known cutoff."""
    kernel = device_pairs.gaussian_kernels(1, (1.5, 1.5), CPU)[0]
    expected = degrade._gaussian_kernel(21, np.random.default_rng(0), (1.5, 1.5))
    torch.testing.assert_close(kernel, expected, rtol=1e-4, atol=1e-7)
    torch.manual_seed(3)
    kernel = device_pairs.sinc_kernels(1, CPU)[0]
    torch.manual_seed(3)
    cutoff = device_pairs.uniform(1, (np.pi / 3, np.pi), CPU).item()
    torch.testing.assert_close(kernel, degrade._sinc_kernel(21, cutoff), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("quality", [40, 60, 90])
def test_jpeg_equals_that_of_pillow_up_to_rounding(quality: int) -> None:
    """The mean error, on 0 to 255, is far below the change by JPEG itself."""
    x = picture(200, 250)
    expected = pillow(x, quality)
    result = jpeg(x[None], (quality, quality + 1e-3))[0]
    error = 255 * (result - expected).abs().mean().item()
    changed = 255 * (x - expected).abs().mean().item()
    assert error < 1.3
    assert error < 0.4 * changed


def test_jpeg_takes_a_share_of_the_pictures_each_at_its_own_quality() -> None:
    x = picture(64, 64).expand(200, -1, -1, -1)
    result = jpeg(x, (10.0, 95.0), share=0.5)
    changed = (result - x).abs().mean((1, 2, 3))
    assert 60 < (changed == 0).sum() < 140
    assert changed.unique().numel() > 30


@pytest.mark.parametrize("preset", get_args(Preset))
@pytest.mark.parametrize("small", [40, 37, 160])
def test_every_preset_gives_lr_of_its_size_at_8_bits(preset: Preset, small: int) -> None:
    """160 is scale 1; 37 is a scale that is no whole number, and no multiple of JPEG's blocks."""
    hr = torch.stack([picture(160, 160, seed) for seed in range(3)])
    lr = degraded(hr, preset, small, np.random.default_rng(1))
    assert lr.shape == (3, 3, small, small)
    assert lr.min() >= 0 and lr.max() <= 1
    torch.testing.assert_close(lr * 255, (lr * 255).round(), rtol=0, atol=1e-4)
    plain = resize(hr, small, small)
    near = 0.01 if preset == "clean" else 0.12
    assert (lr - plain).abs().mean() < near


def test_mild_preset_leaves_a_share_of_the_pictures_unchanged() -> None:
    hr = picture(64, 64).expand(64, -1, -1, -1)
    lr = degraded(hr, "mild", 16, np.random.default_rng(0))
    clean = degraded(hr, "clean", 16, np.random.default_rng(0))
    same = (lr == clean).flatten(1).all(1).sum()
    assert 1 <= same <= 24, "about an eighth goes through neither blur, noise nor JPEG"


def test_crops_are_parts_of_the_photographs_turned_and_some_of_them_lit() -> None:
    """The pixels of the photograph encode their place: red the row, green the column."""
    row, column = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    photo = torch.stack([row, column, torch.full_like(row, 128)]).byte()
    crops = Atlas([photo], 0, CPU, seed=0).crops(100, 48) * 255
    plain = crops[(crops[:, 2] - 128).abs().amax((1, 2)) < 1e-3].round()
    assert 65 <= len(plain) <= 92, "a fifth is lit"
    for red, green, _ in plain:
        places = set(zip(red.flatten().tolist(), green.flatten().tolist(), strict=True))
        assert len(places) == 48 * 48
        assert red.max() - red.min() == green.max() - green.min() == 47
    ways = {tuple((crop[:2, -1, -1] - crop[:2, 0, 0]).tolist()) for crop in plain}
    assert ways == {(i, j) for i in (-47, 47) for j in (-47, 47)}
    turned = plain[:, 0, 0, 0] == plain[:, 0, -1, 0]
    assert turned.any() and not turned.all()


def test_small_photographs_are_enlarged_to_hold_a_crop() -> None:
    small = Atlas([torch.zeros(3, 50, 400, dtype=torch.uint8)], 2, CPU, seed=0)
    assert len(small.places) == 3 and small.places[:, 1:].min() == Atlas.SMALLEST
    assert small.crops(2, 200).shape == (2, 3, 200, 200)


def test_pairs_are_aligned() -> None:
    """The enlarged LR is nearer to its HR than to an HR that is moved by a pixel."""
    torch.manual_seed(0)
    data = pairs(atlas(), 64, 4, {"clean": 1.0}, at_four=1.0, seed=0)
    for _ in range(4):
        hr, enlarged = next(data)
        assert hr.shape == enlarged.shape == (4, 3, 64, 64)
        assert hr.min() >= -1 and hr.max() <= 1
        inner = (..., slice(4, -4), slice(4, -4))
        here = (enlarged - hr)[inner].square().mean()
        for move in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            moved = hr.roll(move, (2, 3))
            assert (enlarged - moved)[inner].square().mean() > here


def test_pairs_have_all_scales_and_no_clean_pair_near_one(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks: list[tuple[str, int]] = []
    original = device_pairs._chunk

    def chunk(
        atlas: Atlas, patch: int, batch: int, preset: Preset, side: int, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        chunks.append((preset, side))
        return original(atlas, patch, batch, preset, side, rng)

    monkeypatch.setattr(device_pairs, "_chunk", chunk)
    data = pairs(atlas(), 64, 1, MIX, at_four=0.3, seed=0)
    for _ in range(8 * 12):
        next(data)
    sides = {side for _, side in chunks}
    assert sides == {16, 24, 32, 40, 48, 56, 64}
    assert not any(preset == "clean" and side > 51 for preset, side in chunks)
    assert {preset for preset, _ in chunks} == {"clean", "web"}
