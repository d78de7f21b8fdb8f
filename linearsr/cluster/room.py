"""What a cluster has, against what a job would reserve."""

from __future__ import annotations

import ray

from linearsr.errors import OptionError


def check_room(who: str, cpus: float, gpus: float, advice: str) -> None:
    """Raise OptionError, with the advice, for who would wait for ever for logical CPUs or GPUs."""
    has = ray.cluster_resources()
    for kind, amount in {"CPU": cpus, "GPU": gpus}.items():
        if amount > has.get(kind, 0.0):
            raise OptionError(
                f"{who} needs {amount:g} {kind}, the cluster has {has.get(kind, 0.0):g}: {advice}"
            )
