"""Deploy the endpoint of ray_jobs/serve.yaml on the cluster, with new weights or another size.

    ray job submit --working-dir . -- python ray_jobs/deploy.py \\
        --set model=s3://runs/experts/weights replicas=8 expert_gpus=0.25

Waits until all replicas run. Deployed over an old one, no request is dropped. Exit codes: 0 it
runs, 1 it did not come up, 2 usage.

More: docs/serving.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml

from linearsr.cli import job
from linearsr.errors import OptionError

FILE = Path("ray_jobs/serve.yaml")


def parser() -> argparse.ArgumentParser:
    """What may be set."""
    made = job.described(__doc__)
    made.add_argument("--file", type=Path, default=FILE, help="a Serve config")
    made.add_argument(
        "--set", nargs="+", default=[], metavar="FIELD=VALUE", help="fields of `args` in the file"
    )
    made.add_argument("--port", type=int, help="instead of the file's, if Serve does not run yet")
    made.add_argument("--wait", type=float, default=900, help="seconds for all replicas to run")
    return made


def main() -> None:
    """Parse, deploy, tell where it listens."""
    options = parser().parse_args()
    import ray

    from linearsr.cluster.serve.deploy import deploy, read_file

    http = {} if options.port is None else {"port": options.port}
    config = read_file(options.file, dict(map(_field, options.set)), http)
    job.connect()
    dashboard = ray.init(ignore_reinit_error=True).dashboard_url
    deploy(config, f"http://{dashboard}", options.wait)
    model, listens = config["applications"][0]["args"]["model"], config["http_options"]
    print(f"{model} is served at port {listens['port']} of {listens['host']}")


def _field(setting: str) -> tuple[str, object]:
    name, found, value = setting.partition("=")
    if not found:
        raise OptionError(f"{setting!r}: settings look like replicas=8")
    return name, yaml.safe_load(value)


if __name__ == "__main__":
    job.run(main)
