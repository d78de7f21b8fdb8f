"""Picture in, picture out: prepare -> denoise (per expert) -> finish.

    prepare(picture, options) -> UpscaleState    tiles, noise from the seed, tag embeddings
    denoise(state, segment) -> UpscaleState      one expert takes its run of steps on every tile
    finish(state) -> Picture                     decode, blend tiles, colour, final size, metadata

The state between two stages is plain data, so the stages may run in one process (as in
`Upscaler.upscale`) or on different machines. Knows nothing of Ray, HTTP or files on disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from linearsr import __version__, weights
from linearsr.config import Acceleration, Options
from linearsr.denoiser.fp8 import use_fp8
from linearsr.denoiser.model import LinearSR
from linearsr.diffusion.experts import Segment, plan
from linearsr.diffusion.schedule import schedule
from linearsr.errors import OptionError, WeightsError
from linearsr.imaging.alpha import flatten, hides, spread_colours
from linearsr.imaging.colour import fix_colour
from linearsr.imaging.files import Picture, from_pil, to_pil
from linearsr.imaging.resample import resize
from linearsr.imaging.tiles import Canvas
from linearsr.latent import Autoencoder, load_autoencoder
from linearsr.pipeline import batching, tiling
from linearsr.pipeline.device import best_dtype, pick_device
from linearsr.pipeline.memory import OutOfMemory, check_memory, keep_freed_memory, memory_errors
from linearsr.pipeline.sizes import output_size, scaled_size
from linearsr.pipeline.state import AnyState, UpscaleState
from linearsr.tags import load_tagger
from linearsr.tags.base import Tagger, TaggerConfig
from linearsr.tags.encoder import tag_encoder

# Latent cells of several requests that go through a model at once. More would leave a CPU's caches:
# 8 requests of 64 x 64 cells together took 1.5 times as long as in turn, of 16 x 16 half as long.
CPU_BATCH = 2048
GPU_BATCH = 192**2
# Latents that are pixels folded into channels have this type before, between and after the experts:
# it halves what travels and the memory of large pictures. The rounding moves about 6% of an 8-bit
# picture's samples by one level, as bfloat16 instead of float32 does. Numbers above 65504 become
# infinite, but latents have a spread near one. Learned latents are small, and stay float32.
FOLDED = torch.float16


class Progress(NamedTuple):
    """The tile and the step that a picture has come to; both count from 1.

    fraction: share of all steps on all tiles that are done, 0 to 1. It falls back to 0 if memory
    ran out and smaller tiles are tried.
    """

    expert: str
    tile: int
    tiles: int
    step: int
    steps: int
    fraction: float


OnProgress = Callable[[Progress], None]

DEFAULTS = Options()
DEFAULT_TAGGER = TaggerConfig()
PLAIN = Acceleration()
# Lists of tags whose embeddings are kept. A usual list takes 0.1 MB with Gemma 2 2B; one of 300
# tokens, 2.8 MB.
KEPT_EMBEDDINGS = 64


class Upscaler:
    """A loaded model that upscales pictures. Threads may share it: they take turns.

    With an `acceleration` the experts of the bundle are changed in place.
    """

    def __init__(
        self,
        bundle: weights.Bundle,
        device: str | torch.device = "cpu",
        tagger: TaggerConfig = DEFAULT_TAGGER,
        acceleration: Acceleration = PLAIN,
    ) -> None:
        self.config = bundle.config
        self.acceleration = acceleration
        self.tagger = tagger
        self.device = torch.device(device)
        self.experts = bundle.experts
        self.provenance = bundle.provenance
        self.encoder = tag_encoder(self.config, self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        # Requests repeat their tags, and each is prepared again with smaller tiles.
        self._embeddings = lru_cache(KEPT_EMBEDDINGS)(self._encode)
        # One picture is denoised while others are read and written.
        self._turn = threading.Lock()
        if acceleration != PLAIN:
            for expert in self.experts:
                _accelerate(expert, acceleration)

    @classmethod
    def load(
        cls,
        name_or_folder: str | Path = "linearsr-tiny",
        device: str = "auto",
        only: Collection[int] | None = None,
        *,
        acceleration: Acceleration = PLAIN,
        tagger: TaggerConfig = DEFAULT_TAGGER,
    ) -> Upscaler:
        """Load a bundled model by name, or a folder of safetensors, onto a device.

        device: "auto" (CUDA, then Apple's MPS, then CPU) or any torch device.
        only: the experts to load, all by default; see `linearsr.weights.load`.
        acceleration: ways to run faster, which need CUDA.
        tagger: names what pictures show for tags="auto"; it is loaded at its first picture.
        Raises WeightsError or OptionError.
        """
        chosen = pick_device(device)
        if chosen.type != "cuda" and (names := acceleration.model_dump(exclude_defaults=True)):
            raise OptionError(f"{', '.join(names)}: only for CUDA, and the device is {chosen.type}")
        bundle = weights.load(name_or_folder, chosen, best_dtype(chosen), only)
        upscaler = cls(bundle, chosen, tagger, acceleration)
        if only is None:
            _ = upscaler.autoencoder  # fails here, before any work, if it cannot be loaded
        return upscaler

    @cached_property
    def autoencoder(self) -> Autoencoder:
        """The latent space, loaded at first use: planning and some denoisers do without it."""
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        graphs = self.acceleration.cuda_graph and self.device.type == "cuda"
        return load_autoencoder(self.config.latent, self.device, dtype, graphs=graphs)

    @cached_property
    def _tagger(self) -> Tagger:
        return load_tagger(self.tagger, str(self.device))

    def __call__(self, image: Image.Image, scale: float = 4, **options: object) -> Image.Image:
        """Upscale a PIL image: `upscaler(image, scale=4, steps=..., seed=..., tags=...)`.

        `options` are the fields of `Options`. Raises InputError, OptionError, OutOfMemory or
        TooLarge.
        """
        return to_pil(self.upscale(from_pil(image), Options.parse(scale=scale, **options)))

    def upscale(
        self, picture: Picture, options: Options = DEFAULTS, progress: OnProgress | None = None
    ) -> Picture:
        """Upscale a picture; `progress` is called before each step on each tile, and at the end.

        If memory runs out, tiles of half the size are tried, unless `options` fix the tile.
        Raises OptionError, OutOfMemory or TooLarge.
        """
        return self.upscale_tagged(picture, self.with_tags(picture, options), progress)

    def upscale_tagged(
        self, picture: Picture, options: Options, progress: OnProgress | None = None
    ) -> Picture:
        """Do the same as `upscale`, with options that `with_tags` returned."""
        for tile in self.tile_sizes(picture, options):
            try:
                state = self.prepare(picture, options, tile)
                for segment in state.segments:
                    state = self.denoise(state, segment, self._counter(state, segment, progress))
                if progress:
                    name, tiles = self.expert_name(segment.expert), len(state.tiles)
                    progress(Progress(name, tiles, tiles, state.steps, state.steps, 1))
                return self.finish(state)
            except OutOfMemory:
                self.drop_graphs()
        hint = "choose a smaller --tile" if options.tile != "auto" else "free some of its memory"
        raise OutOfMemory(f"out of memory on {self.device}: {hint}")

    def drop_graphs(self) -> None:
        """Free the memory of all CUDA graphs, as smaller tiles need others."""
        for expert in self.experts:
            expert.drop_graphs()

    def _counter(
        self, state: UpscaleState, segment: Segment, progress: OnProgress | None
    ) -> Callable[[int], None]:
        """Return a function that reports a segment's progress each time that it is called."""
        name, tiles, steps = self.expert_name(segment.expert), len(state.tiles), state.steps
        length, counter = segment.stop - segment.start, itertools.count()

        def report(_: int) -> None:
            if progress:
                tile, step = divmod(next(counter), length)
                fraction = (segment.start * tiles + tile * length + step) / (steps * tiles)
                step += segment.start + 1
                progress(Progress(name, tile + 1, tiles, step, steps, fraction))

        return report

    def with_tags(self, picture: Picture, options: Options) -> Options:
        """Return `options` with the tags that guide the picture; "auto" asks the tagger for them.

        Raises OptionError if a model that was trained without tags gets some: they would change
        nothing.
        """
        if options.tags and self.encoder is None:
            raise OptionError(f"{self.config.name} was trained without tags; leave out --tags")
        if options.tags != "auto":
            return options
        with memory_errors(), self._turn_on_gpu():
            tags = self._tagger(picture.pixels[:3])
        return options.model_copy(update={"tags": tuple(tag.name for tag in tags)})

    def network_scale(self, picture: Picture, options: Options) -> float:
        """Return how many times larger the network makes the picture.

        This is the requested scale if the model was trained for it, else the nearest one that it
        was trained for, whose result is resampled.
        """
        height, width = picture.pixels.shape[-2:]
        return tiling.network_scale(self.config, height, width, options)

    def tile_sizes(self, picture: Picture, options: Options) -> Iterator[int | None]:
        """Yield tile sides to try, in latent cells; None is the whole picture at once."""
        height, width = picture.pixels.shape[-2:]
        return tiling.tile_sizes(self.config, height, width, options)

    def expert_name(self, expert: int) -> str:
        """Return an expert's name: the paper's in a model of four experts, else its number."""
        return weights.expert_names(self.config)[expert]

    def describe(self, options: Options) -> dict[str, str]:
        """Return provenance for a result's metadata: what made it, so that it can be made again.

        `options` are those that `with_tags` returned.
        """
        changed = options.model_dump(exclude_defaults=True, exclude={"tags", "scale"})
        size = {} if options.width or options.height else {"scale": f"{options.scale:g}"}
        sampling = self.config.sampling
        steps, solver = options.steps or sampling.steps, options.solver or sampling.solver
        record = {"model": self.config.name, **size, **changed, "steps": steps, "solver": solver}
        record["seed"] = options.seed
        if self.acceleration.fp8:
            record["fp8"] = True
        if options.tags:
            record["tags"] = options.tags if options.tags == "auto" else ", ".join(options.tags)
        return {"software": f"linearsr {__version__}", **{k: str(v) for k, v in record.items()}}

    @memory_errors()
    @torch.inference_mode()
    def prepare(
        self, picture: Picture, options: Options, tile: int | None = tiling.AUTO_TILE
    ) -> UpscaleState:
        """Return the state of a request before the first step.

        options: those that `with_tags` returned. tile: side in latent cells; None for no tiles.
        Raises TooLarge if main memory cannot hold the result, and ValueError for tags "auto".
        """
        if options.tags == "auto":
            raise ValueError("prepare takes the options that with_tags returns, not tags='auto'")
        sampling = self.config.sampling
        # The first step's own answer is that of one step, so without detail no more are taken.
        timesteps = schedule(sampling, options.steps if options.detail else 1)
        scale = self.network_scale(picture, options)
        height, width = picture.pixels.shape[-2:]
        size = scaled_size(height, width, scale)
        check_memory(picture, options, size, tiled=bool(tile))
        rows, columns = tiling.latent_size(self.config, size)
        tiles = tiling.latent_tiles(rows, columns, tile)
        # One field for the whole picture, which overlapping tiles share. It is drawn on the CPU, so
        # that every device gets the same noise.
        shape = (1, self.config.denoiser.latent_channels, rows, columns)
        dtype = FOLDED if self.config.latent.kind == "space-to-depth" else torch.float32
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(options.seed))
        return UpscaleState(
            picture=picture,
            options=options,
            steps=len(timesteps) - 1,
            scale=scale,
            lr=spread_colours(picture.pixels, picture.alpha)[None] * 2 - 1,
            size=size,
            tiles=tuple(tiles),
            # Copies, so that a tile that travels does not take the whole field along.
            latents=tuple(t.crop(noise).to(dtype, copy=True) for t in tiles),
            timesteps=tuple(timesteps),
            segments=tuple(plan(timesteps[:-1], sampling.boundaries)),
            tags=self._tag_embeddings(options),
            solver=options.solver or sampling.solver,
            blends=0 < options.detail < 1 and len(timesteps) > 2,
        )

    def _tag_embeddings(self, options: Options) -> Tensor | None:
        """Embeddings (1, T, tag_dim) of the tags; None without tags."""
        if self.encoder is None or not isinstance(options.tags, tuple):
            return None
        return self._embeddings(options.tags)

    def _turn_on_gpu(self) -> contextlib.AbstractContextManager[Any]:
        """Return the turn of a GPU, where work of another thread could spoil a recording."""
        return contextlib.nullcontext() if self.device.type == "cpu" else self._turn

    def _encode(self, tags: tuple[str, ...]) -> Tensor | None:
        assert self.encoder is not None
        with self._turn_on_gpu():
            encoded = self.encoder([tags])
        return encoded.embeddings.cpu() if encoded.mask.all() else None

    def denoise(
        self,
        state: AnyState,
        segment: Segment,
        on_step: Callable[[int], None] = lambda _: None,
    ) -> AnyState:
        """Return the state after one expert has taken a segment of steps on every tile.

        on_step: see `denoise_batch`.
        """
        return self.denoise_batch([(state, segment)], on_step=on_step)[0]

    @memory_errors()
    @torch.inference_mode()
    def denoise_batch(
        self,
        batch: Sequence[tuple[AnyState, Segment]],
        cells: int | None = None,
        wanted: Callable[[int], bool] = lambda _: True,
        on_step: Callable[[int], None] = lambda _: None,
    ) -> list[AnyState]:
        """Let one expert take its steps on several requests, each with its own timesteps.

        Tiles with the same shape and number of steps go through the model together: one tile of
        each request, and at most `cells` latent cells, unless one tile has more. By default `cells`
        suits the device. So memory does not grow with the batch, and a request alone gets the same
        bits as from `denoise`.
        wanted: called with a request's index in the batch before each of its tiles; a request that
        is no longer wanted comes back unchanged.
        on_step: called with a request's index in the batch before each step on each of its tiles.
        Raises ValueError for segments of several experts, WeightsError for an expert that is not
        loaded, and OutOfMemory.
        """
        experts = {segment.expert for _, segment in batch}
        if len(experts) != 1:
            raise ValueError(f"a batch is for one expert, not for {sorted(experts)}")
        number = experts.pop()
        model = self.experts[number]
        if model.embed.weight.is_meta:
            raise WeightsError(f"the expert {self.expert_name(number)} is not loaded here")
        if cells is None:
            cells = CPU_BATCH if self.device.type == "cpu" else GPU_BATCH
        factor = self.config.latent.factor
        with self._turn:
            encode = self.autoencoder.condition if model.config.condition_latent else None
            return batching.denoise_batch(
                model,
                batch,
                factor=factor,
                encode=encode,
                cells=cells,
                wanted=wanted,
                on_step=on_step,
            )

    def finish(self, state: UpscaleState) -> Picture:
        """Return the result: decode, join tiles, fix colour, crop or resample to the size wanted.

        Pictures are joined on the device, or on the CPU if the device has too little memory.
        """
        if self.device.type == "cpu":
            return self._finish_on(state, self.device)
        # One picture at a time, and never beside a denoiser.
        with self._turn:
            with contextlib.suppress(OutOfMemory):
                return self._finish_on(state, self.device)
            return self._finish_on(state, torch.device("cpu"))

    @memory_errors()
    @torch.inference_mode()
    def _finish_on(self, state: UpscaleState, device: torch.device) -> Picture:
        """Decode tiles where the autoencoder is, and join the picture on `device`."""
        factor = self.config.latent.factor
        canvas = Canvas((t.scaled(factor) for t in state.tiles), 3, device=device)
        for number, (tile, latent) in enumerate(zip(state.tiles, state.latents, strict=True)):
            lr = state.enlarged_lr(tile, factor, self.device)
            latent = latent.to(lr)
            if state.blends:
                latent = torch.lerp(state.guess[number].to(lr), latent, state.options.detail)
            canvas.add(tile.scaled(factor), self.autoencoder.decode(latent, lr)[0])
        height, width = state.size
        restored = canvas.result()[None, :, :height, :width]
        # One channel at a time: the source of the colours is as large as the picture.
        if state.options.colour_fix != "none":
            for channel, lr in zip(restored[0], state.lr[0], strict=True):
                source = resize(lr[None, None].to(device), height, width)
                fix_colour(channel[None, None], source, state.options.colour_fix)
        return _final_picture(state, restored)


