"""What the scripts in ray_jobs/ share: how they end, their cluster, and the flags of training."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from linearsr.cli.report import exit_code
from linearsr.errors import LinearSRError, OptionError, require

if TYPE_CHECKING:
    from linearsr.cluster.config import ClusterConfig
    from linearsr.training.recipes import Recipe

# Which logical resources of a ClusterConfig get a flag of their own.
_FLAGS: dict[str, str] = {
    "workers": "training workers",
    "worker-cpus": "logical CPUs of each",
    "data-cpus": "logical CPUs of each worker's data actor",
    "validation-cpus": "logical CPUs of the validation task",
    "validation-gpus": "GPUs of the validation task",
    "keep": "how many of the latest checkpoints stay (the knee always does)",
    "max-failures": "worker failures to recover from",
    "patience": "end a stage so many checkpoints after its knee was confirmed",
}


def parser(description: str) -> argparse.ArgumentParser:
    """Flags of both training jobs. Raises MissingExtra without the packages that they need."""
    require("train", "ray", "deepspeed")
    from linearsr.training.recipes import RECIPES

    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    made.add_argument("--recipe", choices=RECIPES, default="tiny_cpu")
    made.add_argument("--data", required=True, help="pictures or shards to train on; s3:// too")
    made.add_argument("--validation", required=True, help="pictures to validate on; s3:// too")
    made.add_argument("--storage", required=True, help="where runs go: shared folder or s3://")
    made.add_argument("--name", default="linearsr", help="the run's folder; an old one goes on")
    made.add_argument("--gpu", action="store_true", help="one GPU per worker (NCCL)")
    for flag, told in _FLAGS.items():
        made.add_argument(f"--{flag}", help=f"{told}; default {_default(flag)}")
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="any field of the recipe, as pretrain.steps=1000 or experts.0.learning_rate=1e-4",
    )
    return made


def _default(flag: str) -> object:
    from linearsr.cluster.config import ClusterConfig

    return ClusterConfig.model_fields[flag.replace("-", "_")].default


def configs(options: argparse.Namespace) -> tuple[Recipe, ClusterConfig]:
    """What the flags say. Raises OptionError naming the field."""
    from linearsr.cluster.config import ClusterConfig
    from linearsr.training.recipes import RECIPES, override

    recipe = override(RECIPES[options.recipe](), options.set)
    asked = {flag.replace("-", "_") for flag in _FLAGS}
    fields = {k: v for k, v in vars(options).items() if k in asked and v is not None}
    places = {k: getattr(options, k) for k in ("data", "validation", "storage", "name", "gpu")}
    return recipe, validated(ClusterConfig, {**places, **fields})


def validated(kind: type[ClusterConfig], fields: dict[str, object]) -> ClusterConfig:
    """A ClusterConfig from untyped fields. Raises OptionError."""
    from pydantic import ValidationError

    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        flag = str(first["loc"][0]).replace("_", "-")
        raise OptionError(f"--{flag}: {first['msg']} (got {first['input']!r})") from error


def run(main: Callable[[], int | None]) -> NoReturn:
    """Do the job's `main` and end the process with its exit code, errors told in a line each."""
    sys.exit(exit_code(main, "start it again to go on"))


def connect() -> None:
    """Connect to the cluster that RAY_ADDRESS names (`ray job submit` sets it), or start one here.

    Raises MissingExtra without Ray, LinearSRError when there is no such cluster.
    """
    require("data", "ray")
    import ray

    # A report waits for the controller's next look; its default of 2 s would be felt.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # Workers may wait for a GPU node that the autoscaler orders: that takes minutes.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "900")
    try:
        ray.init(log_to_driver=True, logging_level="WARNING")
    except ConnectionError as error:
        raise LinearSRError(f"no cluster to be reached: {error}; see RAY_ADDRESS") from error
