"""Count the cost of jobs. `python -m benchmarks.sizing` prints the tables of docs/guides/sizing.md.

Operations are counted from shapes, memory from the layout of ZeRO-1 and from the tensors that
PyTorch keeps for the backward pass. The rate that a GPU sustains is an assumption, and has its own
column; measured rates come from benchmarks/results.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.flops import counted, torch_only
from benchmarks.markdown import markdown
from linearsr.config import MODELS, LatentConfig, ModelConfig
from linearsr.denoiser import LinearSR
from linearsr.diffusion.experts import plan
from linearsr.diffusion.schedule import schedule
from linearsr.training.config import PerceptualConfig, TrainConfig
from linearsr.training.recipes import RECIPES, Recipe, split_metric

# Tokens of a handful of names; the tag encoder could take 300.
TAG_TOKENS = 16
# One forward, and twice that for the gradients of activations and of weights.
FORWARD_AND_BACKWARD = 3
# TFLOP/s that a GPU sustains over a whole run: assumed, not measured.
SUSTAINED = (50, 100, 200, 400)
RANKS = (1, 2, 4, 8)
SIDE = 1024
# Channels of the latents of DC-AE.
CHANNELS = 32


class Forward(NamedTuple):
    """A model with the inputs of one result."""

    model: LinearSR
    picture: Tensor
    latent: Tensor
    joined: Tensor | None
    tags: Tensor | None

    def condition(self) -> Any:
        """Return the part that an expert computes once."""
        return self.model.condition(self.picture, self.joined, self.tags)

    def step(self, condition: Any) -> Tensor:
        """Return the part that an expert computes at every step."""
        return self.model(self.latent, torch.rand(1), condition)


def forward(config: ModelConfig, side: int, tokens: int = TAG_TOKENS) -> Forward:
    """Make the model and inputs for a result of side x side pixels."""
    shape, dim = config.denoiser, config.denoiser.tag_dim
    model, cells = LinearSR(shape), side // config.latent.factor
    model.use_strips = False
    latent = torch.randn(1, shape.latent_channels, cells, cells)
    tags = None if dim is None else torch.randn(1, tokens, dim)
    picture = torch.randn(1, 3, side, side)
    return Forward(model, picture, latent, latent if shape.condition_latent else None, tags)


@cache
def denoiser(config: ModelConfig, side: int, tokens: int = TAG_TOKENS) -> tuple[int, int]:
    """Return the operations of one step, and of the part that an expert computes once."""

    def step() -> Callable[[], object]:
        inputs = forward(config, side, tokens)
        condition = inputs.condition()
        return lambda: inputs.step(condition)

    return counted(step), counted(lambda: forward(config, side, tokens).condition)


def saved(config: ModelConfig, side: int) -> int:
    """Return the bytes that PyTorch keeps for the backward pass of one pair, in bfloat16."""
    storages: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    torch.set_default_dtype(torch.bfloat16)
    try:
        inputs = forward(config, side)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            inputs.step(inputs.condition())
    finally:
        torch.set_default_dtype(torch.float32)
    weights = {p.untyped_storage()._cdata for p in inputs.model.parameters()}
    return sum(storage.nbytes() for key, storage in storages.items() if key not in weights)


@cache
def kept(config: ModelConfig, side: int) -> int:
    """Return what `saved` returns, without computing anything."""
    with torch_only(), FakeTensorMode():
        return saved(config, side)


@cache
def autoencoder(latent: LatentConfig, side: int) -> tuple[int, int]:
    """Return the operations of encoding and of decoding one picture; 0 without a learned latent."""
    if latent.kind == "space-to-depth":
        return 0, 0
    cells = side // latent.factor

    def of(name: str, *shape: int) -> int:
        return counted(lambda: lambda: getattr(dc_ae(), name)(torch.randn(1, *shape)))

    return of("encode", 3, side, side), of("decode", CHANNELS, cells, cells)


def dc_ae() -> Any:
    """DC-AE f32c32 in the shape of Sana's, without its weights."""
    from diffusers import AutoencoderDC

    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    scales = ((),) * 3 + ((5,),) * 3
    return AutoencoderDC(
        latent_channels=CHANNELS,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_layers_per_block=(2, 2, 2, 3, 3, 3),
        decoder_layers_per_block=(3,) * 6,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )


def parameters(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in model.parameters())


@cache
def size(config: ModelConfig) -> tuple[int, int]:
    """Return the numbers of parameters of one expert and of the autoencoder."""
    with FakeTensorMode():
        learned = config.latent.kind != "space-to-depth"
        return parameters(LinearSR(config.denoiser)), parameters(dc_ae()) if learned else 0


def picture_flops(config: ModelConfig, side: int, steps: int | None = None) -> int:
    """Return the operations of a result: the steps, what each expert computes once, decoding."""
    sampling = config.sampling
    times = schedule(sampling, steps)[:-1]
    step, once = denoiser(config, side)
    experts = len({segment.expert for segment in plan(times, sampling.boundaries)})
    return len(times) * step + experts * once + autoencoder(config.latent, side)[1]


def pair_flops(recipe: Recipe, stage: TrainConfig) -> int:
    """Return the operations of a training pair: denoiser there and back, encoding, decoded guess.

    The guess's gradient goes back to the latent only, which costs as much as decoding again. A
    perceptual pair encodes nothing and takes one or two frozen forwards; judges are not counted.
    """
    if isinstance(stage, PerceptualConfig):
        side, latent = recipe.data_of("perceptual").patch, recipe.model.latent
        cut = side if stage.crop is None else min(side, stage.crop * latent.factor)
        forwards = FORWARD_AND_BACKWARD + 1 + stage.detour
        return round(forwards * sum(denoiser(recipe.model, side))) + 2 * autoencoder(latent, cut)[1]
    side = recipe.data.patch
    encode, decode = autoencoder(recipe.model.latent, side)
    guess = stage.pixel_weight > 0 and stage.timesteps.high <= stage.pixel_below
    return FORWARD_AND_BACKWARD * sum(denoiser(recipe.model, side)) + encode + 2 * guess * decode


