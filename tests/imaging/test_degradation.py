"""Degradations are seeded, keep the picture's place and size, and do what their names say."""

import numpy as np
import pytest
import skimage.data
import torch

from linearsr.imaging import degradation as module
from linearsr.imaging.degradation import CLEAN, PRESETS, WEB, Degradation, Round, degrade
from linearsr.imaging.resample import resize

PHOTO = torch.from_numpy(np.asarray(skimage.data.astronaut())).permute(2, 0, 1).float() / 255
HR = PHOTO[:, 100:228, 150:310]


@pytest.mark.parametrize("name", PRESETS)
def test_degrade_gives_the_same_pixels_for_a_seed_in_range_and_size(name: str) -> None:
    runs = [degrade(HR, 4, PRESETS[name], np.random.default_rng(7)) for _ in range(2)]
    assert torch.equal(*runs)
    assert runs[0].shape == (3, 32, 40)
    assert torch.equal(runs[0], (runs[0] * 255).round() / 255)
    assert runs[0].min() >= 0 and runs[0].max() <= 1


@pytest.mark.parametrize("name", ["mild", "camera", "seesr", "real-esrgan", "web"])
def test_the_picture_stays_recognisable_and_in_place(name: str) -> None:
    """Over many draws the mean of the degraded pictures approaches a blurred clean one."""
    rng = np.random.default_rng(0)
    mean = torch.stack([degrade(HR, 4, PRESETS[name], rng) for _ in range(24)]).mean(0)
    clean = degrade(HR, 4, CLEAN, rng)
    errors = {
        shift: (torch.roll(clean, shift, (1, 2)) - mean)[:, 4:-4, 4:-4].square().mean().item()
        for shift in [(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0)]
    }
    assert min(errors, key=errors.__getitem__) == (0, 0)
    assert errors[(0, 0)] < 0.01


def test_clean_preset_is_bicubic_in_eight_bits() -> None:
    expected = (resize(HR[None], 32, 40)[0].clamp(0, 1) * 255).round() / 255
    assert torch.equal(degrade(HR, 4, CLEAN, np.random.default_rng(0)), expected)


@pytest.mark.parametrize("gaussian", [0.0, 1.0])
def test_noise_has_the_strength_asked_for(gaussian: float) -> None:
    grey = torch.full((3, 256, 256), 0.5)
    settings = Round(
        blur_probability=0,
        resize_up_down_keep=(0, 0, 1),
        gaussian_probability=gaussian,
        gaussian_sigma=(10, 10),
        poisson_scale=(1, 1),
        gray_noise_probability=0,
        jpeg_probability=0,
    )
    noisy = degrade(grey, 1, Degradation(rounds=(settings,)), np.random.default_rng(0))
    expected = 10 / 255 if gaussian else (0.5 / 255) ** 0.5
    assert noisy.std().item() == pytest.approx(expected, rel=0.05)


def test_sides_must_be_multiples_of_the_scale() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        degrade(HR[:, :126], 4, CLEAN, np.random.default_rng(0))


@pytest.mark.parametrize(("scale", "sides"), [(1, (128, 160)), (128 / 60, (60, 75)), (2, (64, 80))])
def test_degrade_accepts_any_scale_that_leaves_whole_pixels(
    scale: float, sides: tuple[int, int]
) -> None:
    for name, preset in PRESETS.items():
        lr = degrade(HR, scale, preset, np.random.default_rng(3))
        assert lr.shape[1:] == sides, name
    with pytest.raises(ValueError, match=r"multiple of 1\.5"):
        degrade(HR[:, :127], 1.5, CLEAN, np.random.default_rng(0))


def _resized_only(**changes: object) -> Degradation:
    """Return a round that only resizes."""
    nothing = {"blur_probability": 0.0, "noise_probability": 0.0, "jpeg_probability": 0.0}
    return Degradation(rounds=(Round.model_validate({**nothing, **changes}),))


def test_a_round_may_resize_to_the_size_of_lr_whatever_the_scale() -> None:
    """At x2, a resize to a fixed quarter would leave a blurred picture."""
    down = {"resize_up_down_keep": (0, 1, 0)}
    to_lr = _resized_only(resize_range=(1, 1), resize_from_lr=True, **down)
    quarter = _resized_only(resize_range=(0.25, 0.25), **down)
    for scale in (2, 4):
        clean, lr, small = (
            degrade(HR, scale, config, np.random.default_rng(0))
            for config in (CLEAN, to_lr, quarter)
        )
        assert torch.equal(lr, clean)
        assert torch.equal(small, clean) == (scale == 4)


def test_web_pictures_are_compressed_at_their_own_size_and_most_of_them_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files: list[tuple[int, str, int, tuple[int, ...]]] = []
    through = module._through

    def note(picture: torch.Tensor, kind: str, quality: int) -> torch.Tensor:
        files.append((draw, kind, quality, tuple(picture.shape[2:])))
        return through(picture, kind, quality)

    monkeypatch.setattr(module, "_through", note)
    for draw in range(150):
        degrade(HR, 4, WEB, np.random.default_rng(draw))
    least = {kind: min(q for _, k, q, _ in files if k == kind) for kind in ("JPEG", "WEBP")}
    assert 40 <= least["JPEG"] < 50 <= least["WEBP"] and max(q for _, _, q, _ in files) <= 95
    assert 150 + 85 < len(files) < 150 + 125
    last = {draw: sides for draw, _, _, sides in files}
    assert set(last.values()) == {(32, 40)}
    assert len({sides for *_, sides in files}) > 20


def test_jpegs_have_half_of_the_colour_resolution() -> None:
    """Red and blue columns of one pixel merge into purple; those of four pixels stay."""
    jpeg = Round(
        blur_probability=0,
        resize_up_down_keep=(0, 0, 1),
        noise_probability=0,
        jpeg_quality=(95, 95),
    )
    spread = {}
    for width in (1, 4):
        stripes = torch.zeros(3, 32, 32)
        red = torch.arange(32) // width % 2 == 0
        stripes[0, :, red], stripes[2, :, ~red] = 1.0, 1.0
        lr = degrade(stripes, 1, Degradation(rounds=(jpeg,)), np.random.default_rng(0))
        spread[width] = (lr[0] - lr[2]).std().item()
    assert spread[1] < 0.2 and spread[4] > 0.7, spread
