"""Rehearse all jobs in order: `make rehearse`, or `python -m tools.rehearsal`.

Without flags it runs on this machine: an autoscaling Ray cluster with the node types of
cluster.yaml, an S3 server, and the photographs of scikit-image. `--storage s3://BUCKET/FOLDER`
rehearses on a real cluster instead, whose dashboard and endpoint are forwarded to this machine
(`ray dashboard`, `ray attach -p 8000`); finished work there is not repeated. OUTPUT/README.md has a
table and pictures, OUTPUT/*.log the output of the jobs, and OUTPUT/weights the trained weights.
Exit codes: 0 all green, 1 a step failed, 2 usage.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from linearsr.cli.flags import Parser
from linearsr.errors import LinearSRError
from linearsr.storage.location import locate
from tools.rehearsal.machine import Target, machine
from tools.rehearsal.photographs import gather
from tools.rehearsal.run import run
from tools.rehearsal.scenario import scenario

OUTPUT = Path("runs/rehearsal")


def main() -> int:
    """Parse the flags, rehearse, and print where the results are."""
    parser = _parser()
    options = parser.parse_args()
    if options.gpu and not options.storage:
        parser.error("--gpu is for a real cluster (--storage): nodes of this machine have no GPU")
    if not urlsplit(options.endpoint).port:
        parser.error(f"--endpoint is http://HOST:PORT, not {options.endpoint}")
    options.output.mkdir(parents=True, exist_ok=True)
    try:
        with _target(options) as target:
            gather(options.photos, target.storage)
            steps = scenario(target, gpu=options.gpu)
            run(steps, target, options.output)
            locate(f"{target.storage}/runs/experts/weights").copy_to(
                locate(options.output / "weights")
            )
    except (LinearSRError, RuntimeError) as error:
        print(f"rehearsal: {error}", file=sys.stderr)
        return 1
    print(f"{options.output}/README.md has the table and the pictures")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m tools.rehearsal",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--storage", help="s3://BUCKET/FOLDER of a real cluster to rehearse on")
    parser.add_argument(
        "--dashboard", default="http://127.0.0.1:8265", help="dashboard of the real cluster"
    )
    parser.add_argument(
        "--endpoint", default="http://127.0.0.1:8000", help="endpoint of the real cluster"
    )
    parser.add_argument(
        "--gpu", action="store_true", help="give each worker, actor and expert a GPU"
    )
    parser.add_argument("--photos", type=Path, help="folder of photographs to use instead")
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, help=f"folder for results ({OUTPUT})"
    )
    return parser


@contextlib.contextmanager
def _target(options: argparse.Namespace) -> Iterator[Target]:
    if options.storage is None:
        with machine(options.output / "ray.log") as target:
            yield target
    else:
        addresses = options.dashboard, options.endpoint, options.storage
        yield Target(*(address.rstrip("/") for address in addresses))


if __name__ == "__main__":
    sys.exit(main())
