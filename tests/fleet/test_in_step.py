"""cluster.yaml, deploy/kubernetes/ and the Dockerfile describe the same fleet."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr as derive,
)
from ray.autoscaler._private.util import prepare_config, validate_config

from linearsr.distributed.datasets.shards.config import ShardConfig
from tests.helpers.fleet_files import MANIFESTS, TOP, built, manifest, pinned, read, spec

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DOCKERFILE = (TOP / "deploy/Dockerfile").read_text()
PYPROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]


def aws() -> dict[str, Any]:
    """Return cluster.yaml as the autoscaler sees it."""
    return dict(prepare_config(read("cluster.yaml")))


def kubernetes() -> dict[str, Any]:
    """Return the manifest of the cluster in Ray's own translation for the autoscaler."""
    cluster = manifest("raycluster")
    cluster["metadata"]["namespace"] = "default"
    config = dict(derive(cluster))
    validate_config(config)
    return config


def groups(name: str = "raycluster") -> dict[str, dict[str, Any]]:
    """Return the pod spec of each group, by its name in cluster.yaml."""
    cluster = spec(name)
    workers = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    named = {"head": cluster["headGroupSpec"], **workers}
    return {name: group["template"]["spec"] for name, group in named.items()}


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def environment(name: str = "raycluster") -> dict[str, str]:
    """Return the variables of the Ray containers, after checking that all have the same."""
    environments = [
        {v["name"]: str(v.get("value", "")) for v in pod["containers"][0]["env"]}
        for pod in groups(name).values()
    ]
    assert all(one == environments[0] for one in environments)
    return environments[0]


def test_groups_have_the_same_resources_and_bounds() -> None:
    ours, theirs = aws()["available_node_types"], kubernetes()["available_node_types"]
    theirs["head"] = theirs.pop("headgroup")
    assert set(ours) == set(theirs)
    for name, group in ours.items():
        other = theirs[name]
        other["resources"].pop("memory")  # set for pods only; Ray measures the memory of a machine
        for field in ("resources", "min_workers", "max_workers"):
            assert group[field] == other[field], (name, field)


@pytest.mark.parametrize("field", ["max_workers", "idle_timeout_minutes", "cluster_name"])
def test_the_cluster_has_the_same_bounds(field: str) -> None:
    assert aws()[field] == kubernetes()[field]


# vCPUs and GiB of memory, as AWS lists them.
MACHINES = {"m7i.2xlarge": (8, 32), "g6e.12xlarge": (48, 384), "m7i.8xlarge": (32, 128)}


def test_a_pod_fits_on_the_machine_that_it_stands_for() -> None:
    """Some of the machine is left to Kubernetes."""
    for name, pod in groups().items():
        instance = aws()["available_node_types"][name]["node_config"]["InstanceType"]
        cpus, memory = MACHINES[instance]
        for container in containers(pod):
            requests = container["resources"]["requests"]
            assert 0 < float(requests["cpu"]) < cpus, name
            assert 0 < int(requests["memory"].removesuffix("Gi")) < 0.95 * memory, name


