"""Functions that the scripts in ray_jobs/ share: exit codes, the cluster, flags from configs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NoReturn, TypeVar

from linearsr.cli.flags import JobHelpFormatter, add_fields
from linearsr.cli.report import exit_code
from linearsr.config import Config
from linearsr.errors import LinearSRError, OptionError, require

if TYPE_CHECKING:
    from linearsr.distributed.train.config import ClusterConfig
    from linearsr.training.recipes import Recipe

C = TypeVar("C", bound=Config)


def new_parser(docstring: str | None) -> argparse.ArgumentParser:
    """Return a parser that shows a script's docstring."""
    return argparse.ArgumentParser(description=docstring, formatter_class=JobHelpFormatter)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the flags of both training jobs, which choose a recipe and a cluster.

    Raises MissingExtra without the packages that training needs.
    """
    require("train", "ray", "deepspeed")
    from linearsr.distributed.train.config import ClusterConfig
    from linearsr.training.recipes import RECIPES

    training = new_parser(description)
    training.add_argument(
        "--recipe",
        choices=RECIPES,
        default="tiny_cpu",
        help="preset of the model, its training pairs and the schedule (docs/reference/recipe.md)",
    )
    add_fields(training, ClusterConfig, ClusterConfig.model_fields)
    training.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change a field of the recipe (docs/reference/recipe.md), as in pretrain.steps=1000",
    )
    return training


def configs(options: argparse.Namespace) -> tuple[Recipe, ClusterConfig]:
    """Return the recipe and the cluster's config that the flags choose. Raises OptionError."""
    from linearsr.distributed.train.config import ClusterConfig
    from linearsr.training.recipes import RECIPES, override

    recipe = override(RECIPES[options.recipe](), options.set)
    fields = {name: getattr(options, name) for name in ClusterConfig.model_fields}
    return recipe, validated(ClusterConfig, fields)


def validated(config: type[C], fields: Mapping[str, object]) -> C:
    """Return a config made from the values of flags. Raises OptionError naming the flag."""
    from pydantic import ValidationError

    try:
        return config.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        flag = str(first["loc"][0]).replace("_", "-")
        raise OptionError(f"--{flag}: {first['msg']} (got {first['input']!r})") from error


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run the job's `main` and end the process with its exit code; an error is one line."""
    sys.exit(exit_code(main, "start it again to continue"))


def connect(*, data: bool = True) -> str:
    """Connect to the cluster of RAY_ADDRESS (`ray job submit` sets it), or start one here.

    Return the dashboard's address, http://HOST:PORT. data: whether the job uses Ray Data, as
    training does. Raises MissingExtra without Ray, LinearSRError if the cluster cannot be reached.
    """
    require("data", "ray")
    import ray

    # A report waits for the controller's next poll; the default of 2 s would slow training down.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # A GPU node takes minutes to start, and after this deadline Train asks for its workers again.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "900")
    try:
        context = ray.init(log_to_driver=True, logging_level="WARNING")
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        # No cluster, another version of Ray, or no token for it.
        raise LinearSRError(
            f"cannot connect to a Ray cluster: {error} (check RAY_ADDRESS)"
        ) from error
    if data:
        from linearsr.distributed.compat import keep_data_actors_here

        keep_data_actors_here()
    return f"http://{context.dashboard_url}"
