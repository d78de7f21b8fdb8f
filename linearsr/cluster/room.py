"""What a cluster has, against what a job would reserve."""

from __future__ import annotations

import sys

import ray
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator
from ray.data._internal.execution.autoscaling_requester import (
    get_or_create_autoscaling_requester_actor,
)
from ray.data._internal.execution.node_trackers.actor_location import (
    get_or_create_actor_location_tracker,
)
from ray.data._internal.stats import get_or_create_stats_actor
from ray.data._internal.usage.actor import get_or_create_usage_collection_actor

from linearsr.errors import OptionError


def check_room(who: str, cpus: float, gpus: float, advice: str) -> None:
    """Raise OptionError, with the advice, for who would wait for ever for logical CPUs or GPUs.

    On a cluster that grows by itself nobody is refused: Ray does not tell what it may become.
    """
    for kind, amount in {"CPU": cpus, "GPU": gpus}.items():
        has = ray.cluster_resources().get(kind, 0.0)
        if amount <= has:
            continue
        lacks = f"{who} needs {amount:g} {kind}, the cluster has {has:g}"
        if not grows():
            raise OptionError(f"{lacks}: {advice}")
        print(f"{lacks}: waiting for it to grow (`ray status`)", file=sys.stderr, flush=True)


def grows() -> bool:
    """Whether an autoscaler adds nodes: those of `ray up` and KubeRay, the second version."""
    return bool(is_autoscaler_v2(fetch_from_server=True))


def places(cpus: float, gpus: float, most: int) -> int:
    """How many of what takes so many logical CPUs and GPUs fit on the cluster at once, 1 to `most`.

    All, on a cluster that grows.
    """
    if grows():
        return most
    has = ray.cluster_resources()
    by_cpu = has.get("CPU", 0.0) / cpus
    room = min(by_cpu, has.get("GPU", 0.0) / gpus) if gpus else by_cpu
    return max(1, min(most, int(room)))


# What Ray Data has one of for all jobs of a cluster, bound to the node of who first asked for it.
DATA_ACTORS = (
    get_or_create_autoscaling_coordinator,
    get_or_create_autoscaling_requester_actor,
    get_or_create_actor_location_tracker,
    get_or_create_stats_actor,
    get_or_create_usage_collection_actor,
)


def keep_data_actors_here() -> None:
    """Have Ray Data's own actors on this node, a driver's, before a worker's data ask for them.

    They never leave their node: on a worker's they would be lost with it, and with them every
    dataset job from then on.
    """
    for get_or_create in DATA_ACTORS:
        get_or_create()
