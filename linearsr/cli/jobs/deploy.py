"""Deploy the endpoint of ray_jobs/serve.yaml on the cluster, with new weights or another size.

    linearsr job deploy --submit \\
        --set model=s3://runs/experts/weights replicas=8 expert_gpus=0.25

Waits until all replicas run. An endpoint that runs already is replaced without dropping a request.
Exit codes: 0 it runs, 1 it did not start, 2 usage.

More: docs/guides/serving.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from linearsr.cli.jobs import shared
from linearsr.errors import OptionError, require

# A link to ray_jobs/serve.yaml, which the wheel holds as a file.
SERVE_FILE = Path(__file__).with_name("serve.yaml")
PLACES = ()
SENT = ("file",)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the file and of the changes to it."""
    parser.add_argument(
        "--file",
        type=Path,
        help="Serve config file (default: ray_jobs/serve.yaml, which comes with the package)",
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


def run(options: argparse.Namespace) -> None:
    """Deploy, and print the endpoint's address."""
    require("serve", "ray", "tenacity")
    from linearsr.distributed.serve.deploy import deploy, read_file

    config = read_file(
        options.file or SERVE_FILE,
        _settings(options.set),
        port=options.port,
        on_head=options.on_head,
    )
    dashboard = shared.connect(data=False)
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
