"""Functions that the jobs share: the cluster, and flags from configs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from linearsr.cli.flags import add_fields
from linearsr.config import Config, explain
from linearsr.errors import LinearSRError, OptionError, require

if TYPE_CHECKING:
    from linearsr.distributed.train.config import ClusterConfig
    from linearsr.training.recipes import Recipe

C = TypeVar("C", bound=Config)

TRAINING_PLACES = ("data", "validation", "storage")
TOKEN_ADVICE = "copy ~/.ray/auth_token from its head node to this machine, or set RAY_AUTH_TOKEN"


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of both training jobs, which choose a recipe and a cluster.

    Raises MissingExtra without the packages that training needs.
    """
    require("train", "ray", "deepspeed")
    from linearsr.distributed.train.config import ClusterConfig
    from linearsr.training.recipes import RECIPES

    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        default="tiny_cpu",
        help="preset of the model, its training pairs and the schedule (docs/reference/recipe.md)",
    )
    add_fields(parser, ClusterConfig, ClusterConfig.model_fields)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change a field of the recipe (docs/reference/recipe.md), as in pretrain.steps=1000",
    )


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
        place, message = explain(error)
        raise OptionError(f"--{place.split('.')[0].replace('_', '-')}: {message}") from error


def _join_or_start(**options: Any) -> Any:
    """Join the cluster of RAY_ADDRESS or of this machine, or start one; return Ray's context."""
    import ray

    from linearsr.distributed.compat import cluster_to_join
    from linearsr.distributed.local_cluster import start

    if cluster_to_join() is not None:
        return ray.init(**options)
    print("Starting Ray on this machine", file=sys.stderr, flush=True)
    return start(**options)


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
        context = _join_or_start(log_to_driver=True, logging_level="WARNING")
    except ray.exceptions.AuthenticationError as error:
        raise LinearSRError(
            f"the Ray cluster asks for its token: {TOKEN_ADVICE}, and set RAY_AUTH_MODE=token"
        ) from error
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        # No cluster, another version of Ray, or no token for it.
        raise LinearSRError(
            f"cannot connect to a Ray cluster: {error} (check RAY_ADDRESS)"
        ) from error
    if data:
        from linearsr.distributed.compat import keep_data_actors_here

        keep_data_actors_here()
    return f"http://{context.dashboard_url}"
