"""The cluster of the rehearsal, whose machines can be lost."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import psutil
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.job_submission import JobStatus
from ray.util.state import list_actors, list_nodes

from tests.helpers.cluster import Jobs
from tests.helpers.processes import until
from tools.rehearsal.machine import Target


class Fleet(NamedTuple):
    """The cluster: its users start jobs, and its machines can be lost."""

    place: Target
    jobs: Jobs

    def start(self, command: str, environment: Mapping[str, str] | None = None) -> str:
        """Start a command as a job; return its id."""
        return self.jobs.submit(["python", *shlex.split(command)], environment)

    def end(self, job: str) -> str:
        """Wait until a job has succeeded; return its output."""
        status, _, output = self.jobs.end(job)
        assert status == JobStatus.SUCCEEDED, output
        return output

    def settle(self) -> None:
        """Wait until Ray knows which machines are gone, and Serve has put everything on others."""
        until(lambda: not self.gone(), "news of the nodes that are gone")
        serve = ServeSubmissionClient(self.place.dashboard)
        until(lambda: all_well(serve.get_serve_details()), "healthy deployments")

    def gone(self) -> set[str]:
        """Return the nodes that Ray thinks are alive although their raylet has gone."""
        nodes = list_nodes(address=self.place.dashboard, limit=1000)
        alive = {node.node_id for node in nodes if node.state == "ALIVE"}
        return {node for node in alive if not any(is_raylet(p, {node}) for p in processes())}

    def nodes_of(self, actor: str) -> set[str]:
        """Return the nodes of the actors whose class name contains this."""
        alive = list_actors(
            address=self.place.dashboard, filters=[("state", "=", "ALIVE")], limit=1000
        )
        return {a.node_id for a in alive if actor in a.class_name}

    def lose_node_of(self, actor: str) -> None:
        """Kill all processes of a machine that runs such actors."""
        until(lambda: bool(self.nodes_of(actor)), f"an actor of {actor}")
        nodes = self.nodes_of(actor)
        raylet = next(p for p in processes() if is_raylet(p, nodes))
        everything = [raylet, *raylet.children(recursive=True)]
        # All are suspended first, so that none sees another die.
        for act in (psutil.Process.suspend, psutil.Process.kill):
            for process in everything:
                with contextlib.suppress(psutil.NoSuchProcess):
                    act(process)
        psutil.wait_procs(everything, timeout=30)


def processes() -> Iterator[psutil.Process]:
    """Yield all processes of this machine, with their command lines."""
    yield from psutil.process_iter(["cmdline"])


def all_well(details: dict[str, Any]) -> bool:
    """Return whether every deployment is healthy."""
    states = [
        deployment["status"]
        for application in details["applications"].values()
        for deployment in application["deployments"].values()
    ]
    return bool(states) and set(states) == {"HEALTHY"}


def is_raylet(process: psutil.Process, nodes: set[str]) -> bool:
    command = process.info["cmdline"] or [""]
    return command[0].endswith("/raylet") and any(f"--node_id={n}" in command for n in nodes)
