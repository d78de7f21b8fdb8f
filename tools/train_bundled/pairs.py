"""Training pairs cut and degraded on the device, fast enough to keep one GPU busy.

    photographs ─ Atlas.crops ─▶ HR ─ degraded ─▶ LR ─ resize ─▶ enlarged LR

The degradations are those of `linearsr.imaging.degradation`, for many pictures at once: pictures
of a chunk share the sizes that they are resized to and differ in all else. JPEG is its arithmetic
(colour, 4:2:0, DCT, quantisation) without the entropy coder, which loses nothing, and there is no
WebP. Knows nothing of models, files or stages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from linearsr.imaging.degradation import PRESETS, Degradation, Preset, Range, Round
from linearsr.imaging.resample import resize

CHUNKS = 8  # number of chunks whose pairs are shuffled together
KERNEL = 21  # pixels
# The quantisation tables of JPEG's Annex K.
LUMINANCE = torch.tensor(
    [16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56,
     14, 17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113,
     92, 49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99]
).float().view(8, 8)  # fmt: skip
CHROMINANCE = torch.full((8, 8), 99.0)
CHROMINANCE[:4, :4] = torch.tensor(
    [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]
).float()


class Atlas:
    """Photographs at several sizes, as one array of pixels on the device.

    photos: (3, H, W) uint8 each. Every one is kept at its own size and at `shrinks` smaller ones,
    down to 0.3 of it; no side has less than SMALLEST pixels.
    """

    SMALLEST = 256

    def __init__(
        self, photos: Iterable[Tensor], shrinks: int, device: torch.device, seed: int
    ) -> None:
        rng = np.random.default_rng(seed)
        flat: list[Tensor] = []
        places: list[tuple[int, int, int]] = []
        offset = 0
        for photo in photos:
            whole = photo.to(device)
            for factor in (1.0, *np.exp(rng.uniform(math.log(0.3), 0, shrinks))):
                h, w = (max(self.SMALLEST, round(n * factor)) for n in whole.shape[1:])
                small = resize(whole[None].float(), h, w)[0].clamp(0, 255).round().byte()
                flat.append(small.permute(1, 2, 0).reshape(-1, 3))
                places.append((offset, h, w))
                offset += h * w
        self.pixels, self.device = torch.cat(flat), device
        # For each picture: index of its first pixel, height, width.
        self.places = torch.tensor(places, device=device)

    def crops(self, count: int, size: int) -> Tensor:
        """Return random crops (count, 3, size, size) in [0, 1], flipped and turned at random.

        size: up to SMALLEST. Half of the crops are the busier of two; a fifth is darker or lighter.
        """
        candidates = self._crops(2 * count, size).unflatten(0, (2, count))
        busy = candidates.diff(dim=-1).abs().mean((2, 3, 4))
        second = (busy[1] > busy[0]) & (torch.rand(count, device=self.device) < 0.5)
        x = torch.where(second[:, None, None, None], candidates[1], candidates[0])
        turns: list[Callable[[Tensor], Tensor]] = [
            lambda y: y.flip(2),
            lambda y: y.flip(3),
            lambda y: y.transpose(2, 3),
        ]
        for turn in turns:
            x = torch.where(self._some(count, 0.5), turn(x), x)
        light = uniform(count, (0.6, 1.1), self.device)
        return torch.where(self._some(count, 0.2), (x * light).clamp(0, 1), x)

    def _some(self, count: int, share: float) -> Tensor:
        return torch.rand(count, 1, 1, 1, device=self.device) < share

    def _crops(self, count: int, size: int) -> Tensor:
        which = torch.randint(len(self.places), (count,), device=self.device)
        offset, h, w = self.places[which].unbind(1)
        top = (torch.rand(count, device=self.device) * (h - size + 1)).long()
        left = (torch.rand(count, device=self.device) * (w - size + 1)).long()
        axis = torch.arange(size, device=self.device)
        rows = (top[:, None] + axis)[:, :, None] * w[:, None, None]
        columns = (left[:, None] + axis)[:, None, :]
        index = offset[:, None, None] + rows + columns
        return self.pixels[index].permute(0, 3, 1, 2).float() / 255


def uniform(count: int, span: Range, device: torch.device) -> Tensor:
    """Return random numbers within `span`, one for each picture: (count, 1, 1, 1)."""
    return torch.empty(count, 1, 1, 1, device=device).uniform_(*span)


def pick(x: Tensor, other: Tensor, share: float) -> Tensor:
    """Return `x` with a random share of its pictures replaced by those of `other`."""
    if share >= 1:
        return other
    return torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < share, other, x)


def gaussian_kernels(count: int, sigma: Range, device: torch.device) -> Tensor:
    """Return anisotropic Gaussians, (count, KERNEL, KERNEL), sum 1; sigma in pixels."""
    sx, sy = (uniform(count, sigma, device)[:, 0] for _ in range(2))
    angle = uniform(count, (0.0, math.pi), device)[:, 0]
    y, x = _offsets(device)
    u, v = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    kernel = torch.exp(-0.5 * ((u / sx) ** 2 + (v / sy) ** 2))
    return kernel / kernel.sum((1, 2), keepdim=True)


def sinc_kernels(count: int, device: torch.device) -> Tensor:
    """Return circular low-pass filters, (count, KERNEL, KERNEL), sum 1."""
    cutoff = uniform(count, (math.pi / 3, math.pi), device)[:, 0]
    radius = torch.hypot(*_offsets(device))[None]
    safe = radius.clamp(min=1e-6)
    kernel = cutoff * torch.special.bessel_j1(cutoff * safe) / (2 * math.pi * safe)
    kernel = torch.where(radius == 0, cutoff**2 / (4 * math.pi), kernel)
    return kernel / kernel.sum((1, 2), keepdim=True)


def _offsets(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return how far each pixel of a kernel is below the middle and to its right."""
    axis = torch.arange(KERNEL, device=device, dtype=torch.float32) - KERNEL // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return y, x


