"""The configuration of an endpoint, and how many replicas follow from it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, field_validator, model_validator

from linearsr.config import Acceleration, Config, ModelConfig
from linearsr.diffusion.experts import plan, shares
from linearsr.diffusion.schedule import schedule
from linearsr.distributed.resources import ResourceRequest
from linearsr.errors import OptionError
from linearsr.tags.base import TaggerConfig
from linearsr.web.service import JobLimits, Limits


class ServeConfig(Config):
    """One model behind one endpoint. CPUs are Ray's logical CPUs: reservations, not limits.

    A field that is passed on to Ray Serve has the name that it has there.
    """

    model: str = "linearsr-tiny"
    """The name of a bundled model, or a folder of weights that every node can read (s3:// too)."""
    tagger: TaggerConfig = TaggerConfig()
    """The tagger of requests with tags "auto", on the CPU of each router. Every node must be able
    to read its files. Choose the one whose tags the model was trained on."""
    device: str = "auto"
    """The device of the experts; "auto" is the GPU that a replica has reserved, or else the CPU."""
    acceleration: Acceleration = Acceleration()
    """Ways to run the experts and the decoder faster on GPUs, which they must reserve."""
    layout: Literal["split", "together"] = "split"
    """"split" gives each expert a deployment of its own; "together" loads all experts into every
    replica."""
    replicas: int | tuple[int, ...] = 4
    """The number of replicas of all experts together, divided among them in proportion to their
    steps (D'Hondt), at least one each; or one number per expert, highest noise first."""
    max_replicas: int | None = Field(default=None, ge=1)
    """The upper limit for autoscaling: each expert's deployment grows from its share of `replicas`
    up to this number, by its own load. None switches autoscaling off."""
    expert_cpus: float = Field(default=1.0, gt=0)
    """Logical CPUs, and threads, of each replica of an expert."""
    expert_gpus: float = Field(default=0.0, ge=0)
    """GPUs of each replica of an expert; with 0.25, four replicas share one GPU."""
    max_batch_size: int = Field(default=8, ge=1)
    """The largest number of requests that an expert takes in one batch."""
    batch_wait_timeout_s: float = Field(default=0.0, ge=0)
    """Seconds that a request waits for others to fill its batch. Requests that arrive while the
    expert is busy share the next batch even with 0."""
    ingresses: int = Field(default=1, ge=1)
    """The number of replicas that answer HTTP. With `proxy_location: EveryNode`, Serve accepts
    requests on each node."""
    ingress_node: Literal["any", "head"] = "any"
    """The node of the ingress. When a node is lost, so are the requests that its ingress holds. On
    the head, an ingress lives as long as the cluster, and reserves no CPU."""
    routers: int = Field(default=1, ge=1)
    """The number of replicas that decode, plan, route and encode."""
    router_cpus: float = Field(default=1.0, gt=0)
    """Logical CPUs of each router; an ingress reserves 0.1."""
    max_ongoing_requests: int = Field(default=16, ge=1)
    """The number of requests that each router works on at the same time."""
    max_queued_requests: int = Field(default=16, ge=0)
    """The number of requests that may wait at each ingress; further ones are refused with 429."""
    max_surge_percent: int = Field(default=0, ge=0, le=100)
    """The percentage of replicas that may start beside the ones they replace in a roll-out, if the
    cluster has room for both. With 0, old replicas end first, a fifth of them at a time."""
    router_memory: int | None = Field(default=None, ge=1)
    """Memory in bytes that the requests of one router may need together; others wait. None for
    70% of the memory that is free when the router starts, divided by the number of routers."""
    limits: Limits = Limits()
    """The limits of one request."""
    jobs: JobLimits = JobLimits()
    """The limits of jobs, which are requests whose clients do not wait."""
    jobs_folder: str | None = None
    """The folder in which jobs are kept, if all nodes share one. None for a folder of Ray's session
    on the head node."""
    token_sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """The SHA-256 digest, in hexadecimal, of the bearer token that uploads need. LINEARSR_TOKEN in
    the environment of whoever deploys comes first; without both, that of the ingress counts."""
    cors_origins: tuple[str, ...] = ()
    """The other origins, such as "https://example.org", whose pages may use the endpoint from a
    browser; "*" for all of them."""
    allowed_hosts: tuple[str, ...] = ()
    """The names of the endpoint that the Host header may have, such as "example.org", without a
    port; empty or "*" for any. `linearsr serve` on loopback adds the names of loopback."""

    @model_validator(mode="after")
    def _check_replicas(self) -> ServeConfig:
        counts = (self.replicas,) if isinstance(self.replicas, int) else self.replicas
        if not counts or min(counts) < 1:
            raise ValueError("replicas must be at least 1")
        if self.layout == "together" and not isinstance(self.replicas, int):
            raise ValueError('replicas must be one number in the layout "together"')
        return self

    @model_validator(mode="after")
    def _check_acceleration(self) -> ServeConfig:
        names = self.acceleration.model_dump(exclude_defaults=True)
        if names and not self.expert_gpus:
            raise ValueError(f"{', '.join(names)}: only for GPUs; set expert_gpus too")
        return self

    @field_validator("jobs_folder")
    @classmethod
    def _check_jobs_folder(cls, folder: str | None) -> str | None:
        if folder and "://" in folder:
            raise ValueError(f"{folder!r} is no folder that all nodes share; s3:// is not possible")
        return folder

    @field_validator("allowed_hosts")
    @classmethod
    def _check_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if re.search(r"[/@\s]|^[^:]*:[^:]*$|\]:", host):
                raise ValueError(f"{host!r} is no host name: leave out the scheme and the port")
        return tuple(host.lower().strip("[]") for host in hosts)

    @property
    def ingress_cpus(self) -> float:
        """Logical CPUs of an ingress; 0 on the head, which often has none to reserve."""
        return 0.1 if self.ingress_node == "any" else 0

    def resources(self, model: ModelConfig) -> ResourceRequest:
        """Return the logical CPUs and GPUs that all replicas reserve when the endpoint starts."""
        replicas = sum(count for _, count in self.deployments(model)) + needs_finisher(model)
        cpus = replicas * self.expert_cpus + self.routers * self.router_cpus
        cpus += self.ingresses * self.ingress_cpus
        return ResourceRequest(cpus, replicas * self.expert_gpus)

    def deployments(self, model: ModelConfig) -> list[tuple[tuple[int, ...], int]]:
        """Return each deployment's experts, and the number of replicas that it starts with.

        Raises OptionError unless `replicas` is one number, or one for each expert.
        """
        experts = range(len(model.sampling.boundaries) + 1)
        if self.layout == "together":
            assert isinstance(self.replicas, int)
            return [(tuple(experts), self.replicas)]
        counts = self.replicas
        if isinstance(counts, int):
            counts = divide_replicas(counts, default_steps(model))
        if len(counts) != len(experts):
            raise OptionError(
                f"replicas: {model.name} has {len(experts)} experts, but there are {len(counts)} "
                "numbers; give one per expert, or a single one for all"
            )
        return [((expert,), count) for expert, count in zip(experts, counts, strict=True)]


def needs_finisher(model: ModelConfig) -> bool:
    """Return whether decoding takes a model (DC-AE), which then has a deployment of its own."""
    return model.latent.kind != "space-to-depth"


def default_steps(model: ModelConfig) -> list[int]:
    """Return the number of steps that each expert takes in a request with default options."""
    timesteps = schedule(model.sampling)
    segments = plan(timesteps[:-1], model.sampling.boundaries)
    return shares(segments, len(model.sampling.boundaries) + 1)


def divide_replicas(total: int, weights: Sequence[int]) -> tuple[int, ...]:
    """Divide `total` replicas in proportion to `weights`, at least one each.

    This is D'Hondt's method: moving a replica would not lower the highest load per replica.
    """
    counts = [1] * len(weights)
    for _ in range(total - len(weights)):
        load = [weight / count for weight, count in zip(weights, counts, strict=True)]
        counts[load.index(max(load))] += 1
    return tuple(counts)
