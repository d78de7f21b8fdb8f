"""Training on one rank: steps a second, and memory against the counted one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from benchmarks.gpu.forward import narrow
from benchmarks.gpu.stage import Row, Settings, installed, missing
from benchmarks.timing import in_turn
from linearsr.config import LINEARSR_1_6B
from linearsr.denoiser import LinearSR
from linearsr.training.config import TrainConfig
from linearsr.training.engine import Engine, TorchEngine, ZeroEngine

SIDE, TOY_SIDE = 1024, 256
TAG_TOKENS = 16
PAIRS = 2


def rows(settings: Settings) -> Iterator[Row]:
    """Yield a row for each engine."""
    if settings.device.type == "cuda" and not dist.is_nccl_available():
        yield {"what": "nccl", "note": "not available: ZeRO-1 is not measured"}
    elif installed("deepspeed"):
        yield from _measure("ZeRO-1, one rank", settings)
    else:
        yield missing("ZeRO-1, one rank", "deepspeed")
    yield from _measure("plain PyTorch", settings)


def _measure(name: str, settings: Settings) -> Iterator[Row]:
    config = narrow(LINEARSR_1_6B) if settings.toy else LINEARSR_1_6B
    torch.manual_seed(0)
    with settings.device:
        model = LinearSR(config.denoiser)
    parameters = sum(p.numel() for p in model.parameters())
    train = TrainConfig(steps=1, bfloat16=settings.dtype == torch.bfloat16)
    engine = _engine(name, model, train, settings)
    cells = (TOY_SIDE if settings.toy else SIDE) // config.latent.factor
    shape = (PAIRS, config.denoiser.latent_channels, cells, cells)
    latent = torch.randn(shape, device=settings.device)
    picture = torch.randn(PAIRS, 3, *(config.latent.factor * n for n in shape[2:]))
    tags = torch.randn(PAIRS, TAG_TOKENS, config.denoiser.tag_dim or 1)
    picture, tags = (x.to(settings.device) for x in (picture, tags))
    t = torch.rand(PAIRS, device=settings.device)
    dtype = next(engine.module.parameters()).dtype

    def step() -> None:
        with engine.precision():
            condition = engine.module.condition(picture.to(dtype), latent.to(dtype), tags.to(dtype))
            loss = engine.module(latent, t, condition).float().square().mean()
        engine.backward(loss)
        engine.step(1e-5)

    timed = in_turn({name: step}, settings.device, rounds=3)[name]
    row: Row = {"what": f"{config.name}, {name}", "pairs": PAIRS, "parameters": parameters}
    if timed.failure:
        yield {**row, "note": timed.failure}
    else:
        held = torch.cuda.memory_allocated() if settings.device.type == "cuda" else 0
        yield {
            **row,
            "steps/s": 1 / timed.seconds,
            "GB held": held / 1e9,
            "GB more in a step": timed.memory / 1e9,
        }
    engine.close()


def _engine(name: str, model: LinearSR, train: TrainConfig, settings: Settings) -> Engine:
    if not name.startswith("ZeRO"):
        return TorchEngine(model, train, settings.device)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it
    if not dist.is_initialized():
        backend = "nccl" if settings.device.type == "cuda" else "gloo"
        file = (settings.out / "rank0").resolve()
        dist.init_process_group(backend, init_method=f"file://{file}", rank=0, world_size=1)
    return ZeroEngine(model, train, settings.device)
