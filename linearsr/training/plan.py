"""The memory of a rank and the hours of each stage of a recipe, before anything runs.

Bytes and operations are counted from shapes (`linearsr.training.count`) and from the layout of
ZeRO-1. Starts nothing, needs no GPU, and imports neither Ray nor DeepSpeed. Not counted is the
memory of CUDA, NCCL and the allocator's gaps: `USABLE` leaves room for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from linearsr.config import LoRAConfig, ModelConfig
from linearsr.denoiser import LinearSR
from linearsr.denoiser.lora import empty_adapters
from linearsr.diffusion.path import clean_guess, velocity
from linearsr.errors import OptionError
from linearsr.hub import split_revision
from linearsr.latent import Autoencoder
from linearsr.latent.autoencoder import without_weights
from linearsr.metrics import lpips
from linearsr.training import count
from linearsr.training.config import PerceptualConfig, TrainConfig
from linearsr.training.data import DataConfig
from linearsr.training.discriminator import Discriminator, fooled, hinge
from linearsr.training.engine import BUCKET
from linearsr.training.loop import Conditions
from linearsr.training.lora import inject, trained
from linearsr.training.recipes import Kind, Recipe, split_metric

# One forward, and twice that for the gradients of activations and of weights.
FORWARD_AND_BACKWARD = 3
# Share of a GPU's memory that a plan may use.
USABLE = 0.9
# Parameters of Gemma 2 2B without a head: embeddings of 256,000 words, 26 blocks, a norm.
GEMMA_2_2B = 256_000 * 2304 + 26 * (2304 * (2 * 2048 + 2 * 1024 + 3 * 9216) + 4 * 2304) + 2304
STAGES: dict[Kind, str] = {
    "pretrain": "pretraining",
    "experts": "experts",
    "finetune": "fine-tuning",
    "perceptual": "perceptual",
}


class Run(NamedTuple):
    """One training run of a recipe: a stage of one model.

    expert: None in pretraining. latents: whether it takes latents and tag embeddings from shards.
    """

    recipe: Recipe
    kind: Kind
    expert: int | None
    latents: bool = False

    @property
    def train(self) -> TrainConfig:
        """Return the run's steps, rates and losses."""
        return self.recipe.stage(self.kind, self.expert)

    @property
    def data(self) -> DataConfig:
        """Return the run's training pairs."""
        return self.recipe.data_of(self.kind)

    @property
    def lora(self) -> LoRAConfig | None:
        """Return the shape of the adapters that the run trains; None if it trains all weights."""
        return self.recipe.lora_of(self.kind)

    @property
    def name(self) -> str:
        """Return a name such as "fine-tuning 3", with the expert's number, from 0; see `path`."""
        return STAGES[self.kind] + ("" if self.expert is None else f" {self.expert}")

    @property
    def path(self) -> str:
        """Return the path of the run's fields in the recipe, as `--set` takes it."""
        if self.expert is None:
            return self.kind
        return f"{self.kind}.{self.recipe.trained(self.kind).index(self.expert)}"

    def changed(self, **fields: object) -> Run:
        """Return the run with other fields of its stage."""
        train = self.train.model_copy(update=fields)
        if self.expert is None:
            recipe = self.recipe.model_copy(update={self.kind: train})
        else:
            stages = list(getattr(self.recipe, self.kind))
            stages[self.recipe.trained(self.kind).index(self.expert)] = train
            recipe = self.recipe.model_copy(update={self.kind: tuple(stages)})
        return self._replace(recipe=recipe)


def runs(recipe: Recipe, latents: bool = False) -> Iterator[Run]:
    """Yield the training runs of a recipe, one stage after the other."""
    yield Run(recipe, "pretrain", None, latents)
    for kind in STAGES:
        if kind != "pretrain" and getattr(recipe, kind):
            yield from (Run(recipe, kind, expert, latents) for expert in recipe.trained(kind))


