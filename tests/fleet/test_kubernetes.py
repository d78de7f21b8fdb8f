"""The manifests of deploy/kubernetes/ fit the APIs of KubeRay and Kubernetes."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from ray.scripts.scripts import start
from ray.serve.schema import ServeDeploySchema

from linearsr.cli import job
from linearsr.distributed.serve.config import ServeConfig
from linearsr.training.recipes import RECIPES
from tests.helpers.fleet_files import MANIFESTS, TOP, manifest, read, spec
from tests.helpers.kuberay import validator

KINDS = dict(zip(MANIFESTS, ("RayCluster", "RayJob", "RayService"), strict=True))
# Mappings whose keys are the user's own.
FREE = {"annotations", "rayStartParams", "requests", "limits"}


def levels(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the paths to all mappings of API fields."""
    if isinstance(value, dict) and value and (not path or path[-1] not in FREE):
        yield path
        for key, inner in value.items():
            yield from levels(inner, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from levels(inner, (*path, i))


def at(document: dict[str, Any], path: tuple[str | int, ...]) -> Any:
    """Return the value at a path."""
    return functools.reduce(operator.getitem, path, document)


def faults(name: str, document: dict[str, Any]) -> list[str]:
    """Return the API's complaints about a manifest."""
    errors = validator(KINDS[name]).iter_errors(document)
    return [f"{'.'.join(map(str, e.absolute_path))}: {e.message}" for e in errors]


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_field_of_a_manifest_is_in_the_api(name: str) -> None:
    assert faults(name, manifest(name)) == []


@pytest.mark.parametrize(
    ("name", "path"),
    [(name, path) for name in MANIFESTS for path in levels(manifest(name))],
    ids=lambda value: value if isinstance(value, str) else ".".join(map(str, value)) or "top",
)
def test_a_misspelt_field_is_refused(name: str, path: tuple[str | int, ...]) -> None:
    document = manifest(name)
    section = at(document, path)
    first = next(iter(section))
    section[f"{first}x"] = section.pop(first)
    assert any(f"{first}x" in fault for fault in faults(name, document))


@pytest.mark.parametrize(
    ("path", "required"),
    [
        ((), "kind"),
        (("spec",), "headGroupSpec"),
        (("spec", "headGroupSpec"), "template"),
        (("spec", "workerGroupSpecs", 0), "groupName"),
        (("spec", "workerGroupSpecs", 0), "maxReplicas"),
        (("spec", "workerGroupSpecs", 0, "template", "spec"), "containers"),
        (("spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0), "name"),
    ],
)
def test_a_missing_required_field_is_refused(path: tuple[str | int, ...], required: str) -> None:
    document = manifest("raycluster")
    del at(document, path)[required]
    assert faults("raycluster", document) != []


@pytest.mark.parametrize(
    ("field", "wrong"),
    [("maxReplicas", "8"), ("groupName", 1), ("rayStartParams", {"num-cpus": 48})],
)
def test_a_value_of_another_type_is_refused(field: str, wrong: object) -> None:
    document = manifest("raycluster")
    document["spec"]["workerGroupSpecs"][0][field] = wrong
    assert faults("raycluster", document) != []


def test_the_service_account_is_valid_and_used_by_all_pods() -> None:
    account = read("deploy/kubernetes/account.yaml")
    assert list(validator("V1ServiceAccount").iter_errors(account)) == []
    cluster = spec("raycluster")
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert group["template"]["spec"]["serviceAccountName"] == account["metadata"]["name"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_containers_are_restricted_and_write_to_volumes_only(name: str) -> None:
    """The rules are those of Kubernetes' "restricted" Pod Security Standard, and more."""
    cluster = spec(name)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        volumes = {volume["name"] for volume in pod["volumes"]}
        containers = [*pod["containers"], *pod.get("initContainers", ())]
        for container in (*containers, cluster["autoscalerOptions"]):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert context["readOnlyRootFilesystem"] is True
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert "/tmp" in mounts and set(mounts.values()) <= volumes


def test_every_start_flag_is_one_of_ray_start() -> None:
    known = {flag.removeprefix("--") for option in start.params for flag in option.opts}
    cluster = spec("raycluster")
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert set(group["rayStartParams"]) <= known


def test_the_rayjob_runs_an_existing_job_and_fits_a_gpu_worker() -> None:
    program, script, *arguments = manifest("rayjob")["spec"]["entrypoint"].split()
    assert program == "python"
    # The folder of the image is set in deploy/Dockerfile.
    assert (TOP / script.removeprefix("/home/ray/linearsr/")).is_file()
    options = job.parser(script.rpartition("/")[2].removesuffix(".py")).parse_args(arguments)
    workers = int(options.workers)
    assert options.gpu and RECIPES[options.recipe]().data.batch % workers == 0
    gpu = spec("rayjob")["workerGroupSpecs"][0]["rayStartParams"]
    assert workers <= int(gpu["num-gpus"])
    assert workers * (float(options.worker_cpus) + float(options.data_cpus)) < int(gpu["num-cpus"])


def test_the_rayservice_has_the_config_of_serve_yaml() -> None:
    served = yaml.safe_load(manifest("rayservice")["spec"]["serveConfigV2"])
    ours = read("ray_jobs/serve.yaml")
    ServeDeploySchema.model_validate(served)
    arguments = served["applications"][0]["args"]
    assert ServeConfig.parse(**arguments).expert_gpus == 0.25
    # Only these may differ. Pods are reached from outside, and have GPUs.
    assert served["http_options"].pop("host") == "0.0.0.0"
    assert ours["http_options"].pop("host") == "127.0.0.1"
    assert arguments.pop("ingress_node") == "head"
    assert arguments.pop("expert_gpus") > ours["applications"][0]["args"].pop("expert_gpus")
    # Pods have it from a secret, in LINEARSR_TOKEN.
    assert ours["applications"][0]["args"].pop("token_sha256") is None
    assert served == ours


def test_no_two_resources_have_the_same_services() -> None:
    """KubeRay names services after the resource alone, and takes over existing ones."""
    names = [manifest(name)["metadata"]["name"] for name in MANIFESTS]
    assert len(set(names)) == len(names)


def test_the_endpoint_of_the_rayservice_requires_a_token() -> None:
    head = spec("rayservice")["headGroupSpec"]["template"]["spec"]["containers"][0]
    token = next(v for v in head["env"] if v["name"] == "LINEARSR_TOKEN")
    assert "optional" not in token["valueFrom"]["secretKeyRef"]
