"""Make low resolution from high resolution, the way cameras, resizers and JPEG do.

Real-ESRGAN's second-order model (Wang et al. 2021) and milder relatives of it, driven by one
`numpy.random.Generator`, so that the same seed gives the same pixels. Knows nothing of datasets.
"""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor

from linearsr.config import Config
from linearsr.imaging.resample import resize

Range = tuple[float, float]


class Round(Config):
    """One round of blur, resize, noise and JPEG.

    Probabilities are in [0, 1], and `gaussian_sigma` is in 1/255. Resize factors refer to the size
    before this round or, with `resize_from_lr`, to LR's. A fraction `webp_probability` of the JPEGs
    are WebPs instead.
    """

    blur_probability: float = 1.0
    blur_sigma: Range = (0.2, 3.0)
    sinc_probability: float = 0.1
    resize_up_down_keep: tuple[float, float, float] = (0.2, 0.7, 0.1)
    resize_range: Range = (0.15, 1.5)
    resize_from_lr: bool = False
    noise_probability: float = 1.0
    gaussian_probability: float = 0.5
    gaussian_sigma: Range = (1.0, 30.0)
    poisson_scale: Range = (0.05, 3.0)
    gray_noise_probability: float = 0.4
    jpeg_probability: float = 1.0
    jpeg_quality: Range = (30.0, 95.0)
    webp_probability: float = 0.0
    webp_quality: Range = (50.0, 95.0)


class Degradation(Config):
    """Stages in order, then the final resize to 1/scale, sometimes with a sinc filter."""

    rounds: tuple[Round, ...] = ()
    final_sinc_probability: float = 0.0
    kernel_size: int = Field(default=21, ge=3)


_SECOND = Round(
    blur_probability=0.8,
    blur_sigma=(0.2, 1.5),
    resize_up_down_keep=(0.3, 0.4, 0.3),
    resize_range=(0.3, 1.2),
    gaussian_sigma=(1.0, 25.0),
    poisson_scale=(0.05, 2.5),
)
CLEAN = Degradation()
REAL_ESRGAN = Degradation(rounds=(Round(), _SECOND), final_sinc_probability=0.8)
SEESR = Degradation(
    rounds=(
        Round(
            resize_range=(0.3, 1.5),
            gaussian_sigma=(1.0, 15.0),
            poisson_scale=(0.05, 2.0),
            jpeg_quality=(60.0, 95.0),
        ),
        _SECOND.model_copy(
            update={
                "blur_probability": 0.5,
                "resize_range": (0.6, 1.2),
                "gaussian_sigma": (1.0, 12.0),
                "poisson_scale": (0.05, 1.0),
                "jpeg_quality": (60.0, 100.0),
            }
        ),
    ),
    final_sinc_probability=0.8,
)
# One round from camera to web: blur before the resize to LR, noise and JPEG after it, each with
# probability one half.
MILD = Degradation(
    rounds=(
        Round(
            blur_probability=0.5,
            blur_sigma=(0.4, 2.4),
            sinc_probability=0.0,
            resize_up_down_keep=(0.0, 1.0, 0.0),
            resize_range=(1.0, 1.0),
            resize_from_lr=True,
            noise_probability=0.5,
            gaussian_sigma=(1.0, 10.0),
            poisson_scale=(0.05, 0.5),
            jpeg_probability=0.5,
            jpeg_quality=(50.0, 95.0),
        ),
    )
)
# The same round with all three at once.
CAMERA = Degradation(
    rounds=(
        MILD.rounds[0].model_copy(
            update={"blur_probability": 1.0, "noise_probability": 1.0, "jpeg_probability": 1.0}
        ),
    )
)
# A picture from the web: compressed at about the size it is found in, most of them twice, with a
# resize in between. The last compression is not resized any more, so its blocks are whole.
_UPLOAD = Round(
    blur_probability=1 / 3,
    blur_sigma=(0.4, 2.4),
    sinc_probability=0.0,
    resize_up_down_keep=(0.3, 0.4, 0.3),
    resize_range=(0.7, 1.4),
    resize_from_lr=True,
    noise_probability=0.3,
    gaussian_sigma=(1.0, 5.0),
    poisson_scale=(0.05, 0.3),
    jpeg_probability=0.7,
    jpeg_quality=(40.0, 95.0),
    webp_probability=0.15,
)
WEB = Degradation(
    rounds=(
        _UPLOAD,
        _UPLOAD.model_copy(
            update={
                "blur_probability": 0.0,
                "resize_up_down_keep": (0.0, 0.0, 1.0),
                "noise_probability": 0.0,
                "jpeg_probability": 1.0,
            }
        ),
    )
)
Preset = Literal["clean", "mild", "camera", "seesr", "real-esrgan", "web"]
PRESETS: dict[Preset, Degradation] = {
    "clean": CLEAN,
    "mild": MILD,
    "camera": CAMERA,
    "seesr": SEESR,
    "real-esrgan": REAL_ESRGAN,
    "web": WEB,
}


