"""A Serve config file, with some of its fields set, onto a running cluster."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from ray.serve.schema import ApplicationStatus
from requests import RequestException
from tenacity import (
    RetryError,
    Retrying,
    retry_if_exception_type,
    retry_if_result,
    stop_after_delay,
    wait_fixed,
)

from linearsr.distributed.compat import serve_client
from linearsr.distributed.models import check_model
from linearsr.distributed.serve.config import ServeConfig
from linearsr.errors import LinearSRError, OptionError, one_line

UNDER_WAY = (ApplicationStatus.NOT_STARTED, ApplicationStatus.DEPLOYING)


def read_file(
    path: Path, settings: Mapping[str, Any], *, port: int | None = None, on_head: bool = False
) -> dict[str, Any]:
    """The file with fields of its one application's ServeConfig replaced.

    port: of HTTP, instead of the file's. on_head: HTTP proxy and ingress on the head alone.
    Raises OptionError for a file, field or value that is none, and WeightsError for a model.
    """
    try:
        file = yaml.safe_load(path.read_text())
        (application,) = file["applications"]
        given = {**(application.get("args") or {}), **settings}
        args = {str(field): value for field, value in given.items()}
        application.setdefault("name", "default")  # as Serve does
        http = {**(file.get("http_options") or {})}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise OptionError(f"{path}: not a Serve config file of one application: {error}") from error
    if port is not None:
        http["port"] = port
    if on_head:
        args["ingress_node"], file["proxy_location"] = "head", "HeadOnly"
    check_model(ServeConfig.parse(**args).model)
    return {**file, "http_options": http, "applications": [{**application, "args": args}]}


def deploy(config: Mapping[str, Any], dashboard: str, seconds: float) -> str:
    """Deploy, and wait until all replicas run: those of a cluster that grows wait for its nodes.

    dashboard: http://HOST:PORT. Returns where it listens. Raises LinearSRError when Serve does not
    take it, or it did not come up, with Serve's reason.
    """
    client = serve_client(dashboard)
    try:
        client.deploy_applications(dict(config))
    except RuntimeError as error:
        raise LinearSRError(f"Serve does not take it: {one_line(error)}") from error
    (name,) = (application["name"] for application in config["applications"])
    told = _ended(client, name, seconds)
    if told["status"] != ApplicationStatus.RUNNING:
        raise LinearSRError(f"{name} is {told['status']}: {one_line(Exception(told['message']))}")
    listens = client.get_serve_details()["http_options"]
    return f"{listens['host']}:{listens['port']}"


def _ended(client: Any, name: str, seconds: float) -> dict[str, Any]:
    """What Serve tells of an application that is no longer being deployed."""
    asking = Retrying(
        wait=wait_fixed(1),
        stop=stop_after_delay(seconds),
        retry=retry_if_result(lambda told: told["status"] in UNDER_WAY)
        # While the dashboard or Serve's controller is started again.
        | retry_if_exception_type((RuntimeError, KeyError, RequestException)),
    )
    try:
        return asking(lambda: client.get_serve_details()["applications"][name])
    except RetryError as error:
        if reason := error.last_attempt.exception():
            raise LinearSRError(f"Serve does not tell of {name}: {reason}") from error
        told = error.last_attempt.result()
        waiting = [n for n, d in told["deployments"].items() if d["status"] != "HEALTHY"]
        raise LinearSRError(
            f"{name} is not up after {seconds:g} s, but goes on: {', '.join(waiting)} wait; see "
            "`serve status`, and `ray status` for room"
        ) from None
