"""The cluster of cluster.yaml on this machine: its node types and autoscaler, and an S3 server.

A node of cluster.yaml becomes a raylet of a few logical CPUs. The head runs no tasks here either,
and there is no other node until a job needs one.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import boto3  # type: ignore[import-untyped]
import psutil
import requests
import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
)
from ray.autoscaler._private.util import fillout_defaults

from tools import s3_server as swift

CLUSTER = Path(__file__).parents[2] / "cluster.yaml"
# Ray would replace 127.0.0.1 by an address that can be reached from outside.
HEAD = "127.0.0.2"
STARTS_WITHIN, STOPS_WITHIN = 180.0, 60.0
NODE = {"CPU": 4, "object_store_memory": 300 * 2**20}
MOST_NODES = 3
COMMANDS = (
    *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands"),
)


class Target(NamedTuple):
    """A cluster to rehearse on: its job server, its HTTP endpoint, and a folder on S3 for results.

    s3_port: port of the S3 server on this machine, 0 for a real cluster.
    """

    dashboard: str
    endpoint: str
    storage: str
    s3_port: int = 0


@contextlib.contextmanager
def machine(log: Path) -> Iterator[Target]:
    """Run the cluster and the S3 server until the end of the block; Ray's output goes to `log`.

    Ray's ports can be reached from outside, so the cluster has a token of its own, unless
    RAY_AUTH_MODE says otherwise. RAY_AUTH_* and AWS_* of this process are set for it.
    Raises RuntimeError if Ray does not start, and SwiftError if the S3 server does not.
    """
    folder = Path(tempfile.mkdtemp(prefix="lsr-"))  # a short path, for it holds sockets
    port = swift.free_port()
    os.environ.update(swift.environment(port))
    if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token":
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    try:
        with swift.running(folder / "s3", port), _ray(folder, log) as dashboard:
            boto3.client("s3").create_bucket(Bucket="rehearsal")
            yield Target(dashboard, f"http://127.0.0.1:{swift.free_port()}", "s3://rehearsal", port)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def scaled_down(cluster: dict[str, Any], gcs: str, folder: Path) -> dict[str, Any]:
    """Return the cluster launcher's config for raylets of this machine.

    gcs: address of the head. folder: parent of the raylets' own folders.
    """
    types = {
        name: {
            "resources": NODE,
            "node_config": {},
            "min_workers": 0,
            "max_workers": min(MOST_NODES, kind["max_workers"]),
        }
        for name, kind in cluster["available_node_types"].items()
        if name != cluster["head_node_type"]
    }
    types[FAKE_HEAD_NODE_TYPE] = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    return {
        **fillout_defaults(cluster),
        # Commands and files are for machines that start; raylets need none.
        **{name: [] for name in COMMANDS},
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        "max_workers": MOST_NODES,
        "provider": {
            "type": "external",
            "module": "tools.rehearsal.raylets.Raylets",
            "folder": str(folder),
            "head_node_id": FAKE_HEAD_NODE_ID,
            "gcs_address": gcs,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": types,
        "head_node_type": FAKE_HEAD_NODE_TYPE,
    }


@contextlib.contextmanager
def _ray(folder: Path, log: Path) -> Iterator[str]:
    """Run a head with an autoscaler, and yield the dashboard's address."""
    gcs, dashboard = swift.free_port(), swift.free_port()
    config = folder / "cluster.json"
    cluster = yaml.safe_load(CLUSTER.read_text())
    config.write_text(json.dumps(scaled_down(cluster, f"{HEAD}:{gcs}", folder)))
    command = [
        *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"),
        *(f"--autoscaling-config={config}", "--num-cpus=0", "--num-gpus=0"),
        *(f"--node-ip-address={HEAD}", f"--port={gcs}", "--dashboard-host=127.0.0.1"),
        *(f"--dashboard-port={dashboard}", f"--temp-dir={folder / 'ray'}"),
        *(f"--object-store-memory={NODE['object_store_memory']}", "--disable-usage-stats"),
        *(f"--{name}-port={swift.free_port()}" for name in ("metrics-export", "runtime-env-agent")),
        *(f"--dashboard-agent-{name}-port={swift.free_port()}" for name in ("listen", "grpc")),
    ]
    with open(log, "wb") as output:
        head = subprocess.Popen(
            ["sh", "-c", swift.GUARD, "sh", *command],
            env={**os.environ, **_environment()},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        _wait(address, head, log)
        yield address
    finally:
        _end(head)


def _environment() -> dict[str, str]:
    return {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(CLUSTER.parent),
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        # When the rehearsal is over, nothing waits for tasks that still run.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }


def _wait(address: str, head: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + STARTS_WITHIN
    while not _answers(f"{address}/api/version"):
        if time.monotonic() > deadline or head.poll() is not None:
            raise RuntimeError(f"Ray did not start: {log.read_text()[-2000:]}")
        time.sleep(0.2)


def _answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).status_code < 500  # without the token it refuses
    except requests.RequestException:
        return False


def _end(head: subprocess.Popen[bytes]) -> None:
    """End the head and the nodes that its autoscaler started, down to the last worker."""
    everything = []
    with contextlib.suppress(psutil.NoSuchProcess):  # it may not have started
        everything = psutil.Process(head.pid).children(recursive=True)
    head.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        head.wait(STOPS_WITHIN)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(head.pid, signal.SIGKILL)
    for process in everything:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(everything, timeout=STOPS_WITHIN)
    head.wait()
    assert head.stdin is not None
    head.stdin.close()
