"""Ray Data's own actors: one of each for all jobs of a cluster."""

from __future__ import annotations

from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator
from ray.data._internal.execution.node_trackers.actor_location import (
    get_or_create_actor_location_tracker,
)
from ray.data._internal.stats import get_or_create_stats_actor
from ray.data._internal.usage.actor import get_or_create_usage_collection_actor

DATA_ACTORS = (
    get_or_create_autoscaling_coordinator,
    get_or_create_actor_location_tracker,
    get_or_create_stats_actor,
    get_or_create_usage_collection_actor,
)


def keep_data_actors_here() -> None:
    """Have them on this node, a driver's, before a worker's data ask for them.

    Each is bound to the node of who first asked for it: on a worker's it would be lost with that
    node, and with it every dataset job from then on.
    """
    for get_or_create in DATA_ACTORS:
        get_or_create()
