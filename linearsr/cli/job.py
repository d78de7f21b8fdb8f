"""Parts that the scripts in ray_jobs/ share: their parsers, exit codes and cluster connection."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from linearsr.cli.flags import JobHelpFormatter, add_fields
from linearsr.cli.report import exit_code
from linearsr.errors import LinearSRError, OptionError, require

if TYPE_CHECKING:
    from linearsr.distributed.train.config import ClusterConfig
    from linearsr.training.recipes import Recipe

__all__ = ["add_fields", "configs", "connect", "described", "parser", "run", "validated"]


def described(docstring: str | None) -> argparse.ArgumentParser:
    """A parser whose --help begins with the script's docstring."""
    return argparse.ArgumentParser(description=docstring, formatter_class=JobHelpFormatter)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The parser of both training jobs: the recipe, and every field of a ClusterConfig.

    Raises MissingExtra without the packages that training needs.
    """
    require("train", "ray", "deepspeed")
    from linearsr.distributed.train.config import ClusterConfig
    from linearsr.training.recipes import RECIPES

    parser = described(description)
    parser.add_argument(
        "--recipe", choices=RECIPES, default="tiny_cpu", help="recipe: model, data and schedule"
    )
    add_fields(parser, ClusterConfig)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change a field of the recipe, such as pretrain.steps=1000; may be repeated "
        "(docs/reference/recipe.md)",
    )
    return parser


def configs(options: argparse.Namespace) -> tuple[Recipe, ClusterConfig]:
    """The recipe and the cluster config of these flags. Raises OptionError naming the field."""
    from linearsr.distributed.train.config import ClusterConfig
    from linearsr.training.recipes import RECIPES, override

    recipe = override(RECIPES[options.recipe](), options.set)
    fields = {name: getattr(options, name) for name in ClusterConfig.model_fields}
    return recipe, validated(ClusterConfig, fields)


def validated(kind: type[ClusterConfig], fields: dict[str, object]) -> ClusterConfig:
    """A ClusterConfig from untyped fields. Raises OptionError naming the flag."""
    from pydantic import ValidationError

    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        flag = str(first["loc"][0]).replace("_", "-")
        raise OptionError(f"--{flag}: {first['msg']} (got {first['input']!r})") from error


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run the job's `main` and end the process with its exit code; errors take one line each."""
    sys.exit(exit_code(main, "start it again to continue"))


def connect(*, data: bool = True) -> str:
    """Connect to the cluster that RAY_ADDRESS names (`ray job submit` sets it), or start one here.

    data: whether the job uses Ray Data. Returns the dashboard's address, http://HOST:PORT.
    Raises MissingExtra without Ray, LinearSRError if the cluster cannot be reached.
    """
    require("data", "ray")
    import ray

    # A report waits for the controller's next poll; the default of 2 s would slow training down.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # A GPU node takes minutes to start. This is no deadline: Train then asks for workers again.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "900")
    try:
        context = ray.init(log_to_driver=True, logging_level="WARNING")
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        # No cluster at that address, another version of Ray, or no token for it.
        raise LinearSRError(
            f"cannot connect to a Ray cluster: {error} (check RAY_ADDRESS)"
        ) from error
    if data:
        from linearsr.distributed.compat import keep_data_actors_here

        keep_data_actors_here()
    return f"http://{context.dashboard_url}"