def validation_flops(recipe: Recipe, stage: TrainConfig) -> int:
    """Return the operations of validating a stage's checkpoints at all numbers of steps."""
    validation = recipe.validation
    counts = {split_metric(name)[1] for name in validation.metrics}
    one = sum(picture_flops(recipe.model, validation.size, count) for count in counts)
    return stage.steps // stage.checkpoint_every * validation.pictures * one


def stages(recipe: Recipe) -> dict[str, tuple[TrainConfig, ...]]:
    """Return the stages of training, one after the other."""
    return {
        "pretraining": (recipe.pretrain,),
        "experts": recipe.experts,
        "fine-tuning": recipe.finetune,
        "perceptual": recipe.perceptual,
    }


def results() -> str:
    """A picture of 1024 x 1024, as upscaling and serving make it."""
    rows = []
    for config in MODELS.values():
        (step, once), (encode, decode) = denoiser(config, SIDE), autoencoder(config.latent, SIDE)
        total = picture_flops(config, SIDE)
        hourly = [_number(3600 * rate * 1e12 / total) for rate in SUSTAINED]
        shown = (step, once, encode, decode)
        cells = [f"{flops / 1e12:.3g}" for flops in shown]
        steps = str(config.sampling.steps)
        rows.append([f"`{config.name}`", *cells, steps, f"{total / 1e12:.3g}", *hourly])
    head = ["TFLOP", "a step", "once an expert", "encode", "decode", "steps", "in all"]
    return markdown([*head, *(f"pictures/h at {rate} TFLOP/s" for rate in SUSTAINED)], rows)


def training() -> str:
    """Each recipe, stage by stage, but that of weights that nobody uses."""
    rows = []
    for name, make in RECIPES.items():
        if name == "smoke":
            continue
        recipe = make()
        for stage, runs in stages(recipe).items():
            data = recipe.data_of("perceptual" if stage == "perceptual" else "pretrain")
            pairs = [run.steps * data.batch for run in runs]
            trained = sum(n * pair_flops(recipe, run) for n, run in zip(pairs, runs, strict=True))
            judged = sum(validation_flops(recipe, run) for run in runs)
            hours = [_number((trained + judged) / rate / 3.6e15) for rate in SUSTAINED]
            cells = f"{sum(pairs):,}", _number(trained / 1e15), _number(judged / 1e15)
            rows.append([f"`{name}`", stage, *cells, *hours])
    head = ["recipe", "stage", "pairs", "PFLOP to train", "to validate"]
    return markdown([*head, *(f"GPU-hours at {rate} TFLOP/s" for rate in SUSTAINED)], rows)


def memory() -> str:
    """Bytes of a training rank and of a checkpoint, by the layout of ZeRO-1 in bfloat16."""
    rows = []
    for name, make in RECIPES.items():
        recipe = make()
        if recipe.pretrain.bfloat16 is not True:  # those for a CPU leave it to the processor
            continue
        count = size(recipe.model)[0]
        ranks = [f"{count * (4 + 16 / n) / 1e9:.3g}" for n in RANKS]
        activations = f"{kept(recipe.model, recipe.data.patch) / 1e9:.3g}"
        cells = f"{count / 1e9:.3g}", *ranks, activations, f"{count * 18 / 1e9:.3g}"
        rows.append([f"`{name}`", *cells])
    head = ["GB", "parameters, billions", *(f"{n} rank{'s' * (n > 1)}" for n in RANKS)]
    return markdown([*head, "and for each pair", "a checkpoint"], rows)


def weights() -> str:
    """Memory of upscaling and serving on a GPU, in bfloat16."""
    rows = []
    for config in MODELS.values():
        one, learned = size(config)
        experts = len(config.sampling.boundaries) + 1
        cells = (one, experts * one, learned)
        rows.append([f"`{config.name}`", *(f"{2 * count / 1e9:.2g}" for count in cells)])
    return markdown(["GB", "one expert", "all experts", "autoencoder"], rows)


def measured() -> str:
    """Rates that machines sustained in a forward of linearsr-tiny as it is shipped."""
    rows = []
    for file in sorted((Path(__file__).parent / "results").glob("*/forward.json")):
        forward = json.loads(file.read_text())
        for row in forward["rows"]:
            if "as shipped" in row["what"] and row["seconds"]:
                flops = denoiser(MODELS["linearsr-tiny"], row["side"])[0]
                cells = f"{row['seconds']:.3g} s", f"{flops / row['seconds'] / 1e12:.3g}"
                machine = forward["machine"]
                rows.append([machine["machine"], machine["precision"], f"{row['side']}²", *cells])
    return markdown(["machine", "precision", "result", "a step", "TFLOP/s"], rows)


Table = Callable[[], str]
TABLES: tuple[Table, ...] = (results, training, memory, weights, measured)


def _number(value: float) -> str:
    """Two digits: the counts are no more exact than that."""
    if value and value < 0.001:
        return "under 0.001"
    return f"{value:.2g}" if value < 10 else f"{int(float(f'{value:.2g}')):,}"


def main() -> None:
    """Print every table."""
    for make in TABLES:
        print(f"{make.__doc__}\n\n{make()}\n")


if __name__ == "__main__":
    main()