def test_work_without_gpus_asks_for_the_cpu_workers_and_no_more() -> None:
    """A larger request would start nodes with GPUs."""
    group = aws()["available_node_types"]["cpu"]
    room = group["max_workers"] * group["resources"]["CPU"]
    assert ShardConfig.model_fields["max_cpus"].default == room


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_setting_of_the_shared_cluster_reaches_every_manifest(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "kubernetes"
    shutil.copytree(TOP / "deploy/kubernetes", folder)
    image, cluster = folder / "base/kustomization.yaml", folder / "base/cluster.yaml"
    image.write_text(image.read_text().replace("example.com", "ours.example.org"))
    cluster.write_text(cluster.read_text().replace("us-west-2", "eu-north-1"))
    text = built(folder / name)
    assert text.count("image: ours.example.org/linearsr:") == text.count("image:") == 4
    assert "us-west-2" not in text and text.count("value: eu-north-1") == 3


@pytest.mark.parametrize("name", MANIFESTS[1:])
def test_every_manifest_has_the_same_cluster(name: str) -> None:
    cluster = spec(name)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        ray = group["template"]["spec"]["containers"][0]
        ray["env"] = [v for v in ray["env"] if v["name"] != "LINEARSR_TOKEN"]
    assert cluster == spec("raycluster")


def test_processes_have_the_same_environment() -> None:
    options = aws()["docker"]["run_options"]
    ours = dict(option.removeprefix("--env ").split("=", 1) for option in options)
    # The token reaches a node of AWS in a file, and a pod in the operator's Secret.
    assert ours.pop("RAY_AUTH_MODE") == spec("raycluster")["authOptions"]["mode"] == "token"
    mounted = ours.pop("RAY_AUTH_TOKEN_PATH").replace("/home/ray/", "~/")
    assert mounted in aws()["file_mounts"]
    # A pod's root file system is read-only.
    assert {**ours, "HOME": "/tmp"} == environment()
    assert ours["AWS_REGION"] == aws()["provider"]["region"]


def test_gpus_are_checked_before_a_worker_joins() -> None:
    gpus = aws()["available_node_types"]["gpu"]["resources"]["GPU"]
    (command,) = aws()["available_node_types"]["gpu"]["worker_setup_commands"]
    pod = groups()["gpu"]
    (check,) = pod["initContainers"]
    assert command.split() == check["command"] == [*command.split()[:-1], str(gpus)]
    for container in containers(pod):
        for bound in ("requests", "limits"):
            assert container["resources"][bound]["nvidia.com/gpu"] == str(gpus)
        assert {"name": "shared-memory", "mountPath": "/dev/shm"} in container["volumeMounts"]


def test_heads_start_with_the_same_flags() -> None:
    ours = dict(re.findall(r"--([\w-]+)=(\S+)", " ".join(aws()["head_start_ray_commands"])))
    theirs = spec("raycluster")["headGroupSpec"]["rayStartParams"]
    # The operator submits jobs over the network; nobody does on AWS.
    assert (ours.pop("dashboard-host"), theirs.pop("dashboard-host")) == ("127.0.0.1", "0.0.0.0")
    assert theirs.items() <= ours.items()


def test_all_nodes_run_one_image_with_the_pinned_versions() -> None:
    image = aws()["docker"]["image"]
    pods = [pod for name in MANIFESTS for pod in groups(name).values()]
    assert {c["image"] for pod in pods for c in containers(pod)} == {image}
    tag = f"{PROJECT['version']}-ray{pinned('ray')}"
    assert image.endswith(f"/linearsr:{tag}")
    assert f"linearsr:{tag} ." in DOCKERFILE
    assert {spec(name)["rayVersion"] for name in MANIFESTS} == {pinned("ray")}
    assert f"FROM rayproject/ray:{pinned('ray')}-py311-gpu\n" in DOCKERFILE


def test_the_image_installs_the_pinned_versions_of_the_requirements() -> None:
    extras = PROJECT["optional-dependencies"]
    install, package = re.findall(r"pip install .*", DOCKERFILE)
    assert "--require-hashes --requirement deploy/requirements.txt" in install
    assert "--no-deps --no-build-isolation ." in package
    text = (TOP / "deploy/requirements.txt").read_text()
    assert "://" not in text
    assert text.count("==") == len(re.findall(r"==.* \\\n    --hash=sha256:", text))
    versions = dict(re.findall(r"^([\w.-]+)==(\S+)", text, re.M))
    build = Requirement(PYPROJECT["build-system"]["requires"][0])
    assert build.specifier.contains(versions.pop(build.name))
    own = {"packaging", "pathspec", "pluggy", "tomlkit", "trove-classifiers"}  # hatchling's
    for name, version in versions.items():
        if name not in own:
            assert pinned(name) == version, name
    needed = [PROJECT["dependencies"], *(extras[extra] for extra in ("sana", "serve", "train"))]
    for requirement in map(Requirement, itertools.chain(*needed)):
        if requirement.name != PROJECT["name"]:
            assert canonicalize_name(requirement.name) in versions, requirement.name
    assert '; python_version >= "3.11"' in (TOP / "constraints.txt").read_text()
    lines = itertools.chain(PROJECT["dependencies"], *extras.values())
    for requirement in map(Requirement, lines):
        if requirement.name in ("ray", "torch", "deepspeed"):
            assert pinned(requirement.name) in requirement.specifier


def test_the_image_runs_without_root_and_its_build_context_is_complete() -> None:
    assert re.findall(r"^USER (.*)", DOCKERFILE, re.M)[-1] == "1000"
    kept = re.findall(r"^!(.*)", (TOP / "deploy/Dockerfile.dockerignore").read_text(), re.M)
    needed = {"linearsr", "ray_jobs", "pyproject.toml", "deploy/requirements.txt"}
    assert set(kept) == {*needed, PROJECT["readme"], *PROJECT["license-files"]}
    assert all((TOP / name).exists() for name in kept)


def test_hadolint_accepts_the_dockerfile(tmp_path: Path) -> None:
    hadolint = shutil.which("hadolint") or shutil.which(
        "hadolint", path=Path(sys.executable).parent
    )
    if hadolint is None:
        pytest.skip("no hadolint for this platform")
    run = [hadolint, "--no-color"]
    assert (
        subprocess.run([*run, TOP / "deploy/Dockerfile"], capture_output=True, text=True).stdout
        == ""
    )
    broken = tmp_path / "Dockerfile"
    broken.write_text(DOCKERFILE.replace("WORKDIR", "WORKDIRX"))
    assert subprocess.run([*run, broken], capture_output=True).returncode != 0
