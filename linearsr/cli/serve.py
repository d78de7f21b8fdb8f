"""`linearsr serve`: run the HTTP endpoint and its web page on this machine or on a cluster.

    linearsr serve --layout split --replicas 4

For a fleet, describe the deployment in a file, whose `args` are the fields of a ServeConfig:

    serve deploy ray_jobs/serve.yaml

The command runs until Ctrl-C or SIGTERM and writes no files except Ray's logs. Exit codes:
0 stopped on request, 1 the endpoint did not start, 2 usage error.

More: docs/guides/serving.md, docs/guides/sizing.md.
"""

from __future__ import annotations

import argparse
import os

from linearsr.cli.flags import HelpFormatter
from linearsr.cli.report import OK
from linearsr.errors import require


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "serve",
        help="run an HTTP endpoint with a web page",
        description="Run an HTTP endpoint, with a web page that upscales the photographs dropped "
        "on it.",
        formatter_class=HelpFormatter,
        epilog="Starts Ray on this machine, or joins the cluster that RAY_ADDRESS names. If "
        "LINEARSR_TOKEN is set, uploads must send it as a bearer token. Describe a fleet in a "
        "file instead: see ray_jobs/serve.yaml and docs/guides/serving.md.",
    )
    parser.set_defaults(run=_run)
    parser.add_argument(
        "--model", default="linearsr-tiny", help="name of a bundled model, or a folder of weights"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 admits other machines"
    )
    parser.add_argument("--port", type=int, default=8000, help="port to listen on")
    parser.add_argument(
        "--device", default="auto", help="device that models run on: auto, cpu, cuda or mps"
    )
    parser.add_argument(
        "--layout",
        choices=("together", "split"),
        default="together",
        help="placement of the experts: together in each replica, or split over their own replicas",
    )
    parser.add_argument(
        "--replicas", type=int, help="number of replicas in all (default: 1, or 1 for each expert)"
    )
    parser.add_argument(
        "--replica-cpus",
        type=float,
        help="CPU threads of each replica (default: all cores, or 1 with --layout split)",
    )
    parser.add_argument(
        "--replica-gpus",
        type=float,
        default=0,
        help="GPUs of each replica; with 0.25, four replicas share a GPU",
    )


def _run(arguments: argparse.Namespace) -> int:
    require("serve", "ray")
    from linearsr.distributed.serve import ServeConfig
    from linearsr.distributed.serve.local import run

    split = arguments.layout == "split"
    replicas, cpus = arguments.replicas, arguments.replica_cpus
    config = ServeConfig.parse(
        model=arguments.model,
        device=arguments.device,
        layout=arguments.layout,
        replicas=(4 if split else 1) if replicas is None else replicas,
        expert_cpus=(1 if split else os.cpu_count() or 1) if cpus is None else cpus,
        expert_gpus=arguments.replica_gpus,
    )
    run(config, arguments.host, arguments.port)
    return OK
