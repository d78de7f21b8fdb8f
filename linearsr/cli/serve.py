"""`linearsr serve`: the HTTP endpoint and its page on this machine, or on a cluster.

    linearsr serve --layout split --replicas 4

On a fleet, a file says the same and more; its `args` are the fields of a ServeConfig:

    serve deploy ray_jobs/serve.yaml

It runs until Ctrl-C or SIGTERM, and writes no files but Ray's logs. Exit codes: 0 told to end,
1 it did not come up, 2 usage.

More: docs/guides/serving.md, docs/guides/sizing.md.
"""

from __future__ import annotations

import argparse
import os

from linearsr.cli.report import OK
from linearsr.errors import require


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "serve",
        help="answer HTTP requests, with a page to drop a photograph on",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="Starts Ray on this machine, or joins the cluster that RAY_ADDRESS names. With "
        "LINEARSR_TOKEN set, uploads need it as bearer token. A fleet is better described by a "
        "file: see ray_jobs/serve.yaml and docs/guides/serving.md.",
    )
    parser.set_defaults(run=_run)
    parser.add_argument(
        "--model", default="linearsr-tiny", help="a bundled model's name or a folder"
    )
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, default=8000, help="a free one")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument(
        "--layout",
        choices=("together", "split"),
        default="together",
        help="all experts in each replica, or replicas of their own for each",
    )
    parser.add_argument(
        "--replicas", type=int, help="in all; one, or one for each expert, by default"
    )
    parser.add_argument("--replica-cpus", type=float, help="threads of each; by default all cores")
    parser.add_argument("--replica-gpus", type=float, default=0, help="0.25: four share one GPU")


def _run(arguments: argparse.Namespace) -> int:
    require("serve", "ray")
    from linearsr.distributed.serve import ServeConfig
    from linearsr.distributed.serve.local import run

    split = arguments.layout == "split"
    config = ServeConfig.parse(
        model=arguments.model,
        device=arguments.device,
        layout=arguments.layout,
        replicas=_given(arguments.replicas, 4 if split else 1),
        expert_cpus=_given(arguments.replica_cpus, 1 if split else os.cpu_count() or 1),
        expert_gpus=arguments.replica_gpus,
    )
    run(config, arguments.host, arguments.port)
    return OK


def _given(value: float | None, default: float) -> float:
    return default if value is None else value
