"""The application: deployments bound to each other. They hold no policy; the config does."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from statistics import median
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from linearsr.config import ModelConfig
from linearsr.distributed.compat import HEAD_RESOURCE
from linearsr.distributed.models import absolute, read_config
from linearsr.distributed.serve.config import ServeConfig, learned
from linearsr.distributed.serve.expert import Experts
from linearsr.distributed.serve.finisher import Finisher
from linearsr.distributed.serve.retry import NoCapacity, cause, retry_policy
from linearsr.distributed.serve.router import Router
from linearsr.errors import OptionError
from linearsr.web.api import create_app
from linearsr.web.service import Events, Full, ModelInfo, NotReady, Request, Result, model_info
from linearsr.weights import expert_names

# Pages, refusals and health are answered while uploads wait.
INGRESS_REQUESTS = 1000
# Who finds no room is told what requests took of late: this long until there was one.
RETRY_AFTER_SECONDS = 2
TOKEN = "LINEARSR_TOKEN"
# A part that does not answer by then counts as gone.
READY_SECONDS = 5


def build_app(config: ServeConfig | Mapping[str, Any]) -> Application:
    """Ingress, router, experts, and a finisher where the latent is learned.

    Takes the `args` of a Serve config file as well. Raises OptionError or WeightsError.
    """
    if not isinstance(config, ServeConfig):
        config = ServeConfig.parse(**config)
    config = config.model_copy(update={"model": absolute(config.model)})
    model = read_config(config.model)
    groups = config.groups(model)
    experts = [_experts(config, model, which, count) for which, count in groups]
    finisher = _finisher(config) if learned(model) else None
    room = {"max_ongoing_requests": config.places, "max_queued_requests": config.waiting}
    router = serve.deployment(Router).options(
        **{**_common(config, config.router_cpus), **room}, num_replicas=config.routers
    )
    bound = router.bind(config, [which for which, _ in groups], experts, finisher)
    common = _common(config, config.ingress_cpus)
    if config.ingress_node == "head":
        common["ray_actor_options"]["resources"] = {HEAD_RESOURCE: 0.001}
    if token := os.environ.get(TOKEN):  # set where this is called, needed where the ingress runs
        common["ray_actor_options"]["runtime_env"]["env_vars"][TOKEN] = token
    ingress = serve.deployment(serve.ingress()(Ingress)).options(
        **{**common, "max_ongoing_requests": INGRESS_REQUESTS}, num_replicas=config.ingresses
    )
    parts = [*experts, *([finisher] if finisher else [])]
    return ingress.bind(config, model_info(model), bound, parts)


def _experts(
    config: ServeConfig, model: ModelConfig, which: tuple[int, ...], replicas: int
) -> Application:
    names = expert_names(model)
    name = names[which[0]] if len(which) == 1 else "experts"
    options = _common(config, config.expert_cpus, config.expert_gpus)
    if config.most_replicas is None:
        options["num_replicas"] = replicas
    else:
        if config.most_replicas < replicas:
            raise OptionError(
                f"most_replicas is {config.most_replicas}, but {name} starts with {replicas}; "
                "raise it, or lower replicas"
            )
        options["autoscaling_config"] = AutoscalingConfig(
            min_replicas=replicas,
            max_replicas=config.most_replicas,
            target_ongoing_requests=config.batch,
        )
    return serve.deployment(Experts).options(name=name, **options).bind(config, which)


def _finisher(config: ServeConfig) -> Application:
    options = _common(config, config.expert_cpus, config.expert_gpus)
    return serve.deployment(Finisher).options(**options).bind(config, config.device)


def _common(config: ServeConfig, cpus: float, gpus: float = 0.0) -> dict[str, Any]:
    """Health is looked at often, so that the dead are replaced soon; requests under way may end."""
    # Tensors are mapped where they lie, not copied in and out: 47 instead of 128 ms for three calls
    # with 12 MB.
    environment = {"env_vars": {"RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1"}}
    return {
        "ray_actor_options": {"num_cpus": cpus, "num_gpus": gpus, "runtime_env": environment},
        # All that the routers have at work may be at one expert.
        "max_ongoing_requests": 2 * config.places * config.routers,
        "max_surge_percent": config.surge,
        "health_check_period_s": 2,
        # No request takes longer: one may wait in a replica that ends for others that begin.
        "graceful_shutdown_timeout_s": config.limits.seconds,
        "logging_config": LoggingConfig(encoding="JSON"),
    }


class Ingress:
    """HTTP in, HTTP out."""

    def __init__(
        self,
        config: ServeConfig,
        info: ModelInfo,
        router: DeploymentHandle,
        parts: Sequence[DeploymentHandle],
    ) -> None:
        self.limits = config.limits
        self.fleet = Fleet(info, router, parts, config.attempts)

    def __serve_build_asgi_app__(self) -> Any:
        """What Serve puts behind its proxy."""
        return create_app(self.fleet, self.limits, os.environ.get(TOKEN) or None)

    async def drain(self) -> None:
        """Take in no more, and return when what is under way has ended."""
        await self.fleet.drain()


class Fleet:
    """A `linearsr.web.service.Service` by a router's handle."""

    def __init__(
        self,
        info: ModelInfo,
        router: DeploymentHandle,
        parts: Sequence[DeploymentHandle],
        attempts: int,
    ) -> None:
        self.info = info
        self.router = router
        self.parts = parts
        self.attempts = attempts
        self.ending = False
        self.under_way = 0
        self.idle = asyncio.Event()
        self.idle.set()
        self.took: deque[float] = deque(maxlen=32)

    def models(self) -> list[ModelInfo]:
        """The one that is served."""
        return [self.info]

    async def ready(self) -> None:
        """Raise NotReady unless every expert answers, and the finisher.

        They are asked directly: with the router the question would wait for a place.
        """
        self._check_open()
        calls = (part.ready.remote() for part in self.parts)
        try:
            await asyncio.wait_for(asyncio.gather(*calls), READY_SECONDS)
        except Exception as error:
            raise NotReady("not every expert has loaded; try again soon") from error

    async def upscale(self, request: Request) -> Events:
        """Progress, then the result; from the start again when the router died."""
        self._check_open()
        self.under_way += 1
        self.idle.clear()
        try:
            async with aclosing(self._attempts(request)) as events:
                async for event in events:
                    yield event
        finally:
            self.under_way -= 1
            if not self.under_way:
                self.idle.set()

    async def drain(self) -> None:
        """Take in no more, and return when what is under way has ended."""
        self.ending = True
        await self.idle.wait()

    def _check_open(self) -> None:
        if self.ending:
            raise NotReady("the endpoint is ending; ask another one, or later")

    async def _attempts(self, request: Request) -> Events:
        began = time.perf_counter()
        async for attempt in retry_policy(self.attempts):
            with attempt:
                again = attempt.retry_state.attempt_number > 1
                async with aclosing(self._events(request, again)) as events:
                    async for event in events:
                        if isinstance(event, Result):
                            result = event  # when the router has done all: then it is not given up
                        else:
                            yield event
        self.took.append(time.perf_counter() - began)
        yield result

    async def _events(self, request: Request, again: bool) -> Events:
        events = self.router.upscale.options(stream=True).remote(request)
        try:
            async for event in events:
                yield event
        except BackPressureError as error:
            if again:
                raise NoCapacity("no place to send it to again") from error
            took = median(self.took) if self.took else RETRY_AFTER_SECONDS
            raise Full(math.ceil(took)) from None
        except (ray.exceptions.RayError, RayServeException) as error:
            raise cause(error) from error
        except (GeneratorExit, asyncio.CancelledError):
            events.cancel()
            raise