class Memory(NamedTuple):
    """Bytes of a rank at its peak.

    weights: of the model, whole on every rank. gradients: likewise, of the weights that are
    trained. optimizer: this rank's part of AdamW's moments and of the float32 weights that it
    steps. buffers: of DeepSpeed's reductions. frozen: experts that a perceptual stage keeps beside
    the trained one, without a base that they share. judges: LPIPS, and the discriminator with its
    optimizer. working: the most that a micro-batch or the optimizer's step takes for a moment:
    activations, their gradients, pictures.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    buffers: int
    autoencoder: int
    tag_encoder: int
    frozen: int
    judges: int
    working: int

    @property
    def total(self) -> int:
        """Return the sum."""
        return sum(self)


def memory(run: Run, gpus: int) -> Memory:
    """Return the memory of one of `gpus` ranks. Raises OptionError if they cannot share a batch."""
    standing = _standing(run, gpus)
    pairs = run.data.micro_batch(gpus, run.train.accumulation)
    shape = Pass.of(run, pairs)
    # LR, which may be as large as HR, and HR of all pairs; the pass counts the HR of its own.
    share = run.data.batch // gpus
    pictures = 4 * 3 * run.data.patch**2 * (share + (share - pairs) * shape.needs_hr)
    passed = pictures + working(shape)
    return standing._replace(working=max(standing.working, passed))


def _standing(run: Run, gpus: int) -> Memory:
    """Return the memory of a rank without the pass, which takes long to count."""
    train, model = run.train, run.recipe.model
    width = _dtype(train).itemsize
    expert, learned = count.size(model)
    learning = expert if run.lora is None else _adapters(model, run.lora)
    # The optimizer's step copies this rank's part of the gradients (reduced, flat, and in float32),
    # when all others are free already.
    update = learning * (2 * width + 4) // gpus - width * learning
    return Memory(
        weights=width * (expert if run.lora is None else expert + learning),
        gradients=width * learning,
        optimizer=12 * learning // gpus,
        ema=4 * learning // gpus,
        buffers=width * BUCKET,
        autoencoder=0 if run.latents and not train.pixels else width * learned,
        tag_encoder=0 if run.latents else tag_encoder_bytes(model),
        frozen=width * learning * _frozen(run),
        judges=_judges(train),
        working=max(0, update),
    )


def _adapters(model: ModelConfig, lora: LoRAConfig) -> int:
    """Return the number of parameters in the adapters of one expert."""
    return sum(tensor.numel() for tensor in empty_adapters(model.denoiser, lora).values())


def _dtype(train: TrainConfig) -> torch.dtype:
    """Return the dtype of a stage on a GPU, where "auto" is bfloat16."""
    return torch.float32 if train.bfloat16 is False else torch.bfloat16


def _frozen(run: Run) -> int:
    """Return the number of experts that a perceptual stage keeps: the first, and the one before."""
    if run.kind != "perceptual":
        return 0
    return 2 if run.expert and run.expert > 1 else 1


def tag_encoder_bytes(model: ModelConfig) -> int:
    """Return the bytes of a model's tag encoder: of a local folder's files, else of Gemma 2 2B."""
    if model.tags is None:
        return 0
    folder = Path(split_revision(model.tags.source)[0])
    if folder.is_dir():
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return 2 * GEMMA_2_2B


def _judges(train: TrainConfig) -> int:
    """Return the bytes of LPIPS and the discriminator, which has gradients and two moments."""
    if not isinstance(train, PerceptualConfig):
        return 0
    critic, judge = _judge_sizes(train.channels)
    return (16 * critic if train.gan else 0) + (4 * judge if train.lpips else 0)


@cache
def _judge_sizes(channels: tuple[int, ...]) -> tuple[int, int]:
    with count.shapes_only():
        judge = count.parameters(lpips.without_weights())
        return count.parameters(Discriminator(channels)), judge


class Pass(NamedTuple):
    """All that decides the memory of a micro-batch's pass forward and back.

    side: of the pictures in pixels. decoded: side in latent cells of the part of the guess that is
    decoded, 0 for none. encodes: whether HR is encoded, which shards with latents spare. channels:
    those of the discriminator, None for none. lora: adapters that are trained instead of all.
    """

    model: ModelConfig
    side: int
    pairs: int
    dtype: torch.dtype
    checkpointing: bool
    decoded: int
    encodes: bool = True
    perceptual: bool = False
    lpips: bool = False
    channels: tuple[int, ...] | None = None
    lora: LoRAConfig | None = None

    @property
    def needs_hr(self) -> bool:
        """Whether HR is encoded or compared with."""
        return self.encodes or self.decoded > 0

    @classmethod
    def of(cls, run: Run, pairs: int) -> Pass:
        """Return the pass of `pairs` pairs of a run."""
        train, cells = run.train, run.data.patch // run.recipe.model.latent.factor
        head = (
            run.recipe.model,
            run.data.patch,
            pairs,
            _dtype(train),
            train.activation_checkpointing,
        )
        if isinstance(train, PerceptualConfig):
            channels = train.channels if train.gan else None
            decoded = min(cells, train.crop or cells)
            return cls(*head, decoded, False, True, train.lpips > 0, channels, run.lora)
        # At most all pairs are near enough to be decoded.
        near = train.pixel_weight > 0 and train.timesteps.low < train.pixel_below
        return cls(*head, cells * near, encodes=not run.latents, lora=run.lora)


@cache
def working(shape: Pass) -> int:
    """Return the bytes that a micro-batch takes at its peak, beside weights and gradients.

    The pass is made on tensors without data.
    """
    with count.shapes_only():
        networks = _Networks.of(shape)
        with count.Peak() as peak:
            (_perceptual if shape.perceptual else _flow)(shape, networks)
    return peak.peak


class _Networks(NamedTuple):
    """The networks of a pass; gradients of those that learn exist already."""

    model: LinearSR
    autoencoder: Autoencoder
    lpips: nn.Module | None
    critic: nn.Module | None

    @classmethod
    def of(cls, shape: Pass) -> _Networks:
        with count.made_in(shape.dtype):
            model = _denoiser(shape)
            autoencoder = without_weights(shape.model.latent)
        model.checkpoint_blocks = shape.checkpointing
        critic = None if shape.channels is None else Discriminator(shape.channels)
        for network in filter(None, (model, critic)):
            for parameter in trained(network).values():
                parameter.grad = torch.zeros_like(parameter)
        return cls(model, autoencoder, lpips.without_weights() if shape.lpips else None, critic)


def _denoiser(shape: Pass) -> LinearSR:
    """Return the denoiser, with its adapters; its tensors have no data."""
    if shape.lora is None:
        return LinearSR(shape.model.denoiser)
    # peft casts its layers, which tensors of this mode do not allow.
    with unset_fake_temporarily(), torch.device("meta"):
        model = inject(LinearSR(shape.model.denoiser), shape.lora)
    for module in model.modules():
        for name, old in module.named_parameters(recurse=False):
            empty = torch.empty(old.shape, dtype=old.dtype)
            setattr(module, name, nn.Parameter(empty, requires_grad=old.requires_grad))
    return model


class _Inputs(NamedTuple):
    """HR (B, 3, side, side), a noisy latent, timesteps (B,) and conditions."""

    hr: Tensor
    latent: Tensor
    t: Tensor
    conditions: Conditions

    @classmethod
    @torch.no_grad()
    def of(cls, shape: Pass, networks: _Networks) -> _Inputs:
        sizes, pairs = shape.model.denoiser, shape.pairs
        lr_picture = torch.empty(pairs, 3, shape.side, shape.side)
        hr = torch.empty_like(lr_picture) if shape.needs_hr else torch.empty(0)
        cells = shape.side // shape.model.latent.factor
        latent = torch.empty(pairs, sizes.latent_channels, cells, cells)
        joined = networks.autoencoder.condition(lr_picture) if sizes.condition_latent else None
        tags = mask = None
        if shape.model.tags is not None and sizes.tag_dim is not None:
            tags = torch.empty(pairs, count.TAG_TOKENS, sizes.tag_dim, dtype=shape.dtype)
            mask = torch.ones(pairs, count.TAG_TOKENS, dtype=torch.bool)
        return cls(hr, latent, torch.rand(pairs), Conditions(lr_picture, joined, tags, mask))


def _flow(shape: Pass, networks: _Networks) -> None:
    """Make the pass of `loop.flow_loss`."""
    model, autoencoder = networks.model, networks.autoencoder
    hr, latent, t, conditions = _Inputs.of(shape, networks)
    with torch.no_grad():
        encode = shape.encodes
        clean = autoencoder.encode(hr, conditions.lr_picture) if encode else latent.clone()
    v = model(latent, t, conditions.encode(model))
    loss = (v - velocity(clean, latent)).square().mean()
    if shape.decoded:
        guess = autoencoder.decode(clean_guess(latent, v, t), conditions.lr_picture)
        loss = loss + (guess - hr).abs().mean()
    loss.backward()


def _perceptual(shape: Pass, networks: _Networks) -> None:
    """Make the pass of `perceptual.Perceptual`, and the discriminator's own."""
    model, autoencoder, judge, critic = networks
    hr, latent, t, conditions = _Inputs.of(shape, networks)
    cells, pixels = shape.decoded, shape.decoded * autoencoder.factor
    real, lr_picture = (
        whole[..., :pixels, :pixels].clone() for whole in (hr, conditions.lr_picture)
    )
    guess = clean_guess(latent, model(latent, t, conditions.encode(model)), t)
    picture = autoencoder.decode(guess[..., :cells, :cells], lr_picture).float()
    loss = (picture - real).abs().mean()
    if judge is not None:
        loss = loss + judge(picture, real).mean()
    fake = picture.detach()
    if critic is not None:
        critic.requires_grad_(False)
        loss = loss + fooled(critic(picture, lr_picture)).mean()
        critic.requires_grad_(True)
    loss.backward()
    del guess, picture, loss
    if critic is not None:
        hinge(critic(real, lr_picture), critic(fake, lr_picture)).backward()


