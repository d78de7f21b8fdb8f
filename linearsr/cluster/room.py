"""What a cluster has, against what a job would reserve."""

from __future__ import annotations

import sys

import ray
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator

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


def coordinate_from_here() -> None:
    """Have Ray Data's coordinator on this node: a driver's, before any worker's own data need one.

    There is one for all jobs. It stays bound to the node of who asked first, and when that node is
    lost, it and every job that asks for it fail.
    """
    get_or_create_autoscaling_coordinator()