def filtered(x: Tensor, kernels: Tensor) -> Tensor:
    """Filter pictures (B, C, H, W) by kernels (B, K, K) of their own, by Fourier transform.

    K is odd; beyond the edges the outermost pixels are repeated.
    """
    pad = kernels.shape[-1] // 2
    padded = F.pad(x, (pad,) * 4, mode="replicate")
    # Few sizes of transform: each new one costs a plan, which takes longer than the transform.
    shape = [-(-n // 64) * 64 for n in padded.shape[-2:]]
    spectrum = torch.fft.rfft2(kernels, s=shape)[:, None]
    result = torch.fft.irfft2(torch.fft.rfft2(padded, s=shape) * spectrum, s=shape)
    # The kernel's middle lies at (pad, pad): the result is moved by as much.
    height, width = x.shape[-2:]
    return result[..., 2 * pad : 2 * pad + height, 2 * pad : 2 * pad + width]


def blurred(x: Tensor, settings: Round) -> Tensor:
    """Blur each picture with probability `settings.blur_probability`.

    The filter is a Gaussian or, with probability `settings.sinc_probability`, a sinc filter.
    """
    kernels = gaussian_kernels(len(x), settings.blur_sigma, x.device)
    if settings.sinc_probability:
        some = torch.rand(len(x), 1, 1, device=x.device) < settings.sinc_probability
        kernels = torch.where(some, sinc_kernels(len(x), x.device), kernels)
    return pick(x, filtered(x, kernels), settings.blur_probability)


def noisy(x: Tensor, settings: Round) -> Tensor:
    """Add Gaussian or Poisson noise to each picture with probability `settings.noise_probability`.

    The noise is grey with probability `settings.gray_noise_probability`.
    """
    count = len(x)
    gray = torch.rand(count, 1, 1, 1, device=x.device) < settings.gray_noise_probability
    noise = torch.randn_like(x)
    noise = torch.where(gray, noise[:, :1], noise)
    noise = noise * uniform(count, settings.gaussian_sigma, x.device) / 255
    light = x.clamp(0, 1)
    light = torch.where(gray, light.mean(1, keepdim=True), light)
    counts = torch.poisson(light * 255) / 255
    counts = torch.where(gray, counts[:, :1], counts)
    shot = (counts - light) * uniform(count, settings.poisson_scale, x.device)
    noise = pick(shot, noise, settings.gaussian_probability)
    return pick(x, x + noise, settings.noise_probability)


def jpeg(x: Tensor, quality: Range, share: float = 1.0) -> Tensor:
    """Apply JPEG with 4:2:0 to a share of pictures (B, 3, H, W) in [0, 1], at random qualities.

    Qualities are whole numbers from 1 to 100, on the scale of libjpeg and Pillow.
    """
    height, width = x.shape[-2:]
    q = uniform(len(x), quality, x.device).floor()[..., None, None]
    factor = torch.where(q < 50, 5000 / q, 200 - 2 * q)
    sides = (0, -width % 16, 0, -height % 16)
    r, g, b = F.pad((x.clamp(0, 1) * 255).round(), sides, mode="replicate").unbind(1)
    luma = 0.299 * r + 0.587 * g + 0.114 * b
    chroma = torch.stack([(b - luma) * 0.564 + 128, (r - luma) * 0.713 + 128], 1)
    luma = _quantised(luma[:, None], LUMINANCE, factor)
    chroma = _quantised(F.avg_pool2d(chroma, 2), CHROMINANCE, factor)
    chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear") - 128
    cb, cr, y = chroma[:, 0], chroma[:, 1], luma[:, 0]
    rgb = torch.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], 1)
    return pick(x, rgb[..., :height, :width].round().clamp(0, 255) / 255, share)


def _quantised(plane: Tensor, table: Tensor, factor: Tensor) -> Tensor:
    """Round the 8x8 DCT of planes (B, C, H, W) in [0, 255] to the steps of their quality.

    table: (8, 8), the steps at quality 50. factor: (B, 1, 1, 1, 1, 1), percent of them.
    """
    n = torch.arange(8, device=plane.device, dtype=torch.float32)
    basis = torch.cos((2 * n + 1) * n[:, None] * math.pi / 16) / 2
    basis[0] /= math.sqrt(2)
    steps = ((table.to(plane.device) * factor + 50) / 100).floor().clamp(1, 255)
    blocks = (plane - 128).unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)
    coefficients = basis @ blocks @ basis.T
    blocks = basis.T @ ((coefficients / steps).round() * steps) @ basis
    return blocks.transpose(3, 4).flatten(4, 5).flatten(2, 3) + 128