def validation_bytes(recipe: Recipe) -> int:
    """Return the bytes that validation on a GPU takes: one expert in float32, and decoding."""
    experts, learned = count.size(recipe.model)
    return 4 * experts + 2 * learned + tag_encoder_bytes(recipe.model) + _decoding(recipe)


def _decoding(recipe: Recipe) -> int:
    shape = Pass(recipe.model, recipe.validation.size, 1, torch.bfloat16, False, 0)
    with count.shapes_only():
        networks = _Networks.of(shape)
        with count.Peak() as peak, torch.no_grad():
            inputs = _Inputs.of(shape, networks)
            networks.autoencoder.decode(inputs.latent, inputs.hr)
    return peak.peak


# Operations


def pair_flops(run: Run) -> int:
    """Return the operations of a training pair: denoiser there and back, encoding, decoded guess.

    The guess's gradient goes back to the latent only, which costs as much as decoding again. With
    activation checkpointing the denoiser goes forward twice. A perceptual pair encodes nothing and
    takes one or two frozen forwards; judges are not counted. Adapters count as whole weights, so
    their backward pass is put too high.
    """
    stage, model, side = run.train, run.recipe.model, run.data.patch
    passes = FORWARD_AND_BACKWARD + stage.activation_checkpointing
    once = sum(count.denoiser(model, side))
    if isinstance(stage, PerceptualConfig):
        cut = side if stage.crop is None else min(side, stage.crop * model.latent.factor)
        decode = count.autoencoder(model.latent, cut)[1]
        return round((passes + 1 + stage.detour) * once) + 2 * decode
    encode, decode = count.autoencoder(model.latent, side)
    guess = stage.pixel_weight > 0 and stage.timesteps.high <= stage.pixel_below
    return passes * once + encode * (not run.latents) + 2 * guess * decode


