"""What a fleet is told, and how many replicas follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from linearsr.config import Config, ModelConfig
from linearsr.diffusion.experts import plan, shares
from linearsr.diffusion.schedule import schedule
from linearsr.errors import OptionError
from linearsr.web.service import Limits

INGRESS_CPUS = 0.1


class ServeConfig(Config):
    """One model behind one endpoint. CPUs are Ray's logical ones: reservations, not limits."""

    model: str = "linearsr-tiny"
    """A bundled model's name, or a folder that all nodes see; s3:// too."""
    device: str = "auto"
    """Where experts run; "auto" is the GPU that a replica has reserved, else the CPU."""
    layout: Literal["split", "together"] = "split"
    """A deployment for each expert, or all experts in every replica."""
    replicas: int | tuple[int, ...] = 4
    """Of all experts, shared out by their steps (D'Hondt), at least one each; or a list of how many
    of each, highest noise first."""
    most_replicas: int | None = Field(default=None, ge=1)
    """From its share up to this many, each deployment scales by its own requests."""
    expert_cpus: float = Field(default=1.0, gt=0)
    """Logical CPUs, and threads, of each replica of an expert."""
    expert_gpus: float = Field(default=0.0, ge=0)
    """GPUs of each replica of an expert; 0.25 puts four on one GPU."""
    batch: int = Field(default=8, ge=1)
    """Works of one shape that an expert takes together."""
    batch_wait: float = Field(default=0.0, ge=0)
    """Seconds that a work waits for others to join it; those that come while the expert is busy
    wait for it anyway."""
    ingresses: int = Field(default=1, ge=1)
    """Replicas that speak HTTP; with `proxy_location: EveryNode` each node takes requests in."""
    ingress_node: Literal["any", "head"] = "any"
    """Where they run. What an ingress has in hand is lost with its node: on the head it lives as
    long as the proxy and the cluster itself, and reserves nothing."""
    routers: int = Field(default=1, ge=1)
    """Replicas that read, plan, send and write."""
    router_cpus: float = Field(default=1.0, gt=0)
    """Logical CPUs of each router; an ingress reserves 0.1."""
    places: int = Field(default=16, ge=1)
    """Requests that each router works on at once."""
    waiting: int = Field(default=16, ge=0)
    """How many more may wait at each ingress; the rest is refused with 429."""
    attempts: int = Field(default=5, ge=1)
    """Tries in all of a request whose replicas die."""
    surge: int = Field(default=0, ge=0, le=100)
    """Replicas, in percent, that may start beside those they replace, where there is room for both;
    with 0 the old ones end first, a fifth at a time."""
    limits: Limits = Limits()
    """What one request may ask for."""

    @model_validator(mode="after")
    def _replicas_fit(self) -> ServeConfig:
        counts = (self.replicas,) if isinstance(self.replicas, int) else self.replicas
        if not counts or min(counts) < 1:
            raise ValueError("replicas must be at least 1")
        if self.layout == "together" and not isinstance(self.replicas, int):
            raise ValueError('replicas of the layout "together" are one number')
        return self

    def reserved(self, model: ModelConfig) -> tuple[float, float]:
        """Logical CPUs and GPUs that it all takes to start."""
        replicas = sum(count for _, count in self.groups(model)) + learned(model)
        cpus = replicas * self.expert_cpus + self.routers * self.router_cpus
        cpus += self.ingresses * self.ingress_cpus
        return cpus, replicas * self.expert_gpus

    @property
    def ingress_cpus(self) -> float:
        """Logical CPUs of an ingress; a head often has none to reserve."""
        return INGRESS_CPUS if self.ingress_node == "any" else 0

    def groups(self, model: ModelConfig) -> list[tuple[tuple[int, ...], int]]:
        """Which experts share a deployment, and how many replicas it starts with.

        Raises OptionError for counts that are not one for each expert.
        """
        experts = range(len(model.sampling.boundaries) + 1)
        if self.layout == "together":
            assert isinstance(self.replicas, int)
            return [(tuple(experts), self.replicas)]
        counts = self.replicas
        if isinstance(counts, int):
            counts = shared_out(counts, steps_of(model))
        if len(counts) != len(experts):
            raise OptionError(
                f"replicas: {model.name} has {len(experts)} experts, got {len(counts)} counts"
            )
        return [((expert,), count) for expert, count in zip(experts, counts, strict=True)]


def learned(model: ModelConfig) -> bool:
    """Whether its latent takes a model to decode, which then has a deployment of its own."""
    return model.latent.kind != "space-to-depth"


def steps_of(model: ModelConfig) -> list[int]:
    """The steps that each expert takes by default."""
    timesteps = schedule(model.sampling)
    segments = plan(timesteps[:-1], model.sampling.boundaries)
    return shares(segments, len(model.sampling.boundaries) + 1)


def shared_out(total: int, weights: Sequence[int]) -> tuple[int, ...]:
    """`total` places shared out by weight, at least one each: to whom most is due, one by one.

    This is D'Hondt's method: no move of one place would lower the highest load per place.
    """
    counts = [1] * len(weights)
    for _ in range(total - len(weights)):
        due = [weight / count for weight, count in zip(weights, counts, strict=True)]
        counts[due.index(max(due))] += 1
    return tuple(counts)
