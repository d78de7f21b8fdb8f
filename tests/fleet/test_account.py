"""CloudFormation accepts deploy/aws/account.yaml, which makes the roles that cluster.yaml needs."""

from __future__ import annotations

from typing import Any

import cfnlint.decode.cfn_yaml
import pytest
from cfnlint.api import ManualArgs, lint
from ray.autoscaler.tags import TAG_RAY_CLUSTER_NAME

from tests.helpers.fleet_files import TOP, read

TEXT = (TOP / "deploy" / "aws" / "account.yaml").read_text()
TEMPLATE = cfnlint.decode.cfn_yaml.loads(TEXT)
CLUSTER = {"Ref": "ClusterName"}


def faults(text: str) -> list[str]:
    """Return the messages of the linter, which knows every resource and every permission."""
    return [match.message for match in lint(text, config=ManualArgs(regions=["us-west-2"]))]


def of_type(kind: str) -> list[dict[str, Any]]:
    """Return the properties of all resources of this type."""
    resources = TEMPLATE["Resources"].values()
    return [r["Properties"] for r in resources if r["Type"] == f"AWS::IAM::{kind}"]


ROLES = {role["RoleName"]: role for role in of_type("Role")}


def statements(role: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the statements of the role's own policies."""
    documents = [policy["PolicyDocument"] for policy in role.get("Policies", [])]
    return [statement for document in documents for statement in document["Statement"]]


def actions(statement: dict[str, Any]) -> set[str]:
    names = statement["Action"]
    return {names} if isinstance(names, str) else set(names)


def test_cloudformation_accepts_the_account_template() -> None:
    assert faults(TEXT) == []


@pytest.mark.parametrize("word", ["BlockPublicAcls", "ec2:RunInstances", "UseBucket", "RoleName"])
def test_a_misspelt_word_in_the_account_template_is_refused(word: str) -> None:
    (fault, *_) = faults(TEXT.replace(word, f"{word}x", 1))
    assert f"{word.split(':')[-1]}x".lower() in fault.lower()


def test_account_template_makes_the_profiles_that_cluster_yaml_names() -> None:
    settings = read("cluster.yaml")["metadata"]
    profiles = {
        profile["InstanceProfileName"]: profile["Roles"] for profile in of_type("InstanceProfile")
    }
    assert set(profiles) == {settings["head_profile"]["Name"], settings["worker_profile"]["Name"]}


def test_only_the_head_role_may_launch_nodes_and_only_as_workers() -> None:
    worker, head = ROLES["linearsr-worker"], ROLES["linearsr-head"]
    assert statements(worker) == []
    assert {"ec2:RunInstances", "ec2:TerminateInstances"} < set.union(
        *map(actions, statements(head))
    )
    (passes,) = (s for s in statements(head) if "iam:PassRole" in actions(s))
    assert passes["Resource"] == {"Fn::GetAtt": ["WorkerRole", "Arn"]}
    for role in ROLES.values():  # permissions of both roles
        bucket, images = role["ManagedPolicyArns"]
        assert bucket == {"Ref": "UseBucket"}
        assert images["Fn::Sub"].endswith(":policy/AmazonEC2ContainerRegistryReadOnly")


def test_the_head_role_may_end_and_tag_only_machines_of_its_cluster() -> None:
    for statement in statements(ROLES["linearsr-head"]):
        if actions(statement) & {"ec2:TerminateInstances", "ec2:CreateTags"}:
            assert statement["Condition"] in (
                {"StringEquals": {"ec2:CreateAction": "RunInstances"}},
                {"StringEquals": {f"ec2:ResourceTag/{TAG_RAY_CLUSTER_NAME}": CLUSTER}},
            )
    assert TEMPLATE["Parameters"]["ClusterName"]["Default"] == read("cluster.yaml")["cluster_name"]


def test_the_head_role_may_launch_only_the_clusters_kinds_of_workers() -> None:
    launches = [s for s in statements(ROLES["linearsr-head"]) if "ec2:RunInstances" in actions(s)]
    resources = [str(statement["Resource"]) for statement in launches]
    assert all("*" not in resource.split(":ec2:")[0] for resource in resources)
    (condition,) = [s["Condition"] for s in launches if ":instance/" in str(s["Resource"])]
    assert condition["StringEquals"] == {
        "ec2:InstanceType": {"Ref": "WorkerTypes"},
        f"aws:RequestTag/{TAG_RAY_CLUSTER_NAME}": CLUSTER,
    }
    settings = read("cluster.yaml")["metadata"]
    types = TEMPLATE["Parameters"]["WorkerTypes"]["Default"].split(",")
    assert types == [settings["gpu_instance"], settings["cpu_instance"]]
