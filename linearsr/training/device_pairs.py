"""Training pairs cut and degraded on the device: what one GPU needs to be kept busy.

The degradations are those of `linearsr.imaging.degrade`, for many pictures at once: pictures of a
chunk share the sizes that they are resized to and differ in all else. JPEG is its arithmetic
(colour, 4:2:0, DCT, quantisation) without the entropy coder, which loses nothing. Knows nothing of
models or files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from linearsr.imaging.resample import resize

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
    """Photographs at several sizes, as one array of pixels on the device."""

    def __init__(self, photos: Sequence[Tensor], shrinks: int, device: torch.device, seed: int) -> None:
        """photos: (3, H, W) uint8 each, kept at their own size and at `shrinks` smaller ones."""
        rng = np.random.default_rng(seed)
        flat, self.table, offset = [], [], 0
        for photo in photos:
            whole = photo.to(device)
            factors = [1.0, *np.exp(rng.uniform(math.log(0.3), 0, shrinks))]
            for factor in factors:
                h, w = (max(256, round(n * factor)) for n in whole.shape[1:])
                small = resize(whole[None].float(), h, w)[0].clamp(0, 255).round().byte()
                flat.append(small.permute(1, 2, 0).reshape(-1, 3))
                self.table.append((offset, h, w))
                offset += h * w
        self.pixels, self.device = torch.cat(flat), device
        self.offsets = torch.tensor(self.table, device=device)

    def crops(self, count: int, size: int) -> Tensor:
        """(count, 3, size, size) in [0, 1]; half of them the busier of two, all turned at random."""
        candidates = self._crops(2 * count, size).unflatten(0, (2, count))
        busy = candidates.diff(dim=-1).abs().mean((2, 3, 4))
        second = (busy[1] > busy[0]) & (torch.rand(count, device=self.device) < 0.5)
        x = torch.where(second[:, None, None, None], candidates[1], candidates[0])
        for turn in (lambda y: y.flip(2), lambda y: y.flip(3), lambda y: y.transpose(2, 3)):
            x = torch.where(self._some(count, 0.5), turn(x), x)
        light = torch.empty(count, 1, 1, 1, device=self.device).uniform_(0.6, 1.1)
        return torch.where(self._some(count, 0.2), (x * light).clamp(0, 1), x)

    def _some(self, count: int, share: float) -> Tensor:
        return torch.rand(count, 1, 1, 1, device=self.device) < share

    def _crops(self, count: int, size: int) -> Tensor:
        which = torch.randint(len(self.table), (count,), device=self.device)
        offset, h, w = self.offsets[which].unbind(1)
        top = (torch.rand(count, device=self.device) * (h - size + 1)).long()
        left = (torch.rand(count, device=self.device) * (w - size + 1)).long()
        axis = torch.arange(size, device=self.device)
        rows = (top[:, None] + axis)[:, :, None] * w[:, None, None]
        columns = (left[:, None] + axis)[:, None, :]
        index = offset[:, None, None] + rows + columns
        return self.pixels[index].permute(0, 3, 1, 2).float() / 255


def uniform(count: int, low: float, high: float, like: Tensor) -> Tensor:
    """(count, 1, 1, 1)."""
    return torch.empty(count, 1, 1, 1, device=like.device).uniform_(low, high)


def pick(x: Tensor, other: Tensor, share: float) -> Tensor:
    """Each picture of `other` with that probability, else of `x`."""
    return torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < share, other, x)


def gaussian_kernels(count: int, low: float, high: float, device: torch.device, size: int = 21) -> Tensor:
    """Anisotropic Gaussians at random angles, (count, size, size), sum 1."""
    sx, sy, angle = (torch.rand(3, count, 1, 1, device=device)).unbind(0)
    sx, sy, angle = low + (high - low) * sx, low + (high - low) * sy, math.pi * angle
    axis = torch.arange(size, device=device, dtype=torch.float32) - size // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    u, v = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    kernel = torch.exp(-0.5 * ((u / sx) ** 2 + (v / sy) ** 2))
    return kernel / kernel.sum((1, 2), keepdim=True)


def sinc_kernels(count: int, device: torch.device, size: int = 21) -> Tensor:
    """Circular low-pass filters, (count, size, size), sum 1."""
    cutoff = math.pi / 3 + (math.pi - math.pi / 3) * torch.rand(count, 1, 1, device=device)
    axis = torch.arange(size, device=device, dtype=torch.float32) - size // 2
    radius = torch.hypot(*torch.meshgrid(axis, axis, indexing="ij"))[None]
    safe = radius.clamp(min=1e-6)
    kernel = cutoff * torch.special.bessel_j1(cutoff * safe) / (2 * math.pi * safe)
    kernel = torch.where(radius == 0, cutoff**2 / (4 * math.pi), kernel)
    return kernel / kernel.sum((1, 2), keepdim=True)


def filtered(x: Tensor, kernels: Tensor) -> Tensor:
    """Each picture by its own kernel (B, K, K), through the Fourier transform."""
    pad = kernels.shape[-1] // 2
    padded = F.pad(x, (pad,) * 4, mode="replicate")
    # Few sizes of transform: each new one costs a plan, which takes longer than the transform.
    shape = [-(-n // 64) * 64 for n in padded.shape[-2:]]
    spectrum = torch.fft.rfft2(kernels, s=shape)[:, None]
    result = torch.fft.irfft2(torch.fft.rfft2(padded, s=shape) * spectrum, s=shape)
    # The kernel's middle lies at (pad, pad): the result is moved by as much.
    height, width = x.shape[-2:]
    return result[..., 2 * pad : 2 * pad + height, 2 * pad : 2 * pad + width]


def blurred(x: Tensor, share: float, sigma: tuple[float, float], sinc: float) -> Tensor:
    """Gaussian blur, or at times a sinc filter, on a share of the pictures."""
    kernels = gaussian_kernels(len(x), *sigma, x.device)
    if sinc:
        some = torch.rand(len(x), 1, 1, device=x.device) < sinc
        kernels = torch.where(some, sinc_kernels(len(x), x.device), kernels)
    return pick(x, filtered(x, kernels), share)


def noisy(x: Tensor, share: float, sigma: tuple[float, float], poisson: tuple[float, float]) -> Tensor:
    """Gaussian noise on one half, Poisson noise on the other; 40% of it grey."""
    count = len(x)
    gray = torch.rand(count, 1, 1, 1, device=x.device) < 0.4
    noise = torch.randn_like(x)
    noise = torch.where(gray, noise[:, :1], noise) * uniform(count, *sigma, x) / 255
    light = x.clamp(0, 1)
    light = torch.where(gray, light.mean(1, keepdim=True), light)
    counts = torch.poisson(light * 255) / 255
    counts = torch.where(gray, counts[:, :1], counts)
    shot = (counts - light) * uniform(count, *poisson, x)
    return pick(x, x + pick(noise, shot, 0.5), share)


def jpeg(x: Tensor, share: float, quality: tuple[float, float]) -> Tensor:
    """JPEG with 4:2:0 at qualities of their own, on a share of the pictures."""
    count, (height, width) = len(x), x.shape[-2:]
    q = uniform(count, *quality, x).floor()[..., None, None]
    factor = torch.where(q < 50, 5000 / q, 200 - 2 * q)
    padded = F.pad((x.clamp(0, 1) * 255).round(), (0, -width % 16, 0, -height % 16), mode="replicate")
    r, g, b = padded.unbind(1)
    luma = 0.299 * r + 0.587 * g + 0.114 * b
    chroma = torch.stack([(b - luma) * 0.564 + 128, (r - luma) * 0.713 + 128], 1)
    luma = _quantised(luma[:, None], LUMINANCE, factor)
    chroma = _quantised(F.avg_pool2d(chroma, 2), CHROMINANCE, factor)
    chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear") - 128
    cb, cr, y = chroma[:, 0], chroma[:, 1], luma[:, 0]
    rgb = torch.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], 1)
    decoded = rgb[..., :height, :width].round().clamp(0, 255) / 255
    return pick(x, decoded, share)


def _quantised(plane: Tensor, table: Tensor, factor: Tensor) -> Tensor:
    """Planes (B, C, H, W) in [0, 255] through an 8x8 DCT rounded to the steps of their quality."""
    n = torch.arange(8, device=plane.device, dtype=torch.float32)
    basis = torch.cos((2 * n + 1) * n[:, None] * math.pi / 16) / 2
    basis[0] /= math.sqrt(2)
    steps = ((table.to(plane.device) * factor + 50) / 100).floor().clamp(1, 255)
    blocks = (plane - 128).unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)
    coefficients = basis @ blocks @ basis.T
    blocks = basis.T @ ((coefficients / steps).round() * steps) @ basis
    return blocks.transpose(3, 4).flatten(4, 5).flatten(2, 3) + 128


def resized(x: Tensor, factor: float) -> Tensor:
    """All of the chunk by one factor."""
    return resize(x, *(max(16, round(n * factor)) for n in x.shape[-2:]))


def second_order(x: Tensor, rng: np.random.Generator, small: int) -> Tensor:
    """SeeSR's milder set of Real-ESRGAN's second-order degradation, down to a side of `small`."""
    for share, sigma, way, span, gauss, shot, quality in (
        (1.0, (0.2, 3.0), (0.2, 0.7, 0.1), (0.3, 1.5), (1.0, 15.0), (0.05, 2.0), (60.0, 95.0)),
        (0.5, (0.2, 1.5), (0.3, 0.4, 0.3), (0.6, 1.2), (1.0, 12.0), (0.05, 1.0), (60.0, 100.0)),
    ):
        x = blurred(x, share, sigma, 0.1)
        up, down = rng.uniform(1, span[1]), rng.uniform(span[0], 1)
        x = resized(x, (up, down, 1.0)[rng.choice(3, p=way)])
        x = jpeg(noisy(x, 1.0, gauss, shot), 1.0, quality)
    x = resize(x, small, small)
    return pick(x, filtered(x, sinc_kernels(len(x), x.device)), 0.8)


def camera(x: Tensor, small: int, share: float) -> Tensor:
    """One round of blur, shrinking, noise and JPEG, each on that share of the pictures."""
    x = resize(blurred(x, share, (0.4, 2.4), 0.0), small, small)
    return jpeg(noisy(x, share, (1.0, 10.0), (0.05, 0.5)), share, (50.0, 95.0))


def web(x: Tensor, rng: np.random.Generator, small: int) -> Tensor:
    """A picture from the web: shrunk and saved as JPEG, often twice with a resize in between."""
    x = blurred(x, 0.3, (0.2, 1.5), 0.0)
    first = round(small * rng.uniform(1, 1.6))
    x = jpeg(noisy(resize(x, first, first), 0.3, (1.0, 4.0), (0.05, 0.3)), 0.9, (40.0, 95.0))
    return jpeg(resize(x, small, small), 0.8, (40.0, 95.0))


def degraded(hr: Tensor, preset: str, small: int, rng: np.random.Generator) -> Tensor:
    """HR (B, 3, S, S) in [0, 1] -> LR (B, 3, small, small), rounded to 8 bits."""
    if preset == "clean":
        x = resize(hr, small, small)
    elif preset in ("mild", "camera"):
        x = camera(hr, small, 1.0 if preset == "camera" else 0.5)
    else:
        x = web(hr, rng, small) if preset == "web" else second_order(hr, rng, small)
    return (x.clamp(0, 1) * 255).round() / 255


def pairs(
    atlas: Atlas, patch: int, batch: int, mix: dict[str, float], at_four: float, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches: HR and the enlarged LR, (batch, 3, patch, patch) in [-1, 1].

    Eight chunks are made at a time, of one preset and scale each, and shuffled into eight batches.
    """
    rng, margin = np.random.default_rng(seed), patch // 8
    while True:
        hrs, lrs = [], []
        for _ in range(8):
            preset = str(rng.choice(list(mix), p=list(mix.values())))
            # Whole LR pixels in the patch and in the margin.
            side = patch // 4 if rng.random() < at_four else 8 * int(rng.integers(patch // 32, patch // 8 + 1))
            if preset == "clean" and side > 0.8 * patch:
                preset = "web"
            hr = atlas.crops(batch, patch + 2 * margin)
            lr = degraded(hr, preset, side + 2 * side // 8, rng)
            enlarged = resize(lr, *hr.shape[-2:])
            inner = slice(margin, margin + patch)
            hrs.append(hr[..., inner, inner] * 2 - 1)
            lrs.append(enlarged[..., inner, inner] * 2 - 1)
        order = torch.randperm(8 * batch, device=hrs[0].device)
        hr, lr = torch.cat(hrs)[order], torch.cat(lrs)[order]
        yield from zip(hr.split(batch), lr.split(batch), strict=True)
