"""`linearsr serve`: run the HTTP endpoint and its page on this machine, or on a cluster.

    linearsr serve --layout split --replicas 4

On a fleet, use a Serve config file, whose `args` are the fields of a ServeConfig:

    serve deploy ray_jobs/serve.yaml

Change the token or the limits of a running endpoint, without ending it:

    LINEARSR_TOKEN=... linearsr serve --redeploy --max-pixels 24000000

It runs until Ctrl-C or SIGTERM, and writes no files except Ray's logs and, of a model on S3, this
machine's copy. Exit codes: 0 it was stopped, 1 it did not start, 2 usage.

More: docs/guides/serving.md, docs/guides/sizing.md.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

from linearsr.cli.flags import Commands, add_fields, read_fields
from linearsr.cli.report import OK, say
from linearsr.config import Acceleration
from linearsr.errors import require
from linearsr.web.service import JobLimits, Limits

HOST, PORT = "127.0.0.1", 8000
# The beginnings of the flags of limits.
LIMITS, JOBS = "max-", "jobs-"


def add(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "serve",
        help="run an HTTP endpoint with a web page",
        description="Run an HTTP endpoint, with a web page that upscales the photographs dropped "
        "on it.",
        epilog="Starts Ray on this machine, or joins the cluster at RAY_ADDRESS. If LINEARSR_TOKEN "
        "is set, uploads need it as a bearer token. On a fleet, use a config file instead: see "
        "ray_jobs/serve.yaml and docs/guides/serving.md.",
    )
    parser.set_defaults(run=_run)
    parser.add_argument(
        "--model", default="linearsr-tiny", help="name of a bundled model, or a folder of weights"
    )
    parser.add_argument("--host", help="address to listen on, 0.0.0.0 for all (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (default: 8000)")
    parser.add_argument(
        "--device", default="auto", help="device that models run on: auto, cpu, cuda or mps"
    )
    parser.add_argument(
        "--layout",
        choices=("together", "split"),
        default="together",
        help="together: each replica holds all experts; split: each expert has its own replicas",
    )
    parser.add_argument(
        "--replicas",
        type=int,
        help="number of replicas in total; with --layout split they are divided among the experts, "
        "at least one each (default: 1, or 4 if split)",
    )
    parser.add_argument(
        "--expert-cpus",
        type=float,
        help="CPU threads of each replica (default: all cores, or 1 if split)",
    )
    parser.add_argument(
        "--expert-gpus",
        type=float,
        default=0,
        help="GPUs of each replica; with 0 it runs on the CPU, with 0.25 four replicas share a GPU",
    )
    parser.add_argument(
        "--router-memory",
        type=int,
        help="bytes of memory that requests may need together; others wait (default: 70%% of what "
        "is free at the start)",
    )
    parser.add_argument(
        "--cors-origins",
        nargs="+",
        default=[],
        metavar="ORIGIN",
        help="other origins, such as https://example.org, whose pages may use the endpoint",
    )
    parser.add_argument(
        "--allowed-hosts",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names of the endpoint in the Host header, such as example.org behind a proxy; '*' "
        "for any (default: only those of loopback if it listens there, else any)",
    )
    add_fields(parser, Acceleration)
    add_fields(parser, Limits, prefix=LIMITS)
    add_fields(parser, JobLimits, prefix=JOBS)
    parser.add_argument(
        "--redeploy",
        action="store_true",
        help="give these flags, and LINEARSR_TOKEN, to the endpoint that `linearsr serve` runs on "
        "this machine already, without ending it; flags that are left out get their defaults",
    )


def _run(arguments: argparse.Namespace) -> int:
    require("serve", "ray")
    from linearsr.cli.progress import Display

    if not arguments.redeploy:
        say(f"Loading {arguments.model} and starting Ray.")
    with Display(f"loading {arguments.model}", share=False) as display:
        return _serve(arguments, display.close)


def _serve(arguments: argparse.Namespace, on_ready: Callable[[], None]) -> int:
    from linearsr.distributed.serve import ServeConfig
    from linearsr.distributed.serve.local import redeploy, run

    split = arguments.layout == "split"
    config = ServeConfig.parse(
        model=arguments.model,
        device=arguments.device,
        layout=arguments.layout,
        replicas=_value(arguments.replicas, 4 if split else 1),
        expert_cpus=_value(arguments.expert_cpus, 1 if split else os.cpu_count() or 1),
        expert_gpus=arguments.expert_gpus,
        router_memory=arguments.router_memory,
        cors_origins=tuple(arguments.cors_origins),
        allowed_hosts=tuple(arguments.allowed_hosts),
        acceleration=read_fields(arguments, Acceleration),
        limits=read_fields(arguments, Limits, LIMITS),
        jobs=read_fields(arguments, JobLimits, JOBS),
    )
    if arguments.redeploy:
        address = redeploy(config, arguments.host, arguments.port)
        on_ready()
        print(f"Redeployed {arguments.model} at {address}")
        return OK
    run(config, arguments.host or HOST, arguments.port or PORT, on_ready)
    return OK


def _value(value: float | None, default: float) -> float:
    return default if value is None else value
