"""Every private or unstable API of Ray that this package uses: what for, and what would replace it.

Checked with Ray 2.60. Each function imports what it needs, so that training loads nothing of Serve.
"""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import Any

import ray

# The resource that only the head node has. Ray Serve schedules by it, but no public constant names
# it. Replace it by a label selector, once the head has a documented label.
HEAD_RESOURCE = "node:__internal_head__"
# The namespace of notes; see `put_note`.
NOTES = "linearsr"


def keep_data_actors_here() -> None:
    """Start Ray Data's singleton actors on this node, the driver's.

    Ray Data binds each of them to the node that first asks for it. Training asks from its workers,
    so without this call an actor would be lost with a worker's node, and with it the data of every
    later run. Remove this once Ray Data places them on the head by itself.
    """
    from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator
    from ray.data._internal.execution.node_trackers.actor_location import (
        get_or_create_actor_location_tracker,
    )
    from ray.data._internal.stats import get_or_create_stats_actor
    from ray.data._internal.usage.actor import get_or_create_usage_collection_actor

    for get_or_create in (
        get_or_create_autoscaling_coordinator,
        get_or_create_actor_location_tracker,
        get_or_create_stats_actor,
        get_or_create_usage_collection_actor,
    ):
        get_or_create()


def autoscaler_version() -> int:
    """Return the version of the cluster's state that its autoscaler has reported last.

    It rises with each report, and is 0 if no autoscaler is at work. Nothing public says whether a
    cluster autoscales, and a pool that is too large for a fixed cluster must be refused rather than
    wait for ever. The SDK of Ray's autoscaler v2 is not documented. Replace it by `ray.util.state`
    once that lists the autoscaler's state.
    """
    from ray.autoscaler.v2.sdk import get_cluster_status

    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    return int(status.stats.autoscaler_version or 0)


def quiet_checkpoint_manager() -> None:
    """Silence the line that announces a resumed run whenever `Result.from_path` reads one.

    The logger has the name of a private module of Ray. Remove this once `Result.from_path` no
    longer logs.
    """
    from ray.train.v2._internal.execution.checkpoint import checkpoint_manager

    logging.getLogger(checkpoint_manager.__name__).setLevel(logging.WARNING)


def serve_client(address: str) -> Any:
    """Return a client for the REST API of Ray Serve at the dashboard's address.

    The REST API is documented, its Python client is not. Plain HTTP requests could replace it.
    """
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    return ServeSubmissionClient(address)


def delete_application(name: str, *, wait: bool) -> None:
    """Delete a Serve application; without `wait`, return before its replicas have stopped.

    `_blocking` is not documented. Replace it once `serve.delete` has a public parameter for this.
    """
    from ray import serve

    serve.delete(name, _blocking=wait)


def progress_bar(description: str, total: int, unit: str) -> Any:
    """Return a tqdm bar that the driver draws once, however many workers have one.

    `ray.experimental` may change. Replace it by `ray.train`'s own progress, once it has one.
    """
    from ray.experimental import tqdm_ray

    return tqdm_ray.tqdm(desc=description, total=total, unit=unit)


def http_address() -> tuple[str, int]:
    """Return the host and port of the HTTP proxies of the Ray Serve that this process uses.

    This reads a private object of Serve: the only public source is the dashboard's REST API, and
    `linearsr serve` starts no dashboard. Replace it by `serve.status` once that has host and port.
    """
    from ray.serve.context import _get_global_client

    http = _get_global_client().http_config
    return http.host, http.port


def use_http_parser(protocol: type[asyncio.Protocol]) -> None:
    """Let the HTTP proxy of Serve in this process parse requests with this uvicorn protocol.

    Serve calls uvicorn without a parser, and uvicorn's choice limits no headers. Replace it once
    `HTTPOptions` has a parser or a limit.
    """
    from uvicorn.protocols.http import auto

    auto.AutoHTTPProtocol = protocol


def ask_for_token() -> None:
    """Let a cluster that this process starts ask for Ray's token, whatever RAY_AUTH_MODE said.

    The variable alone has no effect once Ray is imported. Replace it once `ray.init` has a
    parameter for it.
    """
    from ray._private.authentication.authentication_token_setup import _enable_token_auth

    _enable_token_auth()


def cluster_to_join() -> str | None:
    """Return the address of RAY_ADDRESS, or of the cluster of `ray start` here; None for neither.

    `ray.init` does the same before it starts a cluster, but cannot be asked what it would do; with
    "auto" it would also join the private clusters of other programs.
    """
    from ray._private.services import get_ray_address_from_environment

    address: str | None = get_ray_address_from_environment(None, None)
    return address


def listen_on_loopback() -> None:
    """Let all processes of a cluster that this process starts listen on loopback alone.

    Ray has this for Windows and macOS, where it keeps the firewall silent. On Linux, the address
    that is given to `ray.init` has no effect on most ports. The variable is for the cluster's
    processes, and the constant for this one, which has read it already. Replace it once `ray.init`
    can bind to an address.
    """
    from ray._private import ray_constants

    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False


def session_folder() -> Path:
    """Return the folder of Ray's session on this node, which Ray deletes neither soon nor itself.

    Only the dashboard and the logs name it. Replace it once the runtime context has it.
    """
    from ray._private.worker import global_worker

    return Path(global_worker.node.get_session_dir_path())


def application_ends(name: str) -> bool:
    """Return whether a Serve application is being deleted, or is gone; for its own replicas.

    `serve.status` is public, but its client in a replica is not documented to outlive the
    application, so every failure counts as its end.
    """
    from ray import serve
    from ray.serve.schema import ApplicationStatus

    try:
        application = serve.status().applications.get(name)
    except Exception:
        return True
    return application is None or application.status == ApplicationStatus.DELETING


def put_note(key: str, value: str) -> None:
    """Write a short note that every process of the cluster can read.

    It lies in the key-value store of Ray's head, whose client is not documented. Replace it once
    Serve lets a call report its progress beside its result.
    """
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(key, value.encode(), overwrite=True, namespace=NOTES)


def read_note(key: str) -> str | None:
    """Return a note, or None if there is none; see `put_note`."""
    from ray.experimental.internal_kv import _internal_kv_get

    value = _internal_kv_get(key, namespace=NOTES)
    return None if value is None else value.decode()


def delete_note(key: str) -> None:
    """Delete a note; see `put_note`."""
    from ray.experimental.internal_kv import _internal_kv_del

    _internal_kv_del(key, namespace=NOTES)
