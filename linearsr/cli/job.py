"""`linearsr job`: run a job of linearsr.cli.jobs here, or submit it to a cluster.

The scripts in ray_jobs/ are the same jobs with the same flags.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import NoReturn

from linearsr.cli.flags import Commands, JobHelpFormatter, Parser
from linearsr.cli.report import exit_code

JOBS = {
    "build-shards": "build a shard dataset from folders of pictures",
    "tag-dataset": "name what the pictures of a shard dataset show",
    "plan": "print the memory and the hours of a training",
    "pretrain": "pretrain one model and find its knee",
    "finetune-experts": "fine-tune four experts from a pretraining run",
    "upscale-dataset": "upscale a folder, a bucket or shards",
    "evaluate": "measure models and results",
    "deploy": "deploy the endpoint on a cluster",
}
# Jobs that cannot be submitted, since they only print something.
WITHOUT_CLUSTER = ("plan",)


def add(commands: Commands, words: Sequence[str]) -> None:
    """Add the subcommand.

    words: the command line. Only the job that it names gets its flags, since reading the configs
    of all jobs takes seconds.
    """
    command = commands.add_parser(
        "job",
        help="run a job on a dataset or a training, here or on a cluster",
        description="Run a job here, or on a Ray cluster with --submit.",
        epilog="linearsr job JOB --help shows the flags of a job.",
    )
    jobs = command.add_subparsers(required=True, metavar="JOB")
    for name, text in JOBS.items():
        job = jobs.add_parser(name, help=text, formatter_class=JobHelpFormatter)
        if list(words[:2]) == ["job", name]:
            _fill(job, name)


def parser(name: str) -> Parser:
    """Return the parser of a job. Raises MissingExtra without the packages that the job needs."""
    job = Parser(formatter_class=JobHelpFormatter)
    _fill(job, name)
    return job


def run(name: str, arguments: Sequence[str] | None = None) -> int:
    """Parse the flags of a job, run it, and return its exit code; an error is one line."""

    def parse_and_run() -> int:
        options = parser(name).parse_args(arguments)
        code: int = options.run(options)
        return code

    return exit_code(parse_and_run, "start it again to continue")


def main(name: str) -> NoReturn:
    """Run a job with the arguments of this process, and end with its exit code."""
    sys.exit(run(name))


def _fill(job: Parser, name: str) -> None:
    """Give a parser the flags of a job, and the function that runs it."""
    module = import_module(f"linearsr.cli.jobs.{name.replace('-', '_')}")
    job.description = module.__doc__
    module.add_flags(job)
    if name in WITHOUT_CLUSTER:
        job.set_defaults(run=module.run)
        return
    job.add_argument(
        "--submit",
        action="store_true",
        help="send the job to a running Ray cluster, print its log, and end with its exit code; "
        "without this flag, the job runs here, or on the cluster of RAY_ADDRESS",
    )
    job.add_argument(
        "--address",
        metavar="URL",
        help="address of that cluster's dashboard; by default RAY_ADDRESS, or "
        "http://127.0.0.1:8265",
    )
    job.set_defaults(run=partial(_run, job, name))


def _run(job: Parser, name: str, options: argparse.Namespace) -> int:
    module = import_module(f"linearsr.cli.jobs.{name.replace('-', '_')}")
    if not options.submit:
        if options.address:
            job.error("--address is for --submit; for a job that runs here, set RAY_ADDRESS")
        return exit_code(lambda: module.run(options), "start it again to continue")
    from linearsr.cli.submit import submit

    return submit(job, name, options, places=module.PLACES, sent=module.SENT)
