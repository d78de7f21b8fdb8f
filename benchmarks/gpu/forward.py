"""One forward of the large models with random weights, in every way that the package can run it."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.contestants import TAGS, sana_of, softmax
from benchmarks.gate import NOT_THE_SAME, PLAIN, check_ways
from benchmarks.gpu.stage import Row, Settings, installed, missing, read_rows
from benchmarks.timing import Expected, in_turn, log_slope
from linearsr.config import LINEARSR_0_6B, LINEARSR_1_6B, ModelConfig
from linearsr.cuda_graph import Graph
from linearsr.denoiser import Condition, LinearSR
from linearsr.denoiser.fp8 import use_fp8
from linearsr.errors import LinearSRError, OptionError, reason
from linearsr.training import count

SIDES = (512, 1024, 2048, 4096)
TOY_SIDES = (128, 256)
GATE_SIDE = 256
# Compiling takes half a minute for each size.
COMPILED = (1024,)
LIMIT = 5.0  # seconds of a call
FP8 = "fp8, CUDA graph"  # rounds more than the gate allows


def rows(settings: Settings) -> Iterator[Row]:
    """Yield the errors of all ways against float64, then the time and memory of each."""
    peak = _peak(settings)
    for config in (LINEARSR_1_6B, LINEARSR_0_6B):
        config = narrow(config) if settings.toy else config
        yield from _model(config, settings, peak)


def narrow(config: ModelConfig) -> ModelConfig:
    """Return a config with the layers of another, but few and narrow."""
    sizes = {"depth": 2, "width": 64, "head_dim": 32, "tag_heads": 2, "tag_dim": 16}
    return config.model_copy(update={"denoiser": config.denoiser.model_copy(update=sizes)})


def random_model(config: ModelConfig, settings: Settings) -> LinearSR:
    """Return a model with random weights that is not zero anywhere, on the device."""
    torch.manual_seed(0)
    with settings.device:
        model = LinearSR(config.denoiser)
        for parameter in model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
    return model.to(settings.dtype).requires_grad_(False).eval()


def _model(config: ModelConfig, settings: Settings, peak: float) -> Iterator[Row]:
    model = random_model(config, settings)
    yield {
        "what": f"{config.name}: parameters",
        "value": sum(p.numel() for p in model.parameters()),
    }
    rounded = _in_fp8(model)
    yield from _left_out(config, rounded)
    for name, relative in _errors(config, model, rounded, settings).items():
        yield {"what": f"{config.name}: {name}, relative error", "value": relative}
    expected, times = Expected(LIMIT), list[tuple[int, float]]()
    for side in TOY_SIDES if settings.toy else SIDES:
        ways = _ways(config, model, rounded, settings, side, compiled=side in COMPILED)
        flops, _ = count.denoiser(config, side, TAGS)
        for name, way in ways.items():
            if not expected.within(name, side, 2 if name == NOT_THE_SAME else 1):
                continue
            timed = in_turn({name: way}, settings.device, rounds=5)[name]
            row: Row = {"what": f"{config.name}: {name}", "side": side}
            if timed.failure:
                yield {**row, "note": timed.failure}
                continue
            expected.record(name, side, timed.seconds)
            if name == "LinearSR, CUDA graph":
                times.append((side, timed.seconds))
            yield {
                **row,
                "ms": 1e3 * timed.seconds,
                "TFLOP/s": flops / timed.seconds / 1e12,
                "of the peak": f"{flops / timed.seconds / peak:.1%}",
                "MiB": round(timed.memory / 2**20),
            }
    yield {"what": f"{config.name}: log-log slope of time over pixels", "value": log_slope(times)}


def _in_fp8(model: LinearSR) -> LinearSR | None:
    """Return a copy of the model that multiplies 8-bit floats; None if that is not possible."""
    copied = copy.deepcopy(model)
    try:
        use_fp8(copied)
    except OptionError:
        return None
    return copied


def _left_out(config: ModelConfig, rounded: LinearSR | None) -> Iterator[Row]:
    if not installed("diffusers"):
        yield missing(f"{config.name}: diffusers' Sana", "diffusers")
    if rounded is None:
        yield {
            "what": f"{config.name}: {FP8}",
            "note": "not measured: this GPU or PyTorch has none",
        }


def _errors(
    config: ModelConfig, model: LinearSR, rounded: LinearSR | None, settings: Settings
) -> dict[str, float]:
    """Return the relative errors of our ways. Raises GateError if rounding cannot explain one."""
    latent, t, _, condition = _inputs(config, model, settings, GATE_SIDE)
    ways = _ways(config, model, rounded, settings, GATE_SIDE, compiled=False)
    exact = copy.deepcopy(model).double()
    exact.use_strips = False
    keys = [(k.double(), v.double()) for k, v in condition.tags or []]
    with torch.inference_mode():
        truth = exact(latent.double(), t.double(), Condition(condition.embedded.double(), keys))
        gated = {name: ways[name] for name in ways if name.startswith("LinearSR")}
        errors = check_ways(gated, truth)
        with contextlib.suppress(LinearSRError, KeyError):  # the rows of its time say why
            errors[FP8] = float((ways[FP8]().double() - truth).norm() / truth.norm())
        return errors


def _peak(settings: Settings) -> float:
    """Return the FLOP/s of a large product, as the first stage measured it."""
    measured = [row for row in read_rows(settings.out, "machine") if "product" in row["what"]]
    return 1e12 * measured[0]["value"] if measured else math.nan


def _inputs(
    config: ModelConfig, model: LinearSR, settings: Settings, side: int
) -> tuple[Tensor, Tensor, Tensor, Condition]:
    """Return latent, t, tag embeddings and the condition of a picture of side x side pixels."""
    cells = side // config.latent.factor
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(1, config.denoiser.latent_channels, cells, cells, generator=generator)
    tags = torch.randn(1, TAGS, config.denoiser.tag_dim or 1, generator=generator)
    embedded = torch.randn(1, cells, cells, config.denoiser.width, generator=generator)
    latent, tags, embedded = (
        x.to(settings.device, settings.dtype) for x in (latent, tags, embedded)
    )
    latent = latent.contiguous(memory_format=torch.channels_last)
    t = torch.tensor([0.5], device=settings.device)
    with torch.inference_mode():
        return latent, t, tags, Condition(embedded, model.tag_keys(tags))


def _ways(
    config: ModelConfig,
    model: LinearSR,
    rounded: LinearSR | None,
    settings: Settings,
    side: int,
    *,
    compiled: bool,
) -> dict[str, Callable[[], Tensor]]:
    latent, t, tags, condition = _inputs(config, model, settings, side)

    def forward(latent: Tensor, t: Tensor) -> Tensor:
        return model(latent, t, condition)

    def plain() -> Tensor:
        with mock.patch.dict(os.environ, {"LINEARSR_KERNELS": "torch"}):
            return forward(latent, t)

    def inferred(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return torch.inference_mode()(function)

    def recorded(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
        graph = functools.cache(lambda: Graph(function, latent, t))  # at the first call
        return lambda: graph()(latent, t)

    ways: dict[str, Callable[[], Tensor]] = {
        PLAIN: plain,
        "LinearSR": lambda: forward(latent, t),
        "LinearSR, CUDA graph": recorded(forward),
    }
    if compiled or settings.toy:
        fused = copy.copy(model)
        fused.use_strips = False
        # On a CPU the compiler's own code would take longer than all stages together.
        backend = "eager" if settings.toy else "inductor"
        run: Any = torch.compile(fused, dynamic=False, backend=backend)
        ways["LinearSR, compiled"] = lambda: run(latent, t, condition)
        ways["LinearSR, compiled, CUDA graph"] = recorded(lambda x, t: run(x, t, condition))
    if rounded is not None:
        ways[FP8] = recorded(lambda x, t: rounded(x, t, condition))
    other = softmax(model)
    ways[NOT_THE_SAME] = lambda: other(latent, t, condition)
    if installed("diffusers"):
        sana = sana_of(config.denoiser).to(settings.device, settings.dtype).eval()
        ways["diffusers' Sana"] = lambda: sana(latent, tags, t * 1000, return_dict=False)[0]
    return {name: _noted(inferred(way)) for name, way in ways.items()}


def _noted(way: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return a way whose errors are ours, so that they become a note and the other ways go on."""

    def run() -> Tensor:
        try:
            return way()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise LinearSRError(reason(error)) from error

    return run