def _gaussian_kernel(size: int, rng: np.random.Generator, sigma: Range) -> Tensor:
    """Return an anisotropic Gaussian (size, size) at a random angle, with sum 1."""
    sx, sy, angle = rng.uniform(*sigma), rng.uniform(*sigma), rng.uniform(0, np.pi)
    axis = torch.arange(size, dtype=torch.float32) - size // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    u = x * np.cos(angle) + y * np.sin(angle)
    v = y * np.cos(angle) - x * np.sin(angle)
    kernel = torch.exp(-0.5 * ((u / sx) ** 2 + (v / sy) ** 2))
    return kernel / kernel.sum()


def _sinc_kernel(size: int, cutoff: float) -> Tensor:
    """Return a circular low-pass filter with sum 1; its ringing imitates over-sharpening."""
    axis = torch.arange(size, dtype=torch.float32) - size // 2
    radius = torch.hypot(*torch.meshgrid(axis, axis, indexing="ij"))
    safe = radius.clamp(min=1e-6)
    kernel = cutoff * torch.special.bessel_j1(cutoff * safe) / (2 * np.pi * safe)
    kernel[size // 2, size // 2] = cutoff**2 / (4 * np.pi)
    return kernel / kernel.sum()


def _filter(picture: Tensor, kernel: Tensor) -> Tensor:
    pad = kernel.shape[-1] // 2
    padded = F.pad(picture, (pad, pad, pad, pad), mode="replicate")
    channels = picture.shape[1]
    return F.conv2d(padded, kernel.expand(channels, 1, -1, -1), groups=channels)


def _random_sinc(size: int, rng: np.random.Generator) -> Tensor:
    return _sinc_kernel(size, rng.uniform(np.pi / 3, np.pi))


def _add_noise(picture: Tensor, settings: Round, rng: np.random.Generator) -> Tensor:
    gray = rng.random() < settings.gray_noise_probability
    shape = (1, 1 if gray else 3, *picture.shape[-2:])
    if rng.random() < settings.gaussian_probability:
        noise = rng.standard_normal(shape, dtype=np.float32)
        return picture + rng.uniform(*settings.gaussian_sigma) / 255 * torch.from_numpy(noise)
    light = picture.clamp(0, 1).mean(1, keepdim=True) if gray else picture.clamp(0, 1)
    counts = torch.from_numpy(rng.poisson(light.numpy() * 255).astype(np.float32))
    return picture + rng.uniform(*settings.poisson_scale) * (counts / 255 - light)


def _compress(picture: Tensor, settings: Round, rng: np.random.Generator) -> Tensor:
    # Without WebP no random number is drawn, so that the other presets keep their pixels.
    if settings.webp_probability and rng.random() < settings.webp_probability:
        return _through(picture, "WEBP", int(rng.uniform(*settings.webp_quality)))
    return _through(picture, "JPEG", int(rng.uniform(*settings.jpeg_quality)))


def _through(picture: Tensor, kind: str, quality: int) -> Tensor:
    """Return the picture after encoding; JPEGs have Pillow's 4:2:0, as on the web."""
    pixels = (picture[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, quality=quality)
    decoded = torch.from_numpy(np.array(Image.open(buffer)))
    return decoded.permute(2, 0, 1)[None].float() / 255


def _apply(
    picture: Tensor, settings: Round, size: int, lr_sides: list[int], rng: np.random.Generator
) -> Tensor:
    if rng.random() < settings.blur_probability:
        sinc = rng.random() < settings.sinc_probability
        sigma = settings.blur_sigma
        kernel = _random_sinc(size, rng) if sinc else _gaussian_kernel(size, rng, sigma)
        picture = _filter(picture, kernel)
    low, high = settings.resize_range
    way = rng.choice(3, p=settings.resize_up_down_keep)
    factor = (rng.uniform(1, max(high, 1)), rng.uniform(low, min(high, 1)), 1.0)[way]
    before = lr_sides if settings.resize_from_lr else picture.shape[-2:]
    height, width = (max(1, round(n * factor)) for n in before)
    picture = resize(picture, height, width)
    if rng.random() < settings.noise_probability:
        picture = _add_noise(picture, settings, rng)
    if rng.random() < settings.jpeg_probability:
        picture = _compress(picture, settings, rng)
    return picture


def degrade(hr: Tensor, scale: float, config: Degradation, rng: np.random.Generator) -> Tensor:
    """Return LR (3, H / scale, W / scale) of HR (3, H, W), both in [0, 1]; LR is rounded to 8 bits.

    scale: at least 1. The same `rng` state gives the same pixels. Raises ValueError unless H and W
    are whole multiples of `scale`.
    """
    sides = [round(n / scale) for n in hr.shape[1:]]
    exact = all(abs(n - m * scale) < 1e-6 for n, m in zip(hr.shape[1:], sides, strict=True))
    if hr.ndim != 3 or hr.shape[0] != 3 or not exact:
        raise ValueError(
            f"hr must be (3, H, W) with sides a multiple of {scale:g}, not {tuple(hr.shape)}"
        )
    picture = hr[None]
    for settings in config.rounds:
        picture = _apply(picture, settings, config.kernel_size, sides, rng)
    picture = resize(picture, *sides)
    if rng.random() < config.final_sinc_probability:
        picture = _filter(picture, _random_sinc(config.kernel_size, rng))
    return (picture[0].clamp(0, 1) * 255).round() / 255
