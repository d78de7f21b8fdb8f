"""Ray accepts cluster.yaml, EC2 knows its fields, and the user's settings are at its top."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import yaml
from botocore.session import get_session
from botocore.validate import ParamValidator
from jsonschema import ValidationError
from ray.autoscaler._private.aws.config import _configure_security_group
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

from tests.helpers.fleet_files import TOP, read

TEXT = (TOP / "cluster.yaml").read_text()
TYPES = ("head", "gpu", "cpu")


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config as `ray up` completes it before any request to AWS."""
    complete: dict[str, Any] = prepare_config(config)
    validate_config(complete)
    return complete


@pytest.fixture
def config() -> dict[str, Any]:
    return copy.deepcopy(read("cluster.yaml"))


def test_ray_accepts_cluster_yaml(config: dict[str, Any]) -> None:
    complete = prepared(config)
    assert complete["head_node_type"] == "head"
    assert set(complete["available_node_types"]) == set(TYPES)
    # No default of Ray's that would install something is left.
    assert complete["head_setup_commands"] == complete["worker_setup_commands"] == []


@pytest.mark.parametrize(
    "place",
    [(), ("docker",), ("auth",), ("available_node_types", "gpu")],
    ids=lambda place: ".".join(place) or "top",
)
def test_ray_refuses_a_misspelt_field_of_cluster_yaml(
    config: dict[str, Any], place: tuple[str, ...]
) -> None:
    section = config
    for key in place:
        section = section[key]
    *_, key = section
    section[f"{key}x"] = section.pop(key)
    with pytest.raises(ValidationError, match=f"{key}x"):
        prepared(config)


def launch(config: dict[str, Any], kind: str) -> str:
    """Return botocore's complaints about the request that starts such a node."""
    shape = get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    request = {"MinCount": 1, "MaxCount": 1, **config["available_node_types"][kind]["node_config"]}
    return str(ParamValidator().validate(request, shape).generate_report())


@pytest.mark.parametrize("kind", TYPES)
def test_ec2_knows_every_field_of_cluster_yaml(config: dict[str, Any], kind: str) -> None:
    assert launch(config, kind) == ""
    config["available_node_types"][kind]["node_config"]["MetadataOptions"]["HttpToken"] = "required"
    assert "HttpToken" in launch(config, kind)


def test_the_head_takes_no_work_and_workers_start_from_none(config: dict[str, Any]) -> None:
    types = prepared(config)["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0, "GPU": 0}
    assert types["head"]["max_workers"] == 0
    assert [types[kind]["min_workers"] for kind in ("gpu", "cpu")] == [0, 0]
    assert types["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert 0 < config["idle_timeout_minutes"] <= 60
    assert config["provider"]["cache_stopped_nodes"] is False


def test_settings_of_the_user_are_at_the_top_of_cluster_yaml_and_nowhere_else(
    config: dict[str, Any],
) -> None:
    assert next(iter(config)) == "metadata"
    top, rest = re.split(r"^(?=cluster_name:)", TEXT, maxsplit=1, flags=re.M)
    for anchor in re.findall(r"&(\w+)", top):
        assert re.search(rf"\*{anchor}\b", rest), f"{anchor} is set, but not used"
    settings = {str(v) for v in config["metadata"].values() if isinstance(v, (str, int))}
    events = [e.value for e in yaml.parse(rest) if isinstance(e, yaml.ScalarEvent)]
    assert not settings & {value for value in events if len(value) > 2}
    for line in top.splitlines():
        if re.match(r"  \w+: &", line):
            name = line.strip().split(":")[0]
            assert "#" in line or _after_a_comment(top, line), f"{name} has no comment"


def _after_a_comment(text: str, line: str) -> bool:
    return text.split(line)[0].rstrip("\n").splitlines()[-1].lstrip().startswith("#")


def test_cluster_yaml_has_roles_and_no_keys() -> None:
    assert not re.search(r"AKIA|aws_secret|ssh_private_key|AWS_ACCESS_KEY|AWS_SECRET", TEXT, re.I)
    types = read("cluster.yaml")["available_node_types"]
    profiles = [types[kind]["node_config"]["IamInstanceProfile"] for kind in TYPES]
    # Only the head may launch nodes.
    assert profiles[0] != profiles[1] == profiles[2]


@pytest.mark.parametrize("node", ["head", "worker"])
def test_every_start_flag_is_one_of_ray_start(config: dict[str, Any], node: str) -> None:
    known = {flag for option in start.params for flag in option.opts}
    used = re.findall(r"(--[\w-]+)", " ".join(config[f"{node}_start_ray_commands"]))
    assert used and set(used) <= known


def test_the_dashboard_listens_on_the_head_only(config: dict[str, Any]) -> None:
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]


def test_ray_makes_no_security_group_of_its_own(config: dict[str, Any]) -> None:
    """Ray's own group lets everyone connect by SSH."""
    complete = prepared(config)
    before = copy.deepcopy(complete)
    assert _configure_security_group(complete) == before  # without a request to AWS
    del complete["available_node_types"]["cpu"]["node_config"]["SecurityGroupIds"]
    with pytest.raises(KeyError, match="SubnetIds"):  # it would look for a network for its group
        _configure_security_group(complete)
