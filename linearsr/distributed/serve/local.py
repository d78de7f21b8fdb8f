"""An endpoint from one command: Ray started here, or a cluster joined, until it is told to stop."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import threading

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from linearsr.distributed.compat import delete_application
from linearsr.distributed.models import read_config
from linearsr.distributed.resources import ResourceRequest, check_feasible
from linearsr.distributed.serve.config import ServeConfig
from linearsr.distributed.serve.ingress import build_app
from linearsr.errors import LinearSRError, OptionError, one_line

APPLICATION = "linearsr"


def run(config: ServeConfig, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises OptionError for what the cluster has no room for, a port that is taken, or several
    ingresses, and LinearSRError when a deployment does not come up.
    """
    if config.ingresses != 1:
        raise OptionError("one command has one ingress; deploy more by ray_jobs/serve.yaml")
    app = build_app(config)
    model = read_config(config.model)
    cpus, gpus = config.reserved(model)
    _check_port(host, port)
    # Replicas here are threads of the same cores: what they reserve is what Ray is told there is.
    # "local": whatever other Ray runs on this machine is left alone.
    here = {"address": "local", "num_cpus": math.ceil(cpus), "include_dashboard": False}
    joined = bool(os.environ.get("RAY_ADDRESS"))
    ray.init(log_to_driver=False, logging_level="ERROR", **({} if joined else here))
    advice = "use fewer --replicas, or lower --replica-cpus and --replica-gpus"
    replica = ResourceRequest(config.expert_cpus, config.expert_gpus)
    check_feasible("the endpoint", ResourceRequest(cpus, gpus), replica, advice)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        serve.start(http_options={"host": host, "port": port})
        serve.run(app, name=APPLICATION)
    except RuntimeError as error:
        raise LinearSRError(f"the endpoint did not come up: {one_line(error)}") from error
    print(f"LinearSR serves {model.name} at http://{host}:{port}/  (Ctrl-C ends it)", flush=True)
    stop.wait()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    print("ending when requests under way have; again Ctrl-C ends them", flush=True)
    _drain(config.limits.seconds)
    ray.shutdown()


def _drain(seconds: float) -> None:
    """Wait for requests under way, then take the endpoint down; other applications stay."""
    wait = False
    with contextlib.suppress(KeyboardInterrupt, TimeoutError, RayServeException, RayError):
        serve.get_app_handle(APPLICATION).drain.remote().result(timeout_s=seconds)
        wait = True  # until the last bytes are with the proxy
    with contextlib.suppress(KeyboardInterrupt, TimeoutError):
        delete_application(APPLICATION, wait=wait)


def _check_port(host: str, port: int) -> None:
    """Serve itself would wait for a port that is taken for ever."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OptionError(
                f"{host}:{port} cannot be used ({error.strerror}); choose another --port or --host"
            ) from error
