"""Picture in, picture out: prepare -> denoise (per expert) -> finish.

    prepare(picture, options) -> Job     imaging, tiles, noise from the seed, tags
    denoise(job, segment) -> Job         one expert takes its run of steps on every tile
    finish(job) -> Picture               decode, blend tiles, colour, final size, metadata

Between the stages a `Job` is plain data, so they may run in one process (as `Upscaler.__call__`
does) or on different machines. Knows nothing of Ray, HTTP or files on disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from linearsr import __version__, weights
from linearsr.config import Options
from linearsr.denoiser import LinearSR
from linearsr.errors import InputError, LinearSRError, OptionError
from linearsr.imaging.colour import fix_colour
from linearsr.imaging.files import Picture, from_pil, to_pil
from linearsr.imaging.resample import resize
from linearsr.imaging.tiles import Canvas, Tile, tile_grid
from linearsr.latent import load_autoencoder
from linearsr.noise.experts import EXPERTS, Segment, plan
from linearsr.noise.sampler import euler, schedule
from linearsr.tags.encoder import tag_encoder
from linearsr.tags.tagger import Tagger, TaggerConfig, load_tagger

# Latent cells. Tiles bound memory; ones as large as this spend few cells on overlap, which is twice
# what the convolutions of eight blocks can see.
AUTO_TILE = 192
OVERLAP = 16
SMALLEST_TILE = 32
# Memory for each pixel of the output: the pictures, latents and noise alive at the peak.
BYTES_PER_PIXEL = 100

Progress = Callable[[str, int, int], None]


class OutOfMemory(LinearSRError):
    """The device's memory did not suffice, with the tile chosen or the smallest one."""


DEFAULTS = Options()


@dataclass(frozen=True)
class Job:
    """A request between stages: tensors and plain values, no models.

    lr: (1, 3, h, w) in [-1, 1], edge-padded so that its latent grid is whole.
    latents: one (1, C, th, tw) per tile, at `timesteps[start of the next segment]`.
    tags: (1, T, tag_dim) embeddings, so that who denoises needs no encoder; None without tags.
    """

    picture: Picture
    options: Options
    steps: int
    lr: Tensor
    tiles: tuple[Tile, ...]
    latents: tuple[Tensor, ...]
    timesteps: tuple[float, ...]
    segments: tuple[Segment, ...]
    tags: Tensor | None = None


