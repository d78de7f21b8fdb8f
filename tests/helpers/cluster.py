"""A local Ray cluster: its start, its actors, its job server."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

import ray
from ray.cluster_utils import Cluster
from ray.job_submission import JobStatus, JobSubmissionClient
from ray.util.state import list_actors

from tests.helpers.processes import free_port, until

ROOT = Path(__file__).parents[2]


def start_cluster(cpus: int = 4) -> Cluster:
    """Start a cluster that is not reachable from outside. Ray would replace the address 127.0.0.1.

    The ports are chosen here, since others may run Ray on the same machine, and Ray gives its
    processes only 15 s to choose theirs, which is too short on a busy machine. CPUs are logical.
    """
    ports = (
        "dashboard_port",
        "dashboard_agent_listen_port",
        "metrics_agent_port",
        "metrics_export_port",
        "runtime_env_agent_port",
    )
    node = {
        "num_cpus": cpus,
        "object_store_memory": 200 * 2**20,
        "node_ip_address": "127.0.0.2",
        "include_dashboard": True,
        "dashboard_host": "127.0.0.1",
        **{port: free_port() for port in ports},
    }
    return Cluster(initialize_head=True, head_node_args=node)


def living_actors(class_name: str) -> list[int]:
    """Return the process ids of the living actors of this class.

    The address is given because Ray would otherwise ask the latest cluster on this machine.
    """
    filters = [("state", "=", "ALIVE"), ("class_name", "=", class_name)]
    alive = list_actors(ray.get_runtime_context().gcs_address, filters=filters, detail=True)
    return [actor.pid for actor in alive]


class Jobs:
    """The cluster's job server, as `ray job submit --working-dir .` uses it."""

    def __init__(self, address: str) -> None:
        self.client = JobSubmissionClient(address)

    def submit(self, command: list[str], environment: Mapping[str, str] | None = None) -> str:
        runtime = {"working_dir": str(ROOT), "env_vars": dict(environment or {})}
        return self.client.submit_job(entrypoint=shlex.join(command), runtime_env=runtime)

    def has_ended(self, job: str) -> bool:
        return bool(self.client.get_job_status(job).is_terminal())

    def end(self, job: str) -> tuple[JobStatus, int | None, str]:
        """Wait until a job has ended; return its status, exit code and output."""
        until(lambda: self.has_ended(job), job, 600, pause=0.5)
        info = self.client.get_job_info(job)
        return info.status, info.driver_exit_code, self.client.get_job_logs(job)
