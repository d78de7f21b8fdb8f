"""`linearsr serve`: start Ray, or join a cluster, and serve until SIGINT or SIGTERM."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Callable

import ray
from ray import serve
from ray.exceptions import AuthenticationError, RayError
from ray.serve.exceptions import RayServeException

from linearsr.distributed.compat import delete_application, http_address
from linearsr.distributed.local_cluster import expect_private, start
from linearsr.distributed.models import read_config
from linearsr.distributed.resources import ResourceRequest, check_feasible
from linearsr.distributed.serve.build import build_app
from linearsr.distributed.serve.config import ServeConfig
from linearsr.distributed.serve.guard import guard_proxies
from linearsr.errors import LinearSRError, OptionError, one_line

APPLICATION = "linearsr"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run(
    config: ServeConfig, host: str, port: int, on_ready: Callable[[], None] = lambda: None
) -> None:
    """Serve until SIGINT or SIGTERM, then finish the requests in flight.

    on_ready: called once, before the line that says that the endpoint serves.
    Raises OptionError if the cluster is too small, the port is taken or the config has several
    ingresses, and LinearSRError if a deployment does not start.
    """
    if config.ingresses != 1:
        raise OptionError(
            f"ingresses: `linearsr serve` runs one, not {config.ingresses}; deploy "
            "ray_jobs/serve.yaml for more"
        )
    app = build_app(_named(config, host))
    model = read_config(config.model)
    resources = config.resources(model)
    _check_port(host, port)
    # On a busy machine the proxy needs more than 5 s to start, after which Serve would replace it.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    guard_proxies(config.limits)
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
    else:
        # All replicas share this machine's cores, so Ray gets as many CPUs as they reserve.
        start(num_cpus=math.ceil(resources.cpus), include_dashboard=False, **quiet)
    _check_room(config, resources)
    stop = threading.Event()
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: stop.set())
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        serve.start(http_options={"host": host, "port": port})
        serve.run(app, name=APPLICATION)
    except (RuntimeError, ray.exceptions.RayError) as error:
        raise LinearSRError(f"the endpoint did not start: {one_line(error)}") from error
    on_ready()
    print(f"Serving {model.name} at http://{host}:{port}/ (press Ctrl-C to stop)", flush=True)
    # The kernel may deliver a signal to another thread. The handler then runs only when this
    # thread's wait ends, so each wait is short.
    while not stop.wait(timeout=1):
        pass
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler)
    print("Finishing in-flight requests. Press Ctrl-C again to stop now.", flush=True)
    _drain(config.limits.seconds)
    ray.shutdown()


def redeploy(config: ServeConfig, host: str | None, port: int | None) -> str:
    """Deploy over the endpoint that `linearsr serve` runs already; return its address.

    Raises OptionError if there is none, if it listens elsewhere, since Serve cannot move, or if the
    cluster is too small. Raises LinearSRError if a deployment does not start.
    """
    if not os.environ.get("RAY_ADDRESS"):
        expect_private()
    try:
        ray.init(
            address=os.environ.get("RAY_ADDRESS", "auto"),
            log_to_driver=False,
            logging_level="ERROR",
        )
        running = APPLICATION in serve.status().applications
    except AuthenticationError as error:
        raise OptionError(
            "--redeploy: the Ray that runs here has another token than ~/.ray/auth_token"
        ) from error
    except (ConnectionError, RayServeException):
        running = False
    if not running:
        raise OptionError("--redeploy: no endpoint runs here; leave it out")
    listens = http_address()
    if (host or listens[0], port or listens[1]) != listens:
        raise OptionError(
            '--host and --port cannot change while the endpoint runs on {}:{}; see "Opening it to '
            'others" in docs/guides/serving.md'.format(*listens)
        )
    _check_room(config, config.resources(read_config(config.model)))
    app = build_app(_named(config, listens[0]))
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        serve.run(app, name=APPLICATION)
    except (RuntimeError, RayError) as error:
        raise LinearSRError(f"the endpoint did not change: {one_line(error)}") from error
    ray.shutdown()
    return "http://{}:{}/".format(*listens)


def _check_room(config: ServeConfig, resources: ResourceRequest) -> None:
    """Raise OptionError if the cluster can never hold the endpoint."""
    advice = "use fewer --replicas, or lower --expert-cpus and --expert-gpus"
    replica = ResourceRequest(config.expert_cpus, config.expert_gpus)
    check_feasible("the endpoint", resources, replica, advice)


def _named(config: ServeConfig, host: str) -> ServeConfig:
    """Return the config with the names of loopback too, if the endpoint listens there.

    A page of the web may give its own name the address of loopback, and then counts as the
    endpoint's own page.
    """
    if host not in LOOPBACK:
        return config
    return config.model_copy(update={"allowed_hosts": (*LOOPBACK, *config.allowed_hosts)})


def _drain(seconds: float) -> None:
    """Wait for the requests in flight, then delete this application; others on the cluster stay."""
    drained = False
    with contextlib.suppress(KeyboardInterrupt, TimeoutError, RayServeException, RayError):
        serve.get_app_handle(APPLICATION).drain.remote().result(timeout_s=seconds)
        drained = True
    with contextlib.suppress(KeyboardInterrupt, TimeoutError):
        # The proxy still sends the last bytes of drained requests: wait for it.
        delete_application(APPLICATION, wait=drained)


def _check_port(host: str, port: int) -> None:
    """Raise OptionError if the port is taken: Serve would wait for it for ever."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OptionError(
                f"{host}:{port} cannot be used ({error.strerror}); choose another --port or --host"
            ) from error
