"""Deploy the endpoint of ray_jobs/serve.yaml on the cluster, with new weights or another size.

    ray job submit --working-dir . -- python ray_jobs/deploy.py \\
        --set model=s3://runs/experts/weights replicas=8 expert_gpus=0.25

Waits until all replicas run. Deployed over an old one, no request is dropped. Exit codes: 0 it
runs, 1 it did not come up, 2 usage.

More: docs/guides/serving.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from linearsr.cli import job
from linearsr.errors import OptionError, require


def parser() -> argparse.ArgumentParser:
    """What may be set."""
    made = job.new_parser(__doc__)
    made.add_argument(
        "--file", type=Path, default=Path("ray_jobs/serve.yaml"), help="a Serve config"
    )
    made.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD=VALUE",
        help="fields of `args` in the file",
    )
    made.add_argument("--port", type=int, help="instead of the file's, if Serve does not run yet")
    made.add_argument(
        "--on-head",
        action="store_true",
        help="HTTP proxy and ingress on the head alone: no other node takes requests along; the "
        "proxy only if Serve does not run yet",
    )
    made.add_argument("--wait", type=float, default=900, help="seconds for all replicas to run")
    return made


def main() -> None:
    """Parse, deploy, tell where it listens."""
    options = parser().parse_args()
    require("serve", "ray", "tenacity")
    from linearsr.distributed.serve.deploy import deploy, read_file

    config = read_file(
        options.file, _settings(options.set), port=options.port, on_head=options.on_head
    )
    dashboard = job.connect(data=False)
    print(f"it listens on {deploy(config, dashboard, options.wait)}")


def _settings(given: list[str]) -> dict[str, object]:
    import yaml

    pairs = [setting.partition("=") for setting in given]
    if wrong := [name for name, found, _ in pairs if not found]:
        raise OptionError(f"{wrong[0]!r}: settings look like replicas=8")
    try:
        return {name: yaml.safe_load(value) for name, _, value in pairs}
    except yaml.YAMLError as error:
        raise OptionError(f"a value of --set is not YAML: {error}") from error


if __name__ == "__main__":
    job.run(main)
