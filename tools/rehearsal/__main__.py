"""Rehearse the whole story: `make rehearse`, or `python -m tools.rehearsal`.

Without flags on this machine: an autoscaling Ray cluster with the node types of cluster.yaml, an S3
server, and the photographs of scikit-image. `--storage s3://BUCKET/FOLDER` rehearses on a real
cluster instead, whose dashboard and endpoint are forwarded to this machine (`ray dashboard`, `ray
attach -p 8000`); what has been done there is not done again. OUTPUT/README.md has the table and
the pictures, OUTPUT/*.log what the jobs said, OUTPUT/weights what was trained.
Exit codes: 0 all green, 1 a stage failed, 2 usage.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from linearsr.errors import LinearSRError
from linearsr.storage.location import locate
from tools.rehearsal.machine import Place, machine
from tools.rehearsal.photographs import gather
from tools.rehearsal.run import run
from tools.rehearsal.scenario import story

OUTPUT = Path("runs/rehearsal")


def main() -> int:
    """Parse, rehearse, print the table."""
    parser = _parser()
    options = parser.parse_args()
    if options.gpu and not options.storage:
        parser.error("--gpu is for a real cluster (--storage): nodes of this machine have none")
    if not urlsplit(options.endpoint).port:
        parser.error(f"--endpoint is http://HOST:PORT, not {options.endpoint}")
    options.output.mkdir(parents=True, exist_ok=True)
    try:
        with _place(options) as place:
            gather(options.photos, place.storage)
            stages = story(place, gpu=options.gpu)
            run(stages, place, options.output)
            locate(f"{place.storage}/runs/experts/weights").copy_to(
                locate(options.output / "weights")
            )
    except (LinearSRError, RuntimeError) as error:
        print(f"rehearsal: {error}", file=sys.stderr)
        return 1
    print(f"{options.output}/README.md has the table and the pictures")
    return 0


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m tools.rehearsal",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--storage", help="s3://BUCKET/FOLDER: on a real cluster, with this folder")
    made.add_argument("--dashboard", default="http://127.0.0.1:8265", help="the real cluster's")
    made.add_argument("--endpoint", default="http://127.0.0.1:8000", help="the real cluster's")
    made.add_argument("--gpu", action="store_true", help="a GPU for each worker, actor and expert")
    made.add_argument("--photos", type=Path, help="a folder of photographs of your own")
    made.add_argument("--output", type=Path, default=OUTPUT)
    return made


@contextlib.contextmanager
def _place(options: argparse.Namespace) -> Iterator[Place]:
    if options.storage is None:
        with machine(options.output / "ray.log") as place:
            yield place
    else:
        addresses = options.dashboard, options.endpoint, options.storage
        yield Place(*(address.rstrip("/") for address in addresses))


if __name__ == "__main__":
    sys.exit(main())