def _accelerate(expert: LinearSR, acceleration: Acceleration) -> None:
    """Let an expert that is loaded here run in these ways from now on."""
    if expert.embed.weight.is_meta:
        return
    if acceleration.fp8:
        use_fp8(expert)
    if acceleration.compile:
        expert.compile_blocks()
    if acceleration.cuda_graph:
        expert.record_graphs()


def _final_picture(state: UpscaleState, restored: Tensor) -> Picture:
    """The result at its final size, in [0, 1] in main memory, with the input's alpha and metadata.

    restored: (1, 3, H, W) in [-1, 1]. It is changed in place.
    """
    picture = state.picture
    height, width = picture.pixels.shape[-2:]
    height, width = output_size(height, width, state.options)
    restored = resize(restored, height, width)
    if hides(picture.alpha):
        restored = flatten(restored, state.lr.to(restored))
    pixels = restored[0].add_(1).div_(2).clamp_(0, 1)
    if pixels.device.type == "cpu" or picture.bits > 8:
        pixels = pixels.cpu()
    else:  # as bytes, since the file has no more
        pixels = pixels.mul_(255).round_().byte().cpu().float().div_(255)
    alpha = picture.alpha
    if alpha is not None:
        # Not in place: at equal size, `resize` returns the picture's own alpha.
        alpha = resize(alpha[None], height, width)[0].clamp(0, 1)
    return dataclasses.replace(picture, pixels=pixels, alpha=alpha)
