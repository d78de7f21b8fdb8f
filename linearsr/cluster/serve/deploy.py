"""A Serve config file, with some of its fields set, onto a running cluster."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.serve.schema import ApplicationStatus
from tenacity import RetryError, Retrying, retry_if_result, stop_after_delay, wait_fixed

from linearsr.cluster.serve.config import ServeConfig
from linearsr.cluster.weights import check_model
from linearsr.errors import LinearSRError, OptionError, one_line

UNDER_WAY = (ApplicationStatus.NOT_STARTED, ApplicationStatus.DEPLOYING)


def read_file(path: Path, settings: Mapping[str, Any], http: Mapping[str, Any]) -> dict[str, Any]:
    """The file with fields of its one application's ServeConfig, and of http_options, replaced.

    Raises OptionError for a file, field or value that is none, and WeightsError for a model.
    """
    try:
        file = yaml.safe_load(path.read_text())
        (application,) = file["applications"]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise OptionError(f"{path}: not a Serve config file of one application: {error}") from error
    application["args"] = {**application.get("args", {}), **settings}
    check_model(ServeConfig.parse(**application["args"]).model)
    file["http_options"] = {**file.get("http_options", {}), **http}
    return file


def deploy(config: Mapping[str, Any], dashboard: str, seconds: float) -> None:
    """Deploy, and wait until all replicas run: those of a cluster that grows wait for its nodes.

    dashboard: http://HOST:PORT. Raises LinearSRError when it did not come up, with Serve's reason.
    """
    client = ServeSubmissionClient(dashboard)
    client.deploy_applications(dict(config))
    (name,) = (application["name"] for application in config["applications"])
    told = _ended(client, name, seconds)
    if told["status"] != ApplicationStatus.RUNNING:
        raise LinearSRError(f"{name} is {told['status']}: {one_line(Exception(told['message']))}")


def _ended(client: ServeSubmissionClient, name: str, seconds: float) -> dict[str, Any]:
    """What Serve tells of an application that is no longer being deployed."""
    asking = Retrying(
        wait=wait_fixed(1),
        stop=stop_after_delay(seconds),
        retry=retry_if_result(lambda told: told["status"] in UNDER_WAY),
    )
    try:
        return asking(lambda: client.get_serve_details()["applications"][name])
    except RetryError as error:
        told = error.last_attempt.result()
        waiting = [n for n, d in told["deployments"].items() if d["status"] != "HEALTHY"]
        raise LinearSRError(
            f"{name} is not up after {seconds:g} s, but goes on: {', '.join(waiting)} wait; see "
            "`serve status`, and `ray status` for room"
        ) from None
