"""aws/account.yaml: CloudFormation accepts it, and it makes what cluster.yaml asks for."""

from __future__ import annotations

from typing import Any

import cfnlint.decode.cfn_yaml
import pytest
from cfnlint.api import ManualArgs, lint
from ray.autoscaler.tags import TAG_RAY_CLUSTER_NAME

from tests.fleet.files import TOP, read

TEXT = (TOP / "aws" / "account.yaml").read_text()


def faults(text: str) -> list[str]:
    """What the linter, which knows every resource and every right, has against a template."""
    return [match.message for match in lint(text, config=ManualArgs(regions=["us-west-2"]))]


def of_type(kind: str) -> list[dict[str, Any]]:
    """The properties of all such resources."""
    resources = cfnlint.decode.cfn_yaml.loads(TEXT)["Resources"].values()
    return [r["Properties"] for r in resources if r["Type"] == f"AWS::IAM::{kind}"]


def rights(role: dict[str, Any]) -> set[str]:
    """Those that only this role has."""
    documents = [policy["PolicyDocument"] for policy in role.get("Policies", [])]
    actions = [s["Action"] for document in documents for s in document["Statement"]]
    return {a for action in actions for a in ([action] if isinstance(action, str) else action)}


def test_cloudformation_accepts_it() -> None:
    assert faults(TEXT) == []


def test_the_head_may_end_its_own_nodes_alone() -> None:
    assert f"ResourceTag/{TAG_RAY_CLUSTER_NAME}: {read('cluster.yaml')['cluster_name']}}}" in TEXT


@pytest.mark.parametrize("word", ["BlockPublicAcls", "ec2:RunInstances", "UseBucket", "RoleName"])
def test_a_misspelt_word_is_refused(word: str) -> None:
    (fault, *_) = faults(TEXT.replace(word, f"{word}x", 1))
    assert f"{word.split(':')[-1]}x".lower() in fault.lower()


def test_it_makes_the_profiles_that_the_cluster_names() -> None:
    asked = read("cluster.yaml")["metadata"]
    made = {
        profile["InstanceProfileName"]: profile["Roles"] for profile in of_type("InstanceProfile")
    }
    assert set(made) == {asked["head_profile"]["Name"], asked["worker_profile"]["Name"]}


def test_only_the_head_launches_and_what_it_launches_is_a_worker() -> None:
    roles = {role["RoleName"]: role for role in of_type("Role")}
    assert rights(roles["linearsr-worker"]) == set()
    assert {"ec2:RunInstances", "ec2:TerminateInstances", "iam:PassRole"} < rights(
        roles["linearsr-head"]
    )
    (policy,) = roles["linearsr-head"]["Policies"]
    (passes,) = (s for s in policy["PolicyDocument"]["Statement"] if s["Action"] == "iam:PassRole")
    assert passes["Resource"] == {"Fn::GetAtt": ["WorkerRole", "Arn"]}
