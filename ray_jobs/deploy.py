"""Deploy the endpoint of ray_jobs/serve.yaml on the cluster, with new weights or another size.

    ray job submit --working-dir . -- python ray_jobs/deploy.py \\
        --set model=s3://runs/experts/weights replicas=8 expert_gpus=0.25

Waits until all replicas run. An endpoint that runs already is replaced without dropping a request.
Exit codes: 0 it runs, 1 it did not start, 2 usage.

More: docs/guides/serving.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from linearsr.cli import job
from linearsr.errors import OptionError, require


def parser() -> argparse.ArgumentParser:
    """Return the parser of the job's flags."""
    parser = job.new_parser(__doc__)
    parser.add_argument(
        "--file", type=Path, default=Path("ray_jobs/serve.yaml"), help="Serve config file"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD=VALUE",
        help="fields of `args` in the file to change",
    )
    parser.add_argument(
        "--port",
        type=int,
        help="HTTP port, instead of the file's; has no effect if Serve is already running",
    )
    parser.add_argument(
        "--on-head",
        action="store_true",
        help="run the HTTP proxy and the ingress only on the head node, so that losing another "
        "node loses no request; if Serve is already running, its proxy is not moved",
    )
    parser.add_argument(
        "--wait", type=float, default=900, help="maximum seconds to wait until all replicas run"
    )
    return parser


def main() -> None:
    """Parse the flags, deploy, and print the endpoint's address."""
    options = parser().parse_args()
    require("serve", "ray", "tenacity")
    from linearsr.distributed.serve.deploy import deploy, read_file

    config = read_file(
        options.file, _settings(options.set), port=options.port, on_head=options.on_head
    )
    dashboard = job.connect(data=False)
    print(f"The endpoint listens on {deploy(config, dashboard, options.wait)}")


def _settings(arguments: list[str]) -> dict[str, object]:
    import yaml

    pairs = [argument.partition("=") for argument in arguments]
    if wrong := [name for name, equals, _ in pairs if not equals]:
        raise OptionError(f"--set {wrong[0]}: write FIELD=VALUE, such as replicas=8")
    try:
        return {name: yaml.safe_load(value) for name, _, value in pairs}
    except yaml.YAMLError as error:
        raise OptionError(f"--set: a value is not YAML: {error}") from error


if __name__ == "__main__":
    job.run(main)
