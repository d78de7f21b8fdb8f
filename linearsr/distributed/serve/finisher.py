"""The last stage of a request: from latents to the bytes of a file."""

from __future__ import annotations

import asyncio
import time

from linearsr.config import FileOptions
from linearsr.distributed.models import load_upscaler
from linearsr.distributed.serve.config import ServeConfig
from linearsr.distributed.serve.expert import Handoff, check_planned_for
from linearsr.pipeline.codec import encode_result
from linearsr.pipeline.state import UpscaleState
from linearsr.web.service import Result


class Finisher:
    """Decodes, joins tiles and encodes. A replica of its own where the latent is learned."""

    def __init__(self, config: ServeConfig, device: str) -> None:
        self.upscaler = load_upscaler(config.model, device, only=())
        _ = self.upscaler.autoencoder  # loaded before this is ready

    async def finish(self, job: UpscaleState, passed: Handoff, files: FileOptions) -> Result:
        """The picture of the latents that the last expert passed on.

        Raises StaleModel for those of another model.
        """
        check_planned_for(self.upscaler, passed)
        return await asyncio.to_thread(self._finish, job, passed, files)

    async def ready(self) -> bool:
        """An answer says that the decoder is loaded."""
        return True

    def _finish(self, job: UpscaleState, passed: Handoff, files: FileOptions) -> Result:
        began = time.perf_counter()
        picture = self.upscaler.finish(job.after(passed.work))
        decoded = time.perf_counter()
        result = encode_result(self.upscaler, picture, job.options, files)
        ended = time.perf_counter()
        timing = {"queue": passed.queue, **passed.denoise}
        timing |= {"decode": 1000 * (decoded - began), "encode": 1000 * (ended - decoded)}
        model, seed = self.upscaler.config.name, job.options.seed
        return Result(*result, model, seed, job.steps, job.scale, timing)
