"""The finisher: the last stage of a request, from latents to the bytes of a file."""

from __future__ import annotations

import asyncio
import time

from linearsr.config import FileOptions
from linearsr.distributed.models import load_upscaler
from linearsr.distributed.serve.config import ServeConfig
from linearsr.distributed.serve.expert import Handoff, check_same_model
from linearsr.pipeline.codec import encode_result
from linearsr.pipeline.state import UpscaleState
from linearsr.web.service import Result


class Finisher:
    """Decodes latents, joins tiles and encodes; a deployment of its own for a learned latent."""

    def __init__(self, config: ServeConfig, device: str) -> None:
        self.upscaler = load_upscaler(config.model, device, only=())
        # Results name the way in which the experts ran, on whatever device they are decoded.
        self.upscaler.acceleration = config.acceleration
        _ = self.upscaler.autoencoder  # loaded now, so that a replica is ready once it exists

    async def finish(self, state: UpscaleState, handoff: Handoff, files: FileOptions) -> Result:
        """Return the encoded picture of the last expert's latents.

        Raises StaleModel if they belong to another model.
        """
        check_same_model(self.upscaler, handoff)
        return await asyncio.to_thread(self._finish, state, handoff, files)

    async def ready(self) -> bool:
        """Return True, for a health check: a replica exists only after its decoder has loaded."""
        return True

    def _finish(self, state: UpscaleState, handoff: Handoff, files: FileOptions) -> Result:
        start = time.perf_counter()
        picture = self.upscaler.finish(state.after(handoff.state))
        decoded = time.perf_counter()
        result = encode_result(self.upscaler, picture, state.options, files)
        encoded = time.perf_counter()
        timing = {"queue": handoff.queue, **handoff.denoise}
        timing |= {"decode": 1000 * (decoded - start), "encode": 1000 * (encoded - decoded)}
        model, seed = self.upscaler.config.name, state.options.seed
        data, format, width, height, notes = result
        return Result(
            image=data,
            format=format,
            width=width,
            height=height,
            model=model,
            seed=seed,
            steps=state.steps,
            scale=state.scale,
            timing=timing,
            notes=notes,
        )
