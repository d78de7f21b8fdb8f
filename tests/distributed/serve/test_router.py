"""The router over experts in this process: which parts of a request a retry repeats."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from linearsr import Upscaler, weights
from linearsr.config import FileOptions, ModelConfig, Options
from linearsr.diffusion.experts import Segment
from linearsr.distributed.serve import ServeConfig
from linearsr.distributed.serve import retry as retries
from linearsr.distributed.serve.expert import Handoff
from linearsr.distributed.serve.retry import StaleModel, WeightsChanged
from linearsr.distributed.serve.router import Router
from linearsr.imaging.files import encode, read
from linearsr.pipeline.upscaler import OutOfMemory
from linearsr.web.service import NotReady, Progress, Result, UpscaleRequest
from tests.helpers.endpoint import photograph, pixels_of
from tests.helpers.experts import random_experts

DIED = ray.exceptions.ActorDiedError()


class FakeExperts:
    """A handle whose calls raise these errors in turn, then take their steps in this process."""

    def __init__(self, upscaler: Upscaler, errors: list[Exception]) -> None:
        self.upscaler = upscaler
        self.errors = errors
        self.tiles: list[int] = []

    @property
    def denoise(self) -> FakeExperts:
        return self

    def remote(self, before: Any, segment: Segment) -> FakeResponse:
        return FakeResponse(asyncio.ensure_future(self._denoise(before, segment)))

    async def _denoise(self, before: Any, segment: Segment) -> Handoff:
        handoff = before if isinstance(before, Handoff) else await before
        if segment.start == 0:
            self.tiles.append(len(handoff.state.tiles))
            if self.errors:
                raise self.errors.pop(0)
        return Handoff(self.upscaler.denoise(handoff.state, segment), handoff.config)


class FakeResponse:
    """The part of a response that the router uses."""

    def __init__(self, task: asyncio.Future[Handoff]) -> None:
        self.task = task

    def __await__(self) -> Any:
        return self.task.__await__()

    async def _to_object_ref(self) -> FakeResponse:
        return self

    async def _ready(self) -> None:
        await self.task


@pytest.fixture(scope="module")
def bundle(tagged_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tagged")
    experts = [model.state_dict() for model in random_experts(tagged_config, 4)]
    weights.save(folder, tagged_config, experts, {}, dtype=torch.float32)
    return folder


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = retries.retry_policy

    async def at_once(_: float) -> None:
        return

    def without_pauses(*args: Any) -> Any:
        return policy(*args).copy(sleep=at_once)

    monkeypatch.setattr(retries, "retry_policy", without_pauses)


def over(bundle: Path, *errors: Exception) -> tuple[Router, FakeExperts]:
    handle = FakeExperts(Upscaler.load(bundle, "cpu"), list(errors))
    config = ServeConfig(model=str(bundle), device="cpu", layout="together")
    return Router(config, [(0, 1, 2, 3)], [handle], None), handle  # type: ignore[list-item]


def events_of(router: Router, **options: Any) -> list[Progress | Result]:
    request = UpscaleRequest(
        photograph(0, 40, 24), Options.parse(seed=1, **options), FileOptions(), progress=True
    )

    async def collect() -> list[Progress | Result]:
        return [event async for event in router.upscale(request)]

    return asyncio.run(collect())


def test_a_retry_repeats_the_steps_but_not_the_tagging(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    router, handle = over(bundle, DIED, WeightsChanged(), OutOfMemory())
    with_tags, tagged = router.upscaler.with_tags, []

    def counting(picture: Any, options: Options) -> Options:
        if options.tags == "auto":
            tagged.append(picture)
            options = options.model_copy(update={"tags": ("cat",)})
        return with_tags(picture, options)

    monkeypatch.setattr(router.upscaler, "with_tags", counting)
    events = events_of(router, tags="auto", steps=4)
    assert len(tagged) == 1 and len(handle.tiles) == 4
    assert sum(isinstance(event, Result) for event in events) == 1
    result = events[-1]
    assert isinstance(result, Result)
    picture = read(photograph(0, 40, 24))
    alone = handle.upscaler.upscale(picture, Options.parse(seed=1, steps=4, tags="cat"))
    assert np.array_equal(pixels_of(result.image), pixels_of(encode(alone, "png")))


def test_a_request_whose_replicas_keep_dying_is_given_up(bundle: Path) -> None:
    router, handle = over(bundle, *[DIED] * 9)
    with pytest.raises(NotReady, match="5 times"):
        events_of(router)
    assert len(handle.tiles) == 5


def test_a_stale_model_goes_back_to_the_ingress(bundle: Path) -> None:
    router, handle = over(bundle, StaleModel())
    with pytest.raises(StaleModel):
        events_of(router)
    assert len(handle.tiles) == 1
