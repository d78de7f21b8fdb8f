"""What a cluster has, against what a job would reserve."""

from __future__ import annotations

import sys
from typing import NamedTuple

import ray
from ray.autoscaler.v2.sdk import get_cluster_status

from linearsr.errors import OptionError


class ResourceRequest(NamedTuple):
    """Logical CPUs and GPUs."""

    cpus: float
    gpus: float = 0.0


def check_feasible(
    who: str, all_of_it: ResourceRequest, one_process: ResourceRequest, advice: str
) -> None:
    """Raise OptionError, with the advice, for who would wait for ever for logical CPUs or GPUs:
    for more than the cluster has, or in one process for more than any node.

    On a cluster that grows by itself nobody is refused: Ray does not tell what it may become.
    """
    for kind, needs, part in zip(("CPU", "GPU"), all_of_it, one_process, strict=True):
        nodes = [n["Resources"].get(kind, 0.0) for n in ray.nodes() if n["Alive"]]
        if needs > sum(nodes):
            lacks = f"{who} needs {needs:g} {kind}, the cluster has {sum(nodes):g}"
        elif part > max(nodes, default=0.0):
            lacks = f"{who} needs {part:g} {kind} on one node, the largest has {max(nodes):g}"
        else:
            continue
        if not grows():
            raise OptionError(f"{lacks}: {advice}")
        print(f"{lacks}: waiting for it to grow (`ray status`)", file=sys.stderr, flush=True)


def grows() -> bool:
    """Whether an autoscaler of the second version is at work, as with `ray up` and KubeRay.

    It reports what it does under a number that rises; without one the number is 0.
    """
    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    return int(status.stats.autoscaler_version or 0) > 0


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