def training_flops(run: Run) -> int:
    """Return the operations of all steps of a run."""
    return run.train.steps * run.data.batch * pair_flops(run)


def validation_flops(run: Run) -> int:
    """Return the operations of validating a run's checkpoints at all numbers of steps."""
    validation, stage = run.recipe.validation, run.train
    counts = {split_metric(name)[1] for name in validation.metrics}
    model = run.recipe.model
    one = sum(count.picture_flops(model, validation.size, steps) for steps in counts)
    return stage.steps // stage.checkpoint_every * validation.pictures * one


# Fit into memory


class Need(NamedTuple):
    """Runs of one stage that need the same memory."""

    runs: list[Run]
    memory: Memory

    @property
    def name(self) -> str:
        """Return the name of the first run, with the number of the last expert."""
        first, last = self.runs[0], self.runs[-1]
        return first.name if first.expert == last.expert else f"{first.name}-{last.expert}"


def needs(recipe: Recipe, gpus: int, *, latents: bool = False) -> list[Need]:
    """Return the memory of a rank in all runs of a recipe, each with so many GPUs.

    latents: whether the runs take latents and tag embeddings from shards.

    Raises OptionError if they cannot share a batch, and MissingExtra.
    """
    counted = [(run, memory(run, gpus)) for run in runs(recipe, latents)]
    groups = groupby(counted, lambda pair: (pair[0].kind, pair[1]))
    return [Need([run for run, _ in group], key[1]) for key, group in groups]


