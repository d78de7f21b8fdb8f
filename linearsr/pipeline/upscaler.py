"""Picture in, picture out: prepare -> denoise (per expert) -> finish.

    prepare(picture, options) -> UpscaleState     imaging, tiles, noise from the seed, tags
    denoise(job, segment) -> UpscaleState         one expert takes its run of steps on every tile
    finish(job) -> Picture               decode, blend tiles, colour, final size, metadata

Between the stages a `UpscaleState` is plain data, so they may run in one process (as `Upscaler.__call__`
does) or on different machines. Knows nothing of Ray, HTTP or files on disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

import psutil
import torch
from PIL import Image
from torch import Tensor

from linearsr import __version__, weights
from linearsr.config import Options, Solver
from linearsr.denoiser.model import LinearSR, TagKeys
from linearsr.diffusion.experts import Segment, plan
from linearsr.diffusion.path import clean_guess
from linearsr.diffusion.schedule import schedule
from linearsr.diffusion.solvers import SolverState, looks_back, sample
from linearsr.errors import LinearSRError, OptionError, TooLarge, WeightsError
from linearsr.imaging.colour import fix_colour
from linearsr.imaging.files import Picture, from_pil, to_pil
from linearsr.imaging.resample import enlarged_part, resize
from linearsr.imaging.tiles import Canvas, Tile, tile_grid
from linearsr.latent import Autoencoder, load_autoencoder
from linearsr.tags import load_tagger
from linearsr.tags.base import Tagger, TaggerConfig
from linearsr.tags.encoder import tag_encoder

# Latent cells. Tiles bound memory; ones as large as this spend few cells on overlap, which is twice
# what the convolutions of eight blocks can see. Outputs of up to 1280 pixels then need none (tiny).
AUTO_TILE = 320
OVERLAP = 16
SMALLEST_TILE = 32
# Latent cells of several works that go through a model at once. More would leave a CPU's caches:
# 8 works of 64 x 64 cells together took 1.5 times as long as in turn, of 16 x 16 half as long.
CPU_BATCH = 2048
GPU_BATCH = 192**2
# Memory for each pixel of the output, at the peak: measured with linearsr-tiny from 2048 pixels up,
# 82 to 138 bytes in tiles, and 124 to 192 when all go through the model at once (most in float32).
BYTES_PER_PIXEL = 150
BYTES_PER_PIXEL_UNTILED = 200
# And for each of the input, which counts at small scales: it is held as read, and in [-1, 1].
BYTES_PER_INPUT_PIXEL = 24
# And for the first step's guess, where it is kept: 48 channels for each 4 x 4 pixels of the output.
# At x1 in tiles with half of the detail, 164 bytes were measured in all.
BYTES_PER_GUESSED_PIXEL = 12

# Of allocators, and of CUDA for tensors of more than 2**31 numbers.
_NO_ROOM = ("allocate memory", "out of memory", "ALLOC_FAILED", "32-bit index math")

Progress = Callable[[str, int, int], None]


class OutOfMemory(LinearSRError):
    """The device's memory did not suffice, with the tile chosen or the smallest one."""


