"""Build the Serve application: ingress, router, experts and finisher, bound to each other."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import LoggingConfig

from linearsr.distributed.compat import HEAD_RESOURCE
from linearsr.distributed.models import absolute, read_config
from linearsr.distributed.serve.config import ServeConfig, needs_finisher
from linearsr.distributed.serve.expert import Experts
from linearsr.distributed.serve.finisher import Finisher
from linearsr.distributed.serve.ingress import TOKEN, Ingress
from linearsr.distributed.serve.jobs import JobKeeper
from linearsr.distributed.serve.router import Router
from linearsr.errors import OptionError
from linearsr.web.api import digest
from linearsr.weights import expert_names

# The ingress answers pages, refusals and health checks while uploads wait.
INGRESS_REQUESTS = 1000


def build_app(config: ServeConfig | Mapping[str, Any]) -> Application:
    """Return the application of a config, or of the `args` of a Serve config file.

    Raises OptionError for a wrong field, and WeightsError if the model cannot be read.
    """
    if not isinstance(config, ServeConfig):
        config = ServeConfig.parse(**config)
    config = config.model_copy(update={"model": absolute(config.model)})
    model = read_config(config.model)
    names, deployments = expert_names(model), config.deployments(model)
    size = config.expert_cpus, config.expert_gpus
    workers = []
    for experts, count in deployments:
        name = names[experts[0]] if len(experts) == 1 else "experts"
        deployment = serve.deployment(Experts).options(
            name=name, **_options(config, *size), **_scaling(config, name, count)
        )
        workers.append(deployment.bind(config, experts))
    finisher = None
    if needs_finisher(model):
        deployment = serve.deployment(Finisher).options(**_options(config, *size))
        finisher = deployment.bind(config, config.device)
    groups = [experts for experts, _ in deployments]
    options = _options(config, config.router_cpus)
    options["max_ongoing_requests"] = config.max_ongoing_requests
    options["max_queued_requests"] = config.max_queued_requests
    deployment = serve.deployment(Router).options(**options, num_replicas=config.routers)
    router = deployment.bind(config, groups, workers, finisher)
    # A list of its own: Serve reads the router's arguments later.
    watched = [*workers, finisher] if finisher else workers
    token = digest(os.environ.get(TOKEN)) or config.token_sha256
    return _ingress(config).bind(
        config.limits,
        model,
        router,
        watched,
        _jobs(config, router),
        token,
        config.cors_origins,
        config.allowed_hosts,
    )


def _scaling(config: ServeConfig, name: str, replicas: int) -> dict[str, Any]:
    """Return the options of Serve for an expert's number of replicas."""
    if config.max_replicas is None:
        return {"num_replicas": replicas}
    if config.max_replicas < replicas:
        raise OptionError(
            f"max_replicas is {config.max_replicas}, but {name} starts with {replicas}; "
            "raise it, or lower replicas"
        )
    scaling = AutoscalingConfig(
        min_replicas=replicas,
        max_replicas=config.max_replicas,
        target_ongoing_requests=config.max_batch_size,
    )
    return {"autoscaling_config": scaling}


def _ingress(config: ServeConfig) -> serve.Deployment:
    options = _options(config, config.ingress_cpus)
    options["max_ongoing_requests"] = INGRESS_REQUESTS
    actor = options["ray_actor_options"]
    if config.ingress_node == "head":
        actor["resources"] = {HEAD_RESOURCE: 0.001}
    return serve.deployment(serve.ingress()(Ingress)).options(
        **options, num_replicas=config.ingresses
    )


def _jobs(config: ServeConfig, router: Application) -> Application | None:
    """Return the deployment that keeps jobs; None if there are to be none."""
    if not config.jobs.count:
        return None
    options = {**_options(config, 0), "max_surge_percent": 0}  # a folder has one keeper at a time
    options["max_ongoing_requests"] = INGRESS_REQUESTS
    if config.jobs_folder is None:
        options["ray_actor_options"]["resources"] = {HEAD_RESOURCE: 0.001}
    return (
        serve.deployment(JobKeeper).options(**options).bind(config.jobs, config.jobs_folder, router)
    )


def _options(config: ServeConfig, cpus: float, gpus: float = 0.0) -> dict[str, Any]:
    """Return the options that all deployments share."""
    # Tensors are mapped from shared memory and not copied: 47 instead of 128 ms for three calls
    # with 12 MB.
    environment = {"env_vars": {"RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1"}}
    return {
        "ray_actor_options": {"num_cpus": cpus, "num_gpus": gpus, "runtime_env": environment},
        # All requests of all routers may be at one expert.
        "max_ongoing_requests": 2 * config.max_ongoing_requests * config.routers,
        "max_surge_percent": config.max_surge_percent,
        # Frequent checks, so that a dead replica is replaced soon.
        "health_check_period_s": 2,
        # A replica that ends in a roll-out finishes its requests; none takes longer than this.
        "graceful_shutdown_timeout_s": config.limits.seconds,
        "logging_config": LoggingConfig(encoding="JSON"),
    }
