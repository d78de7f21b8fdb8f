"""Deploy a Serve config file, with some of its fields changed, on a running cluster."""

from __future__ import annotations

import os
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
from linearsr.distributed.serve.ingress import TOKEN
from linearsr.errors import LinearSRError, OptionError, one_line
from linearsr.web.api import digest

DEPLOYING = (ApplicationStatus.NOT_STARTED, ApplicationStatus.DEPLOYING)


def read_file(
    path: Path, settings: Mapping[str, Any], *, port: int | None = None, on_head: bool = False
) -> dict[str, Any]:
    """Return the content of a Serve config file, with `settings` put into its ServeConfig.

    The file has one application. If LINEARSR_TOKEN is set, uploads will need it.
    port: the HTTP port, if not the file's.
    on_head: whether the HTTP proxy and the ingress run on the head only.
    Raises OptionError for a wrong file, field or value, and WeightsError for a wrong model.
    """
    try:
        file = yaml.safe_load(path.read_text())
        (application,) = file["applications"]
        fields = {**(application.get("args") or {}), **settings}
        args = {str(field): value for field, value in fields.items()}
        application.setdefault("name", "default")  # as Serve does
        http = {**(file.get("http_options") or {})}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise OptionError(
            f"{path}: not a Serve config file with one application: {error}"
        ) from error
    if port is not None:
        http["port"] = port
    if on_head:
        args["ingress_node"], file["proxy_location"] = "head", "HeadOnly"
    if token := digest(os.environ.get(TOKEN)):
        args["token_sha256"] = token
    check_model(ServeConfig.parse(**args).model)
    return {**file, "http_options": http, "applications": [{**application, "args": args}]}


def deploy(config: Mapping[str, Any], dashboard: str, seconds: float) -> str:
    """Deploy, wait until all replicas run, and return HOST:PORT of the endpoint.

    On an autoscaling cluster, replicas wait for their nodes. dashboard: http://HOST:PORT.
    Raises LinearSRError, with Serve's reason, if Serve rejects the config or the application does
    not run within `seconds`.
    """
    client = serve_client(dashboard)
    try:
        client.deploy_applications(dict(config))
    except RuntimeError as error:
        raise LinearSRError(f"Serve rejected the config: {one_line(error)}") from error
    (name,) = (application["name"] for application in config["applications"])
    details = _wait(client, name, seconds)
    if details["status"] != ApplicationStatus.RUNNING:
        reason = one_line(Exception(details["message"]))
        raise LinearSRError(f"{name} is {details['status']}: {reason}")
    http = client.get_serve_details()["http_options"]
    return f"{http['host']}:{http['port']}"


def _wait(client: Any, name: str, seconds: float) -> dict[str, Any]:
    """Return Serve's details of an application as soon as it is no longer deploying."""
    retrying = Retrying(
        wait=wait_fixed(1),
        stop=stop_after_delay(seconds),
        retry=retry_if_result(lambda details: details["status"] in DEPLOYING)
        # Raised while the dashboard or Serve's controller restarts.
        | retry_if_exception_type((RuntimeError, KeyError, RequestException)),
    )
    try:
        return retrying(lambda: client.get_serve_details()["applications"][name])
    except RetryError as error:
        if reason := error.last_attempt.exception():
            raise LinearSRError(f"Serve does not report the status of {name}: {reason}") from error
        deployments = error.last_attempt.result()["deployments"].items()
        waiting = [part for part, details in deployments if details["status"] != "HEALTHY"]
        raise LinearSRError(
            f"{name} does not run after {seconds:g} s, but Serve is still deploying it "
            f"(waiting for {', '.join(waiting)}); check `serve status`, and `ray status` for free "
            "CPUs and GPUs"
        ) from None