DEFAULTS = Options()


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    """Every allocator's way of saying no, as one error."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(str(error)) from error
    except RuntimeError as error:
        if any(words in str(error) for words in _NO_ROOM):
            raise OutOfMemory(str(error)) from error
        raise


@dataclass(frozen=True, kw_only=True)
class DenoiseState:
    """What who denoises needs of a request: tensors and plain values, no models.

    lr: (1, 3, h, w) in [-1, 1].
    size: height and width to which bicubic enlarges it; what the latent grid has beyond them
        repeats the last pixels.
    latents: one (1, C, th, tw) per tile, at `timesteps[start of the next segment]`.
    timesteps: steps + 1 of them, from 1 to 0.
    tags: (1, T, tag_dim) embeddings, so that who denoises needs no encoder; None without tags.
    previous: as `latents`, what a solver of second order saw at the step before; empty where the
        next step does not look back.
    blends: whether the result is blended with the clean latent that the first step guesses.
    guess: as `latents`, that guess; empty before the first step, and where nothing is blended.
    """

    lr: Tensor
    size: tuple[int, int]
    tiles: tuple[Tile, ...]
    latents: tuple[Tensor, ...]
    timesteps: tuple[float, ...]
    tags: Tensor | None = None
    solver: Solver = "euler"
    previous: tuple[Tensor, ...] = ()
    blends: bool = False
    guess: tuple[Tensor, ...] = ()


AnyState = TypeVar("AnyState", bound=DenoiseState)


@dataclass(frozen=True, kw_only=True)
class UpscaleState(DenoiseState):
    """A request between stages: the work, and what its two ends need besides."""

    picture: Picture
    options: Options
    steps: int
    scale: float
    segments: tuple[Segment, ...]

    def work(self) -> DenoiseState:
        """Without the picture, which would only be carried along from expert to expert."""
        return DenoiseState(
            **{field.name: getattr(self, field.name) for field in fields(DenoiseState)}
        )

    def after(self, work: DenoiseState) -> UpscaleState:
        """This request with what its experts have made of the work."""
        return dataclasses.replace(
            self, **{f.name: getattr(work, f.name) for f in fields(DenoiseState)}
        )


class Upscaler:
    """A loaded model and what it takes to apply it to pictures."""

    def __init__(self, bundle: weights.Bundle, device: str | torch.device = "cpu") -> None:
        self.config = bundle.config
        self.device = torch.device(device)
        self.experts = bundle.experts
        self.provenance = bundle.provenance
        self.encoder = tag_encoder(self.config, self.device)
        if self.device.type == "cpu":
            _keep_what_is_freed()
        # Threads may share an upscaler: one picture is denoised while others are read and written.
        self._turn = threading.Lock()

    @classmethod
    def load(
        cls,
        name_or_folder: str | Path = "linearsr-tiny",
        device: str = "auto",
        only: Collection[int] | None = None,
        *,
        compiled: bool = False,
    ) -> Upscaler:
        """Load a bundled model by name, or a folder of safetensors, onto a device.

        device: "auto" (CUDA, then Apple's MPS, then CPU) or any torch device.
        only: the experts that are needed here; see `linearsr.weights.load`.
        compiled: let torch.compile fuse the blocks, on CUDA; see `LinearSR.compile_blocks`.
        Raises WeightsError or OptionError.
        """
        chosen = pick_device(device)
        if compiled and chosen.type != "cuda":
            raise OptionError(f"compile is for CUDA; on {chosen.type} it would be slower")
        loaded = cls(weights.load(name_or_folder, chosen, best_dtype(chosen), only), chosen)
        if compiled:
            for expert in loaded.experts:
                expert.compile_blocks()
        if only is None:
            _ = loaded.autoencoder  # what is wrong with it is known before any work
        return loaded

    @cached_property
    def autoencoder(self) -> Autoencoder:
        """Loaded where it is first needed: who only plans, or takes steps, may do without."""
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        return load_autoencoder(self.config.latent, self.device, dtype)

    def __call__(self, image: Image.Image, scale: float = 4, **options: object) -> Image.Image:
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
        for tile in self.tile_sizes(picture, options):
            with contextlib.suppress(OutOfMemory):
                return self._attempt(picture, options, tile, progress)
        hint = "choose a smaller --tile" if options.tile != "auto" else "free some of its memory"
        raise OutOfMemory(f"out of memory on {self.device}: {hint}")

    def scale_of(self, picture: Picture, options: Options) -> float:
        """How many times larger the network makes the picture.

        That is the scale asked for where the model was trained for it, and else the nearest one,
        whose result is resampled.
        """
        height, width = picture.pixels.shape[-2:]
        return self.config.trained_scale(asked_scale(height, width, options))

    def tile_sizes(self, picture: Picture, options: Options) -> Iterator[int | None]:
        """Tile sides to try, in latent cells; None is the whole picture at once."""
        if options.tile == "off":
            yield None
        elif options.tile != "auto":
            scale = self.scale_of(picture, options)
            yield max(SMALLEST_TILE // 4, round(options.tile * scale / self.config.latent.factor))
        else:
            size = AUTO_TILE
            while size >= SMALLEST_TILE:
                yield size
                size //= 2

    def _attempt(
        self, picture: Picture, options: Options, tile: int | None, progress: Progress | None
    ) -> Picture:
        job = self.prepare(picture, options, tile)
        for segment in job.segments:
            job = self.denoise(job, segment)
            if progress:
                progress(self.expert_name(segment.expert), segment.stop, job.steps)
        return self.finish(job)

    def expert_name(self, expert: int) -> str:
        """The paper's name of an expert, or its number for models with other than four."""
        return weights.expert_names(self.config)[expert]

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
        asked = options.model_dump(exclude_defaults=True, exclude={"tags", "scale"})
        size = {} if options.width or options.height else {"scale": f"{options.scale:g}"}
        sampling = self.config.sampling
        steps, solver = options.steps or sampling.steps, options.solver or sampling.solver
        chosen = {"model": self.config.name, **size, **asked, "steps": steps, "solver": solver}
        chosen["seed"] = options.seed
        if options.tags:
            chosen["tags"] = options.tags if options.tags == "auto" else ", ".join(options.tags)
        return {"software": f"linearsr {__version__}", **{k: str(v) for k, v in chosen.items()}}

    @_memory_errors()
    @torch.inference_mode()
    def prepare(
        self, picture: Picture, options: Options, tile: int | None = AUTO_TILE
    ) -> UpscaleState:
        """Everything before the first step. `tile` in latent cells; None for no tiles."""
        options = self.with_tags(picture, options)
        sampling = self.config.sampling
        # The first step's own answer is that of one step: nothing else is computed without detail.
        timesteps = schedule(sampling, options.steps if options.detail else 1)
        scale = self.scale_of(picture, options)
        height, width = picture.pixels.shape[-2:]
        size = scaled_size(height, width, scale)
        _check_memory(picture, options, size, tile)
        # Two cells at the least: oneDNN's bfloat16 convolution with stride 2 is wrong where its
        # result is one wide.
        rows, columns = (max(2, -(-n // self.config.latent.factor)) for n in size)
        tiles = tuple(_grid(rows, columns, tile))
        noise = self._noise(rows, columns, options.seed)
        return UpscaleState(
            picture=picture,
            options=options,
            steps=len(timesteps) - 1,
            scale=scale,
            lr=picture.pixels[None] * 2 - 1,
            size=size,
            tiles=tiles,
            # Copies, so that a tile sent elsewhere does not take the whole field along.
            latents=tuple(t.crop(noise).clone() for t in tiles),
            timesteps=tuple(timesteps),
            segments=tuple(plan(timesteps[:-1], sampling.boundaries)),
            tags=self._encoded(options),
            solver=options.solver or sampling.solver,
            blends=0 < options.detail < 1 and len(timesteps) > 2,
        )

    def _encoded(self, options: Options) -> Tensor | None:
        """(1, T, tag_dim); None without tags."""
        if self.encoder is None or not isinstance(options.tags, tuple):
            return None
        encoded = self.encoder([options.tags])
        return encoded.embeddings.cpu() if encoded.mask.all() else None

    def _noise(self, height: int, width: int, seed: int) -> Tensor:
        """One field for the whole picture, drawn on the CPU: tiles share it where they overlap."""
        shape = (1, self.config.denoiser.latent_channels, height, width)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def denoise(self, work: AnyState, segment: Segment) -> AnyState:
        """One expert takes its steps on every tile."""
        return self.denoise_batch([(work, segment)])[0]

    @_memory_errors()
    @torch.inference_mode()
    def denoise_batch(
        self,
        batch: Sequence[tuple[AnyState, Segment]],
        cells: int | None = None,
        wanted: Callable[[int], bool] = lambda _: True,
    ) -> list[AnyState]:
        """One expert takes its steps on several works, each with timesteps of its own.

        Tiles of one shape with as many steps go through the model together, one of each work and
        no more than `cells` latent cells (or one tile; by default what suits the device), so what
        they take does not grow with the batch, and a work alone gets the same bits as from
        `denoise`. Before each tile `wanted` is asked of the work's place in the batch: one that
        nobody wants any more comes back as it was. Raises ValueError for several experts.
        """
        experts = {segment.expert for _, segment in batch}
        if len(experts) != 1:
            raise ValueError(f"a batch is for one expert, not for {sorted(experts)}")
        (expert,) = experts
        if cells is None:
            cells = CPU_BATCH if self.device.type == "cpu" else GPU_BATCH
        finished: list[list[SolverState]] = [[] for _ in batch]
        with self._turn:
            tags = [self._tag_keys(expert, work) for work, _ in batch]
            for number in range(max(len(work.tiles) for work, _ in batch)):
                places = (TileTask(i, *of, number, tags[i]) for i, of in enumerate(batch))
                here = (p for p in places if p.is_there and wanted(p.owner))
                for group in _side_by_side(here, cells):
                    for place, walk in zip(group, self._denoised(expert, group), strict=True):
                        finished[place.owner].append(walk)
        return [
            _moved(work, walks) if len(walks) == len(work.tiles) else work
            for (work, _), walks in zip(batch, finished, strict=True)
        ]

    def _tag_keys(self, expert: int, work: DenoiseState) -> TagKeys | None:
        """Keys and values of the tags: the same for all tiles and steps."""
        if work.tags is None:
            return None
        model = self._expert(expert)
        return model.tag_keys(work.tags.to(self.device, model.embed.weight.dtype))

    def _expert(self, expert: int) -> LinearSR:
        model = self.experts[expert]
        if model.embed.weight.is_meta:
            raise WeightsError(f"the expert {self.expert_name(expert)} is not loaded here")
        return model

    def _denoised(self, expert: int, group: Sequence[TileTask]) -> Sequence[SolverState]:
        """Where each of the group is after its steps, tensors (1, C, th, tw) on the CPU."""
        model = self._expert(expert)
        lr_pictures = torch.cat([self._upsampled(p.work, p.tile) for p in group])
        lr_pictures = lr_pictures.contiguous(memory_format=torch.channels_last)
        joined = self.autoencoder.condition(lr_pictures) if model.config.condition_latent else None
        condition = model.condition(lr_pictures.to(model.embed.weight.dtype), joined)
        condition = condition._replace(tags=_joined_tags([p.tags for p in group]))
        timesteps = torch.tensor([p.timesteps for p in group]).T
        walk = self._joined([p.walk for p in group])
        solver, start = group[0].work.solver, group[0].behind
        guesses: list[Tensor] = []

        def denoise(latent: Tensor, t: Tensor) -> Tensor:
            v = model(latent, t, condition)
            if not guesses and any(p.guesses for p in group):
                guesses.append(clean_guess(latent, v, t))
            return v

        done = sample(solver, denoise, walk, timesteps, start)
        return _split(done._replace(guess=guesses[0] if guesses else None), group)

    def _joined(self, walks: Sequence[SolverState]) -> SolverState:
        """Several as one, on the device; all of them look back, or none."""
        latent = self._together([walk.latent for walk in walks])
        previous = [walk.previous for walk in walks if walk.previous is not None]
        return SolverState(latent, self._together(previous) if previous else None)

    def _together(self, parts: Sequence[Tensor]) -> Tensor:
        joined = torch.cat(list(parts)).to(self.device)
        return joined.contiguous(memory_format=torch.channels_last)

    def _upsampled(self, work: DenoiseState, tile: Tile) -> Tensor:
        """The bicubic picture under one tile, equal to that part of the whole bicubic picture."""
        pixels = tile.scaled(self.config.latent.factor)
        return enlarged_part(work.lr, *work.size, pixels, self.device)

    def finish(self, job: UpscaleState) -> Picture:
        """Decode, join tiles, fix colour, crop or resample to the size asked for.

        On the device, but for a picture that it has no room for: that is joined on the CPU.
        """
        if self.device.type != "cpu":
            # One at a time, and none beside a denoiser.
            with contextlib.suppress(OutOfMemory), self._turn:
                return self._finished(job, self.device)
        return self._finished(job, torch.device("cpu"))

    @_memory_errors()
    @torch.inference_mode()
    def _finished(self, job: UpscaleState, device: torch.device) -> Picture:
        """Tiles are decoded where the autoencoder is; the whole picture lies on `device`."""
        factor = self.config.latent.factor
        canvas = Canvas((t.scaled(factor) for t in job.tiles), 3, device=device)
        for number, (tile, latent) in enumerate(zip(job.tiles, job.latents, strict=True)):
            lr_picture = self._upsampled(job, tile)
            if job.blends:
                latent = torch.lerp(job.guess[number], latent, job.options.detail)
            piece = self.autoencoder.decode(latent.to(lr_picture), lr_picture)
            canvas.add(tile.scaled(factor), piece[0])
        restored = canvas.result()[None]
        height, width = job.size
        source = resize(job.lr.to(device), height, width)
        restored = fix_colour(restored[..., :height, :width], source, job.options.colour_fix)
        return _with_pixels(job, restored)


class TileTask(NamedTuple):
    """One tile of one of the works that an expert is given together."""

    owner: int
    work: DenoiseState
    segment: Segment
    number: int
    tags: TagKeys | None

    @property
    def is_there(self) -> bool:
        """Works have different numbers of tiles."""
        return self.number < len(self.work.tiles)

    @property
    def tile(self) -> Tile:
        """Where it lies."""
        return self.work.tiles[self.number]

    @property
    def latent(self) -> Tensor:
        """(1, C, th, tw)."""
        return self.work.latents[self.number]

    @property
    def walk(self) -> SolverState:
        """Where it has come to."""
        previous = self.work.previous[self.number] if self.work.previous else None
        guess = self.work.guess[self.number] if self.work.guess else None
        return SolverState(self.latent, previous, guess)

    @property
    def guesses(self) -> bool:
        """Whether the guess of the segment's first step is kept."""
        return self.work.blends and self.segment.start == 0

    @property
    def behind(self) -> int:
        """How many steps before the segment its solver looks back on."""
        return 1 if self.work.previous else 0

    @property
    def goes_on(self) -> bool:
        """Whether the step after the segment looks back on its last one."""
        return looks_back(self.work.solver, self.work.timesteps, self.segment.stop)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Where each step starts, those `behind` first, and where the last one ends."""
        return self.work.timesteps[self.segment.start - self.behind : self.segment.stop + 1]

    @property
    def shape(self) -> tuple[object, ...]:
        """What those must share that go through the model together."""
        tags = None if self.work.tags is None else self.work.tags.shape
        return self.latent.shape, tags, len(self.timesteps), self.work.solver, self.behind


def _split(walk: SolverState, group: Sequence[TileTask]) -> list[SolverState]:
    """Of each work alone, on the CPU, with what was seen last only where it is needed again.

    Copies, so that one that is sent elsewhere does not take its neighbours along.
    """
    latents, previous, guesses = (
        [None] * len(group) if together is None else together.cpu().split(1) for together in walk
    )
    walks = []
    for place, latent, seen, guess in zip(group, latents, previous, guesses, strict=True):
        assert latent is not None
        walks.append(
            SolverState(
                latent.clone(),
                seen.clone() if seen is not None and place.goes_on else None,
                guess.clone() if guess is not None and place.guesses else place.walk.guess,
            )
        )
    return walks


def _moved(work: AnyState, walks: Sequence[SolverState]) -> AnyState:
    """The work after its segment."""
    return dataclasses.replace(
        work,
        latents=tuple(walk.latent for walk in walks),
        previous=tuple(walk.previous for walk in walks if walk.previous is not None),
        guess=tuple(walk.guess for walk in walks if walk.guess is not None),
    )


def _joined_tags(tags: Sequence[TagKeys | None]) -> TagKeys | None:
    """Several works' keys and values along the batch; all have as many tags, or none has any."""
    known = [keys for keys in tags if keys is not None]
    if not known:
        return None
    blocks = zip(*known, strict=True)
    return [(torch.cat([k for k, _ in of]), torch.cat([v for _, v in of])) for of in blocks]


def _side_by_side(places: Iterable[TileTask], cells: int) -> Iterator[Sequence[TileTask]]:
    """Groups of one shape and at most `cells` latent cells, or of one tile."""
    alike: dict[tuple[object, ...], list[TileTask]] = {}
    for place in places:
        alike.setdefault(place.shape, []).append(place)
    for group in alike.values():
        most = max(1, cells // group[0].latent[0, 0].numel())
        for start in range(0, len(group), most):
            yield group[start : start + most]


def _grid(height: int, width: int, tile: int | None) -> list[Tile]:
    if tile is None:
        return [Tile(0, 0, height, width)]
    return tile_grid(height, width, tile, min(OVERLAP, tile // 4))


def _with_pixels(job: UpscaleState, restored: Tensor) -> Picture:
    """The finished picture: final size, [0, 1], alpha and metadata of the original."""
    height, width = job.picture.pixels.shape[-2:]
    height, width = output_size(height, width, job.options)
    pixels = _on_host(resize(restored, height, width)[0].add_(1).div_(2).clamp_(0, 1), job.picture)
    alpha = job.picture.alpha
    if alpha is not None:
        # Not in place: of an equal size it is the picture's own.
        alpha = resize(alpha[None], height, width)[0].clamp(0, 1)
    return dataclasses.replace(job.picture, pixels=pixels, alpha=alpha)


def _on_host(pixels: Tensor, picture: Picture) -> Tensor:
    """Pixels in [0, 1] in main memory: from a GPU as bytes, where the file has no more."""
    if pixels.device.type == "cpu" or picture.bits > 8:
        return pixels.cpu()
    return pixels.mul_(255).round_().byte().cpu().float().div_(255)


def output_size(height: int, width: int, options: Options) -> tuple[int, int]:
    """Height and width of the result that `options` ask for, of a picture of this size."""
    if options.width and options.height:
        return options.height, options.width
    return scaled_size(height, width, asked_scale(height, width, options))


def scaled_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """Height and width of a picture of this size made `scale` times larger, in whole pixels."""
    return max(1, round(height * scale)), max(1, round(width * scale))


def asked_scale(height: int, width: int, options: Options) -> float:
    """The scale that `options` ask for: the larger one, where a width and a height imply two."""
    if not (options.width or options.height):
        return options.scale
    return max((options.height or 0) / height, (options.width or 0) / width)


def _check_memory(
    picture: Picture, options: Options, size: tuple[int, int], tile: int | None
) -> None:
    """Refuse what cannot fit: past this point Linux would kill the process without a word."""
    height, width = picture.pixels.shape[-2:]
    pixels = max(math.prod(size), math.prod(output_size(height, width, options)))
    each = BYTES_PER_PIXEL if tile else BYTES_PER_PIXEL_UNTILED
    if 0 < options.detail < 1:
        each += BYTES_PER_GUESSED_PIXEL
    need = each * pixels + BYTES_PER_INPUT_PIXEL * height * width
    free = psutil.virtual_memory().available
    if need > free:
        raise TooLarge(
            f"a {width}x{height} picture needs about {need / 2**30:.1f} GiB of memory and "
            f"{free / 2**30:.1f} GiB are free; shrink or split it"
        )


def _keep_what_is_freed() -> None:
    """For the next layer: else page faults take up to 16 % of the time of a small picture.

    glibc hands back to Linux what is free at the end of a heap beyond twice the largest block of
    its own that was freed so far; of blocks from 32 MiB up it takes no notice. So each heap of this
    process may keep 62 MiB. Other allocators do not care.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def pick_device(device: str) -> torch.device:
    """A torch device of that name; "auto" is the best there is. Raises OptionError."""
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


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor multiplies it in hardware, else float32.

    That is CUDA, and CPUs with AMX or AVX512-BF16; on other CPUs bfloat16 is converted, and slower.
    """
    if device.type == "cuda":
        return torch.bfloat16
    multiplies = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if device.type == "cpu" and multiplies else torch.float32
