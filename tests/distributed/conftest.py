"""One local Ray cluster for all tests here, photographs, and one whole small training run."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

# Before any Ray process: no token for clients, quick reports, patience with slow machines.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "300"
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import ray
import skimage.data
from PIL import Image
from ray.cluster_utils import Cluster
from ray.job_submission import JobStatus, JobSubmissionClient
from ray.util.state import list_actors

from linearsr.distributed.train.config import ClusterConfig, StageConfig
from linearsr.distributed.train.knee import last_result
from linearsr.distributed.train.trainer import Outcome, train
from linearsr.storage.location import locate
from linearsr.training import loop
from linearsr.training.recipes import Recipe, override, tiny_cpu

ROOT = Path(__file__).parents[2]
# `tiny_cpu` made so small that steps cost nothing beside the processes that run them.
SMALL = (
    "model.denoiser.depth=2",
    "model.denoiser.width=32",
    "model.denoiser.head_dim=16",
    "model.denoiser.stem_channels=[8, 8, 8]",
    "data.patch=32",
    "data.batch=4",
    "data.margin=8",
    "validation.pictures=1",
    "validation.size=64",
    'validation.metrics=["psnr@1"]',
    'validation.knee={"psnr@1": true}',
)
STEPS = (
    "pretrain.steps=24",
    "pretrain.warmup=2",
    "pretrain.report_every=1",
    "pretrain.checkpoint_every=6",
    # Losses of interrupted runs are compared to within float32's rounding.
    "pretrain.bfloat16=false",
)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start(cpus: int = 4) -> Cluster:
    """Logical CPUs only; nothing is reachable from outside (127.0.0.1 Ray would replace).

    On ports of its own: others may run Ray on the same machine. Chosen here, since Ray gives its
    processes only 15 s to choose theirs, and a busy machine needs longer to start them.
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
        **{port: _free_port() for port in ports},
    }
    return Cluster(initialize_head=True, head_node_args=node)


@pytest.fixture(scope="session")
def cluster(s3_port: int) -> Iterator[Cluster]:
    folder = tempfile.mkdtemp(prefix="lsr-")  # a short path, for it holds sockets
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        try:
            started = _start()
        except Exception:  # Ray also gives them only 30 s to come up.
            started = _start()
        ray.init(address=started.address, log_to_driver=False, logging_level="WARNING")
        yield started
        ray.shutdown()
        started.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


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
        """Status, exit code and output of a job, once it has ended."""
        until(lambda: self.has_ended(job), job, 600)
        told = self.client.get_job_info(job)
        return told.status, told.driver_exit_code, self.client.get_job_logs(job)


@pytest.fixture(scope="session")
def jobs(cluster: Cluster) -> Jobs:
    return Jobs(f"http://{cluster.webui_url}")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name in ("astronaut", "coffee"):
        picture = Image.fromarray(np.asarray(getattr(skimage.data, name)()))
        picture.resize((160, 120), Image.Resampling.BICUBIC).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    return override(tiny_cpu(), [*SMALL, *STEPS])


def stage_of(
    recipe: Recipe, photos: Path, storage: Path, name: str, **changes: object
) -> StageConfig:
    """A pretraining stage of two workers that reserves the whole cluster, four CPUs."""
    places = {"data": str(photos), "validation": str(photos), "storage": str(storage)}
    cpus = {"worker_cpus": 1.25, "data_cpus": 0.5, "validation_cpus": 0.5}
    fields = {**places, **cpus, "name": name, "workers": 2, **changes}
    cluster = ClusterConfig.model_validate(fields)
    return StageConfig(recipe=recipe, cluster=cluster, kind="pretrain")


@pytest.fixture(scope="session")
def whole(
    cluster: Cluster, recipe: Recipe, photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> Outcome:
    """A run of two workers that nothing has interrupted."""
    return train(stage_of(recipe, photos, tmp_path_factory.mktemp("runs"), "whole"))


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoint folders, oldest first."""
    return sorted(p.parent for p in run.glob("checkpoint_*/progress.json"))


def reported(run: Path | str) -> list[dict[str, Any]]:
    """Metrics of every checkpoint that Ray Train knows of, in order of report."""
    result = last_result(locate(run))
    return [metrics for _, metrics in (result.best_checkpoints if result else None) or []]


def losses(run: Path) -> list[float]:
    """Every step's loss, as the last checkpoint remembers them."""
    history = loop.read_progress(checkpoints(run)[-1]).history
    return [point["loss"] for point in history]


def until(done: Callable[[], bool], what: str, seconds: float = 300) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.02)
