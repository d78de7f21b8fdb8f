"""The resources of a cluster, and whether a request for them can ever be met."""

from __future__ import annotations

import sys
from typing import NamedTuple

import ray

from linearsr.distributed.compat import autoscaler_version
from linearsr.errors import OptionError


class ResourceRequest(NamedTuple):
    """Logical CPUs and GPUs."""

    cpus: float
    gpus: float = 0.0


def check_feasible(
    name: str, total: ResourceRequest, process: ResourceRequest, advice: str
) -> None:
    """Raise OptionError, which gives `advice`, if the request `name` can never be scheduled.

    This is the case if `total` exceeds what the cluster has, or `process`, the largest process,
    what every node has. On a cluster that autoscales nothing is refused, since Ray does not tell
    how large it may become: a line on stderr says what is waited for.
    """
    for kind, needed, largest in zip(("CPU", "GPU"), total, process, strict=True):
        nodes = [n["Resources"].get(kind, 0.0) for n in ray.nodes() if n["Alive"]]
        if needed > sum(nodes):
            problem = f"{name} needs {needed:g} {kind}, the cluster has {sum(nodes):g}"
        elif largest > max(nodes, default=0.0):
            problem = f"{name} needs {largest:g} {kind} on one node, the largest has {max(nodes):g}"
        else:
            continue
        if not autoscales():
            raise OptionError(f"{problem}: {advice}")
        print(f"{problem}: waiting for new nodes (`ray status`)", file=sys.stderr, flush=True)


def autoscales() -> bool:
    """Return whether an autoscaler is at work, as with `ray up` and KubeRay."""
    return autoscaler_version() > 0


def capacity(cpus: float, gpus: float, limit: int) -> int:
    """Return how many processes of `cpus` and `gpus` logical units the cluster can hold at once.

    At least 1 and at most `limit`, which is also the answer for a cluster that autoscales.
    """
    if autoscales():
        return limit
    resources = ray.cluster_resources()
    by_cpu = resources.get("CPU", 0.0) / cpus
    fit = min(by_cpu, resources.get("GPU", 0.0) / gpus) if gpus else by_cpu
    return max(1, min(limit, int(fit)))