def second_order(x: Tensor, preset: Degradation, small: int, rng: np.random.Generator) -> Tensor:
    """Apply Real-ESRGAN's second-order degradation, or a milder one, down to side `small`."""
    for settings in preset.rounds:
        x = blurred(x, settings)
        low, high = settings.resize_range
        factors = rng.uniform(1, high), rng.uniform(low, 1), 1.0
        factor = factors[rng.choice(3, p=settings.resize_up_down_keep)]
        x = resize(x, *(max(16, round(n * factor)) for n in x.shape[-2:]))
        x = jpeg(noisy(x, settings), settings.jpeg_quality, settings.jpeg_probability)
    x = resize(x, small, small)
    kernels = sinc_kernels(len(x), x.device)
    return pick(x, filtered(x, kernels), preset.final_sinc_probability)


def one_round(x: Tensor, preset: Degradation, small: int) -> Tensor:
    """Degrade as a camera does: blur, shrink to side `small`, add noise, apply JPEG."""
    (settings,) = preset.rounds
    x = noisy(resize(blurred(x, settings), small, small), settings)
    return jpeg(x, settings.jpeg_quality, settings.jpeg_probability)


# Simpler than the preset of `degrade`: no WebP; the first file is somewhat larger than LR.
WEB_FILE = Round(
    blur_probability=0.3,
    blur_sigma=(0.2, 1.5),
    sinc_probability=0.0,
    noise_probability=0.3,
    gaussian_sigma=(1.0, 4.0),
    poisson_scale=(0.05, 0.3),
    jpeg_probability=0.9,
    jpeg_quality=(40.0, 95.0),
)


def web(x: Tensor, small: int, rng: np.random.Generator) -> Tensor:
    """Degrade as the web does: shrink and save as JPEG, often twice with a resize in between."""
    first = round(small * rng.uniform(1, 1.6))
    x = noisy(resize(blurred(x, WEB_FILE), first, first), WEB_FILE)
    x = jpeg(x, WEB_FILE.jpeg_quality, WEB_FILE.jpeg_probability)
    return jpeg(resize(x, small, small), WEB_FILE.jpeg_quality, 0.8)


def degraded(hr: Tensor, preset: Preset, small: int, rng: np.random.Generator) -> Tensor:
    """Return LR (B, 3, small, small) in [0, 1], rounded to 8 bits, of HR (B, 3, S, S) in [0, 1].

    `rng` draws the intermediate sizes; all else comes from torch's generator of the device.
    """
    if preset == "clean":
        x = resize(hr, small, small)
    elif preset in ("mild", "camera"):
        x = one_round(hr, PRESETS[preset], small)
    elif preset == "web":
        x = web(hr, small, rng)
    else:
        x = second_order(hr, PRESETS[preset], small, rng)
    return (x.clamp(0, 1) * 255).round() / 255


def pairs(
    atlas: Atlas, patch: int, batch: int, mix: Mapping[Preset, float], at_four: float, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield endless batches: HR and the enlarged LR, (batch, 3, patch, patch) in [-1, 1].

    mix: share of each preset. at_four: share at scale 4; other scales are from 1 to 4. patch: a
    multiple of 32. CHUNKS chunks of one preset and scale each are made at a time, and shuffled into
    as many batches.
    """
    rng = np.random.default_rng(seed)
    presets, shares = list(mix), list(mix.values())
    while True:
        chunks = []
        for _ in range(CHUNKS):
            preset = presets[rng.choice(len(presets), p=shares)]
            # Whole LR pixels in the patch and in the margin.
            side = 8 * int(rng.integers(patch // 32, patch // 8 + 1))
            side = patch // 4 if rng.random() < at_four else side
            # Hardly shrunk, a clean picture has nothing to teach.
            preset = "web" if preset == "clean" and side > 0.8 * patch else preset
            chunks.append(_chunk(atlas, patch, batch, preset, side, rng))
        hr, enlarged = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        order = torch.randperm(len(hr), device=hr.device)
        yield from zip(hr[order].split(batch), enlarged[order].split(batch), strict=True)


def _chunk(
    atlas: Atlas, patch: int, batch: int, preset: Preset, side: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Return a batch of one preset, whose patches have LR of `side` pixels.

    An eighth more is degraded on each side of the patch, so no filter sees an edge inside it.
    """
    margin = patch // 8
    hr = atlas.crops(batch, patch + 2 * margin)
    enlarged = resize(degraded(hr, preset, side + 2 * side // 8, rng), *hr.shape[-2:])
    inner = slice(margin, margin + patch)
    return hr[..., inner, inner] * 2 - 1, enlarged[..., inner, inner] * 2 - 1
