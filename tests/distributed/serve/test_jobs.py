"""Jobs on a real cluster: the command's pixels, whatever dies meanwhile; metrics; a new token."""

from __future__ import annotations

import json
import os
import re
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from ray import serve
from ray.cluster_utils import Cluster

from linearsr.config import Options
from linearsr.distributed.compat import session_folder
from linearsr.distributed.serve import ServeConfig, build_app
from linearsr.distributed.serve.jobs import FOLDER
from linearsr.imaging.files import encode, read
from linearsr.pipeline.upscaler import Upscaler
from linearsr.weights import expert_names, read_config
from tests.helpers.cluster import living_actors
from tests.helpers.endpoint import photograph, pixels_of
from tests.helpers.processes import free_port, until

# test_local.py has the cheaper tests of jobs.
pytestmark = pytest.mark.thorough

TOKEN = {"Authorization": "Bearer sesame"}
PREFER = {"Prefer": "respond-async", **TOKEN}
STEPS = 50


def config_of(model: Path, **fields: Any) -> ServeConfig:
    return ServeConfig.parse(
        model=str(model),
        device="cpu",
        layout="split",
        replicas=4,
        expert_cpus=0.25,
        router_cpus=0.25,
        **fields,
    )


@pytest.fixture(scope="module")
def url(cluster: Cluster, scaling_bundle: Path) -> Iterator[str]:
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LINEARSR_TOKEN", "sesame")
        serve.run(build_app(config_of(scaling_bundle)))
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(scope="module")
def picture() -> bytes:
    return photograph(0, 96, 96)


def replicas(name: str) -> list[int]:
    """Return the process ids of the replicas of a deployment."""
    return living_actors(f"ServeReplica:default:{name}")


def state_of(address: str) -> dict[str, Any]:
    answer = requests.get(address, headers=TOKEN, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def folders() -> list[Path]:
    folder = session_folder() / FOLDER / "default"
    return list(folder.iterdir()) if folder.exists() else []


def stop(name: str) -> list[int]:
    """Stop a deployment's replicas where they are, so that the job waits for them."""
    for replica in (stopped := replicas(name)):
        os.kill(replica, signal.SIGSTOP)
    return stopped


def kill(name: str) -> None:
    """Kill a deployment's replicas, and wait until there is a new one."""
    for victim in (victims := replicas(name)):
        os.kill(victim, signal.SIGKILL)
    until(lambda: bool(set(replicas(name)) - set(victims)), f"{name} again")


def test_job_survives_the_death_of_each_process_in_turn(
    url: str, scaling_bundle: Path, picture: bytes
) -> None:
    """Each expert is killed while it has the job, and router, ingress and keeper before the last.

    The next expert is stopped before the last one is killed, so that the job does not run away.
    """
    options = Options(steps=STEPS, seed=3)
    upscaler = Upscaler.load(scaling_bundle, "cpu")
    expected = pixels_of(encode(upscaler.upscale(read(picture), options), "png"))
    experts = expert_names(read_config(str(scaling_bundle)))
    stop(experts[0])
    answer = requests.post(
        f"{url}/v1/upscale",
        files={"image": ("a.png", picture)},
        data={"steps": STEPS, "seed": 3},
        headers=PREFER,
        timeout=60,
    )
    assert answer.status_code == 202 and answer.headers["Preference-Applied"] == "respond-async"
    address = url + answer.headers["Location"]

    def reaches(expert: str) -> None:
        until(lambda: (state_of(address)["progress"] or {}).get("expert") == expert, expert)
        assert state_of(address)["status"] == "running"

    for expert, following in zip(experts, (*experts[1:], None), strict=True):
        reaches(expert)
        if following:
            stop(following)
        else:
            for name in ("Router", "Ingress", "JobKeeper"):
                kill(name)
                reaches(expert)
        kill(expert)
    until(lambda: state_of(address)["expires"] is not None, "the job has finished")
    assert state_of(address)["status"] == "succeeded", state_of(address)
    content = requests.get(f"{address}/content", headers=TOKEN, timeout=60)
    assert np.array_equal(pixels_of(content.content), expected)
    assert len(folders()) == 1
    assert requests.get(address, timeout=60).status_code == 401
    assert requests.delete(address, headers=TOKEN, timeout=60).status_code == 204
    assert requests.get(address, headers=TOKEN, timeout=60).status_code == 404
    assert folders() == []


def test_metrics_of_the_dashboard_are_exported(url: str, cluster: Cluster, picture: bytes) -> None:
    """Every metric that deploy/grafana names comes from a running endpoint."""
    dashboard = json.loads((Path(__file__).parents[3] / "deploy/grafana/linearsr.json").read_text())
    expressions = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", ())]
    named = {name for text in expressions for name in re.findall(r"\bray_\w+", text)}
    form: Any = {"files": {"image": ("a.png", picture)}, "data": {"steps": 4}, "headers": TOKEN}
    assert requests.post(f"{url}/v1/upscale", **form, timeout=60).status_code == 200
    (node,) = [node for node in cluster.list_all_nodes() if node.is_head()][:1]
    metrics = f"http://127.0.0.1:{node.metrics_export_port}/metrics"

    def missing() -> set[str]:
        text = urllib.request.urlopen(metrics).read().decode()
        return named - set(re.findall(r"^(ray_\w+)[{ ]", text, re.M))

    until(lambda: not missing(), f"metrics {missing()}")
    assert len(named) > 8


def test_token_and_limits_change_without_a_failed_request(
    url: str, scaling_bundle: Path, picture: bytes
) -> None:
    form: Any = {"files": {"image": ("a.png", picture)}, "data": {"steps": 1}}
    job = requests.post(f"{url}/v1/upscale", **form, headers=PREFER, timeout=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LINEARSR_TOKEN", "open")
        app = build_app(config_of(scaling_bundle, limits={"pixels": 100}))
    serve.run(app)
    assert requests.post(f"{url}/v1/upscale", **form, headers=TOKEN, timeout=60).status_code == 401
    new = {"Authorization": "Bearer open"}
    assert requests.post(f"{url}/v1/upscale", **form, headers=new, timeout=60).status_code == 413
    assert requests.get(url + job.headers["Location"], headers=new, timeout=60).status_code == 404
    serve.delete("default")
    assert folders() == []