def check(found: list[Need], gpus: int, gpu_memory: float) -> None:
    """Raise OptionError, saying what to change, if runs do not fit GPUs of so many GB each."""
    limit = gpu_memory * USABLE * 1e9
    problems = [
        f"{need.name} needs {need.memory.total / 1e9:.3g} GB ({_advice(need, gpus, limit)})"
        for need in found
        if need.memory.total > limit
    ]
    if problems:
        raise OptionError(
            f"{limit / 1e9:.3g} of a GPU's {gpu_memory:g} GB can be used: {'; '.join(problems)}"
        )


def _advice(need: Need, gpus: int, limit: float) -> str:
    """Return the change that costs least computing and GPUs and lets the runs fit."""
    run = need.runs[0]
    for more in _multiples(gpus, run.data.batch):
        if _standing(run, more).total > limit:
            continue  # whatever the pass takes
        for checkpointing in sorted({run.train.activation_checkpointing, True}):
            share = run.data.batch // more
            for accumulation in (k for k in range(1, share + 1) if share % k == 0):
                fields = {"accumulation": accumulation, "activation_checkpointing": checkpointing}
                needed = memory(run.changed(**fields), more).total
                if needed <= limit:
                    changes = [f"--gpus {more}"] * (more != gpus) + _settings(need.runs, fields)
                    return f"{needed / 1e9:.3g} GB with {' '.join(changes)}"
    return "no accumulation, checkpointing or number of GPUs is enough: take GPUs with more memory"


def _multiples(gpus: int, batch: int) -> list[int]:
    """Return the numbers of GPUs, from `gpus` on by doubling, that can share a batch."""
    numbers = [gpus]
    while batch % (2 * numbers[-1]) == 0:
        numbers.append(2 * numbers[-1])
    return numbers


def _settings(runs: list[Run], fields: dict[str, Any]) -> list[str]:
    return [
        f"--set {run.path}.{name}={str(value).lower()}"
        for run in runs
        for name, value in fields.items()
        if getattr(run.train, name) != value
    ]
