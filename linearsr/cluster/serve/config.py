"""What a fleet is told, and how many replicas follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from linearsr.config import Config, ModelConfig
from linearsr.errors import OptionError
from linearsr.noise.experts import plan, shares
from linearsr.noise.sampler import schedule
from linearsr.web.service import Limits

INGRESS_CPUS = 0.1


class ServeConfig(Config):
    """One model behind one endpoint.

    layout: "split" gives each expert a deployment of its own, "together" puts all of them into
    every replica. replicas: of all experts, shared out by the steps that each takes by default;
    or how many of each expert, highest noise first. most_replicas: with it, each deployment scales
    by its own load from its share up to this many. CPUs are Ray's logical ones; one GPU may be
    shared by several replicas (expert_gpus=0.25).

    places: requests that are worked on at once, by each router; `waiting` more may wait at each
    ingress, and the rest is refused with 429. batch: works of one shape that an expert takes
    together.
    """

    model: str = "linearsr-tiny"
    device: str = "auto"
    layout: Literal["split", "together"] = "split"
    replicas: int | tuple[int, ...] = 4
    most_replicas: int | None = Field(default=None, ge=1)
    expert_cpus: float = Field(default=1.0, gt=0)
    expert_gpus: float = Field(default=0.0, ge=0)
    batch: int = Field(default=8, ge=1)
    # How long a work waits for others to join it. Those that come while the expert is busy wait
    # for it anyway.
    batch_wait: float = Field(default=0.0, ge=0)
    ingresses: int = Field(default=1, ge=1)
    # What an ingress has in hand is lost with its node: on the head it lives as long as the proxy
    # and the cluster itself.
    ingress_node: Literal["any", "head"] = "any"
    routers: int = Field(default=1, ge=1)
    router_cpus: float = Field(default=1.0, gt=0)
    places: int = Field(default=16, ge=1)
    waiting: int = Field(default=16, ge=0)
    # In all, of a request whose replicas die.
    attempts: int = Field(default=5, ge=1)
    # Replicas that may start beside those they replace, in percent: it takes as much room, without
    # which the old ones go on. With 0 the old ones end first, a fifth at a time.
    surge: int = Field(default=0, ge=0, le=100)
    limits: Limits = Limits()

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
    timesteps = schedule(model.sampling.steps, model.sampling.flow_shift)
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
