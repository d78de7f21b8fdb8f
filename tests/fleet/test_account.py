"""CloudFormation accepts deploy/aws/account.yaml, which makes the roles that cluster.yaml needs."""

from __future__ import annotations

import re
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
    return [r["Properties"] for r in resources if r["Type"] == f"AWS::{kind}"]


ROLES = {role["RoleName"]: role for role in of_type("IAM::Role")}


def statements(role: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the statements of the role's own policies."""
    documents = [policy["PolicyDocument"] for policy in role.get("Policies", [])]
    return [statement for document in documents for statement in document["Statement"]]


def actions(statement: dict[str, Any]) -> set[str]:
    names = statement["Action"]
    return {names} if isinstance(names, str) else set(names)


def test_cloudformation_accepts_the_account_template() -> None:
    assert faults(TEXT) == []


@pytest.mark.parametrize(
    "word",
    [
        "BlockPublicAcls",
        "ec2:RunInstances",
        "UseBucket",
        "RoleName",
        "BudgetLimit",
        "SecurityGroupIngress",
    ],
)
def test_a_misspelt_word_in_the_account_template_is_refused(word: str) -> None:
    (fault, *_) = faults(TEXT.replace(word, f"{word}x", 1))
    assert f"{word.split(':')[-1]}x".lower() in fault.lower()


def test_account_template_makes_the_profiles_that_cluster_yaml_names() -> None:
    settings = read("cluster.yaml")["metadata"]
    profiles = {
        profile["InstanceProfileName"]: profile["Roles"]
        for profile in of_type("IAM::InstanceProfile")
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


def test_nodes_are_launched_in_their_own_security_group_only() -> None:
    launches = [s for s in statements(ROLES["linearsr-head"]) if "ec2:RunInstances" in actions(s)]
    groups = re.findall(r":security-group/([^'\"]+)", str(launches))
    assert groups == ["${Nodes.GroupId}"]
    assert TEMPLATE["Outputs"]["SecurityGroup"]["Value"] == {"Fn::GetAtt": ["Nodes", "GroupId"]}


def test_only_the_given_addresses_and_the_nodes_reach_a_node() -> None:
    (group,) = of_type("EC2::SecurityGroup")
    (ssh,) = group["SecurityGroupIngress"]
    assert (ssh["FromPort"], ssh["ToPort"], ssh["IpProtocol"]) == (22, 22, "tcp")
    assert ssh["CidrIp"] == {"Ref": "SshFrom"}
    (nodes,) = of_type("EC2::SecurityGroupIngress")
    assert (
        nodes["GroupId"] == nodes["SourceSecurityGroupId"] == {"Fn::GetAtt": ["Nodes", "GroupId"]}
    )


@pytest.mark.parametrize(
    ("addresses", "accepted"),
    [
        ("203.0.113.7/32", True),
        ("198.51.100.0/24", True),
        ("10.0.0.0/8", True),
        ("0.0.0.0/0", False),
        ("0.0.0.0/1", False),
        ("203.0.113.7", False),
        ("203.0.113.7/33", False),
    ],
)
def test_ssh_is_never_open_to_the_whole_internet(addresses: str, accepted: bool) -> None:
    """CloudFormation compares a pattern with the whole value."""
    parameter = TEMPLATE["Parameters"]["SshFrom"]
    assert "Default" not in parameter
    assert bool(re.fullmatch(parameter["AllowedPattern"], addresses)) == accepted


def test_the_budget_sends_an_email_before_and_at_its_limit() -> None:
    (budget,) = of_type("Budgets::Budget")
    assert budget["Budget"]["BudgetLimit"] == {"Amount": {"Ref": "BudgetDollars"}, "Unit": "USD"}
    assert (budget["Budget"]["BudgetType"], budget["Budget"]["TimeUnit"]) == ("COST", "MONTHLY")
    alarms = budget["NotificationsWithSubscribers"]
    kinds = {
        (a["Notification"]["NotificationType"], a["Notification"]["Threshold"]) for a in alarms
    }
    assert kinds == {("ACTUAL", 50), ("ACTUAL", 100), ("FORECASTED", 100)}
    email = [{"SubscriptionType": "EMAIL", "Address": {"Ref": "BudgetEmail"}}]
    assert all(alarm["Subscribers"] == email for alarm in alarms)
    assert "Default" not in TEMPLATE["Parameters"]["BudgetEmail"]
