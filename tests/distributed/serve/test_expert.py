"""A replica of experts by itself: what it keeps of a request that has ended."""

from __future__ import annotations

import asyncio
import gc
import weakref
from pathlib import Path
from typing import Any

import torch

from linearsr.config import Options
from linearsr.distributed.serve.config import ServeConfig
from linearsr.distributed.serve.expert import Experts, Handoff
from linearsr.imaging.files import Picture


def test_replica_keeps_no_tensors_of_a_finished_request(small_bundle: Path) -> None:
    """Serve's queues hold the last batch until the next one comes, as the queue here does."""
    experts = Experts(ServeConfig(model=str(small_bundle), device="cpu"), (0,))
    held: list[Any] = []

    async def queue(item: Any) -> None:
        held.append(item)
        await experts._denoise([item])

    experts.queues = {0: queue}

    async def serve() -> list[bool]:
        planned = experts.upscaler.prepare(Picture(torch.rand(3, 24, 16)), Options(steps=1))
        request = Handoff(planned.denoise_state(), experts.upscaler.config)
        kept = [weakref.ref(latent) for latent in planned.latents]
        segment = planned.segments[0]
        del planned
        result = await experts.denoise(request, segment)
        kept += [weakref.ref(latent) for latent in result.state.latents]
        del request, result
        gc.collect()
        return [reference() is None for reference in kept]

    assert all(asyncio.run(serve())) and len(held) == 1