class Upscaler:
    """A loaded model and what it takes to apply it to pictures."""

    def __init__(self, bundle: weights.Bundle, device: str | torch.device = "cpu") -> None:
        self.config = bundle.config
        self.device = torch.device(device)
        self.experts = bundle.experts
        self.provenance = bundle.provenance
        self.autoencoder = load_autoencoder(self.config.latent, self.device)
        self.encoder = tag_encoder(self.config, self.device)
        # Threads may share an upscaler: one picture is denoised while others are read and written.
        self._turn = threading.Lock()

    @classmethod
    def load(cls, name_or_folder: str | Path = "linearsr-tiny", device: str = "auto") -> Upscaler:
        """Load a bundled model by name, or a folder of safetensors, onto a device.

        device: "auto" (CUDA, then Apple's MPS, then CPU) or any torch device.
        Raises WeightsError or OptionError.
        """
        chosen = _pick_device(device)
        return cls(weights.load(name_or_folder, chosen, _best_dtype(chosen)), chosen)

    def __call__(self, image: Image.Image, scale: int = 4, **options: object) -> Image.Image:
        """Upscale a PIL image: `upscaler(image, scale=4, steps=..., seed=..., tags=...)`.

        `options` are the fields of `Options`. Raises InputError, OptionError, OutOfMemory.
        """
        return to_pil(self.upscale(from_pil(image), Options.parse(scale=scale, **options)))

    def upscale(
        self, picture: Picture, options: Options = DEFAULTS, progress: Progress | None = None
    ) -> Picture:
        """Upscale a picture; `progress(expert, steps_done, steps)` is called after each segment.

        Out of memory is answered with tiles of half the size, unless the tile was chosen.
        """
        options = self.with_tags(picture, options)
        for tile in self._tile_sizes(options):
            with contextlib.suppress(OutOfMemory):
                return self._attempt(picture, options, tile, progress)
        hint = "choose a smaller --tile" if options.tile != "auto" else "free some of its memory"
        raise OutOfMemory(f"out of memory on {self.device}: {hint}")

    def _tile_sizes(self, options: Options) -> Iterator[int | None]:
        """Tile sides to try, in latent cells; None is the whole picture at once."""
        if options.tile == "off":
            yield None
        elif options.tile != "auto":
            yield max(
                SMALLEST_TILE // 4,
                round(options.tile * self.config.scale / self.autoencoder.factor),
            )
        else:
            size = AUTO_TILE
            while size >= SMALLEST_TILE:
                yield size
                size //= 2

    def _attempt(
        self, picture: Picture, options: Options, tile: int | None, progress: Progress | None
    ) -> Picture:
        with _memory_errors():
            job = self.prepare(picture, options, tile)
            for segment in job.segments:
                job = self.denoise(job, segment)
                if progress:
                    progress(self.expert_name(segment.expert), segment.stop, job.steps)
            return self.finish(job)

    def expert_name(self, expert: int) -> str:
        """The paper's name of an expert, or its number for models with other than four."""
        return EXPERTS[expert] if len(self.experts) == len(EXPERTS) else f"expert {expert}"

    def with_tags(self, picture: Picture, options: Options) -> Options:
        """`options` with the tags that will guide `picture`: for "auto", what a tagger sees in it.

        Raises OptionError for tags on a model trained without: they would change nothing.
        """
        if options.tags and self.encoder is None:
            raise OptionError(f"{self.config.name} was trained without tags; leave out --tags")
        if options.tags != "auto":
            return options
        with _memory_errors():
            found = self._tagger(picture.pixels[:3])
        return options.model_copy(update={"tags": tuple(tag.name for tag in found)})

    @cached_property
    def _tagger(self) -> Tagger:
        return load_tagger(TaggerConfig(), str(self.device))

    def describe(self, options: Options) -> dict[str, str]:
        """Provenance for a result's metadata: what made it, so that it can be made again.

        Tags are those of `options`: give what `with_tags` returned.
        """
        asked = options.model_dump(exclude_defaults=True, exclude={"tags"})
        size = {} if options.width or options.height else {"scale": options.scale}
        steps = options.steps or self.config.sampling.steps
        chosen = {"model": self.config.name, **size, **asked, "steps": steps, "seed": options.seed}
        if options.tags:
            chosen["tags"] = options.tags if options.tags == "auto" else ", ".join(options.tags)
        return {"software": f"linearsr {__version__}", **{k: str(v) for k, v in chosen.items()}}

    @torch.inference_mode()
    def prepare(self, picture: Picture, options: Options, tile: int | None = AUTO_TILE) -> Job:
        """Everything before the first step. `tile` in latent cells; None for no tiles."""
        options = self.with_tags(picture, options)
        sampling = self.config.sampling
        timesteps = schedule(options.steps or sampling.steps, sampling.flow_shift)
        _check_memory(picture, options, self.config.scale)
        lr = self._padded(picture.pixels[None] * 2 - 1)
        height, width = (n * self.config.scale // self.autoencoder.factor for n in lr.shape[-2:])
        tiles = tuple(_grid(height, width, tile))
        noise = self._noise(height, width, options.seed)
        return Job(
            picture=picture,
            options=options,
            steps=len(timesteps) - 1,
            lr=lr,
            tiles=tiles,
            # Copies, so that a tile sent elsewhere does not take the whole field along.
            latents=tuple(t.crop(noise).clone() for t in tiles),
            timesteps=tuple(timesteps),
            segments=tuple(plan(timesteps[:-1], sampling.boundaries)),
            tags=self._encoded(options),
        )

    def _encoded(self, options: Options) -> Tensor | None:
        """(1, T, tag_dim); None without tags."""
        if self.encoder is None or not isinstance(options.tags, tuple):
            return None
        encoded = self.encoder([options.tags])
        return encoded.embeddings.cpu() if encoded.mask.all() else None

    def _padded(self, lr: Tensor) -> Tensor:
        """Edge pixels repeated until scale x side is whole latent cells, two at the least.

        Two: oneDNN's bfloat16 convolution with stride 2 is wrong where its result is one wide.
        """
        cell = math.lcm(self.config.scale, self.autoencoder.factor) // self.config.scale
        bottom, right = (max(-n % cell, 2 * cell - n) for n in lr.shape[-2:])
        return F.pad(lr, (0, right, 0, bottom), mode="replicate") if bottom or right else lr

    def _noise(self, height: int, width: int, seed: int) -> Tensor:
        """One field for the whole picture, drawn on the CPU: tiles share it where they overlap."""
        shape = (1, self.config.denoiser.latent_channels, height, width)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    @torch.inference_mode()
    def denoise(self, job: Job, segment: Segment) -> Job:
        """One expert takes its steps on every tile."""
        model = self.experts[segment.expert]
        with self._turn:
            latents = [
                self._denoise_tile(model, job, segment, tile, latent)
                for tile, latent in zip(job.tiles, job.latents, strict=True)
            ]
        return dataclasses.replace(job, latents=tuple(latents))

    def _denoise_tile(
        self, model: LinearSR, job: Job, segment: Segment, tile: Tile, latent: Tensor
    ) -> Tensor:
        lr_picture = self._upsampled(job.lr, tile)
        joined = None
        if model.config.condition_latent:
            joined = self.autoencoder.condition(lr_picture)
        dtype = model.embed.weight.dtype
        tags = None if job.tags is None else job.tags.to(self.device, dtype)
        condition = model.condition(lr_picture.to(dtype), joined, tags)
        latent = latent.to(self.device).contiguous(memory_format=torch.channels_last)
        steps = (segment.start, segment.stop)
        return euler(lambda z, t: model(z, t, condition), latent, job.timesteps, *steps).cpu()

    def _upsampled(self, lr: Tensor, tile: Tile) -> Tensor:
        """The bicubic picture under one tile, equal to that part of the whole bicubic picture."""
        factor, scale = self.autoencoder.factor, self.config.scale
        rows = _span(tile.top, tile.bottom, factor, scale, lr.shape[-2])
        columns = _span(tile.left, tile.right, factor, scale, lr.shape[-1])
        part = lr[..., rows.start : rows.stop, columns.start : columns.stop].to(self.device)
        whole = resize(part, part.shape[-2] * scale, part.shape[-1] * scale)
        inside = Tile(rows.offset, columns.offset, tile.height * factor, tile.width * factor)
        return inside.crop(whole)

    @torch.inference_mode()
    def finish(self, job: Job) -> Picture:
        """Decode, join tiles, fix colour, crop or resample to the size asked for."""
        factor = self.autoencoder.factor
        canvas = Canvas((t.scaled(factor) for t in job.tiles), 3)
        for tile, latent in zip(job.tiles, job.latents, strict=True):
            lr_picture = self._upsampled(job.lr, tile)
            piece = self.autoencoder.decode(latent.to(lr_picture), lr_picture)
            canvas.add(tile.scaled(factor), piece[0].float().cpu())
        restored = canvas.result()[None]
        height, width = (n * self.config.scale for n in job.picture.pixels.shape[-2:])
        restored = restored[..., :height, :width]
        source = resize(job.lr, *(n * self.config.scale for n in job.lr.shape[-2:]))
        restored = fix_colour(restored, source[..., :height, :width], job.options.colour_fix)
        return _with_pixels(job, restored)


def _grid(height: int, width: int, tile: int | None) -> list[Tile]:
    if tile is None:
        return [Tile(0, 0, height, width)]
    return tile_grid(height, width, tile, min(OVERLAP, tile // 4))


@dataclass(frozen=True)
class _Span:
    """LR pixels `start` to `stop`; upsampled, the tile begins `offset` pixels into them."""

    start: int
    stop: int
    offset: int


def _span(first: int, last: int, factor: int, scale: int, length: int) -> _Span:
    """The LR pixels that bicubic needs for cells `first` to `last`: two more on each side."""
    start = max(0, first * factor // scale - 2)
    stop = min(length, -(-last * factor // scale) + 2)
    return _Span(start, stop, first * factor - start * scale)


def _with_pixels(job: Job, restored: Tensor) -> Picture:
    """The finished picture: final size, [0, 1], alpha and metadata of the original."""
    height, width = output_size(job.picture, job.options)
    pixels = resize(restored, height, width)[0].add_(1).div_(2).clamp_(0, 1)
    alpha = job.picture.alpha
    if alpha is not None:
        alpha = resize(alpha[None], height, width)[0].clamp_(0, 1)
    return dataclasses.replace(job.picture, pixels=pixels, alpha=alpha)


def output_size(picture: Picture, options: Options) -> tuple[int, int]:
    """Height and width of the result that `options` ask for."""
    height, width = picture.pixels.shape[-2:]
    if options.width and options.height:
        return options.height, options.width
    if options.width:
        return max(1, round(height * options.width / width)), options.width
    if options.height:
        return options.height, max(1, round(width * options.height / height))
    return height * options.scale, width * options.scale


def _check_memory(picture: Picture, options: Options, scale: int) -> None:
    """Refuse what cannot fit: past this point Linux would kill the process without a word."""
    height, width = picture.pixels.shape[-2:]
    computed, final = scale**2 * height * width, math.prod(output_size(picture, options))
    need = BYTES_PER_PIXEL * max(computed, final)
    free = psutil.virtual_memory().available
    if need > free:
        raise InputError(
            f"a {width}x{height} picture needs about {need / 2**30:.1f} GiB of memory and "
            f"{free / 2**30:.1f} GiB are free; shrink or split it"
        )


def _pick_device(device: str) -> torch.device:
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).cpu()
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"device {device!r} cannot be used: {reason}") from error


def _best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where matrix units take it (CUDA, or a CPU with AMX), else float32."""
    if device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_amx_tile_supported()):
        return torch.bfloat16
    return torch.float32


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    """Every allocator's way of saying no, as one error."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(str(error)) from error
    except RuntimeError as error:
        if any(
            words in str(error) for words in ("allocate memory", "out of memory", "ALLOC_FAILED")
        ):
            raise OutOfMemory(str(error)) from error
        raise
