"""What the scripts in ray_jobs/ share: how they end, their cluster, and the flags of training."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal, NoReturn, get_args, get_origin

from linearsr.cli.report import exit_code
from linearsr.config import Config
from linearsr.errors import LinearSRError, OptionError, require

if TYPE_CHECKING:
    from linearsr.distributed.train.config import ClusterConfig
    from linearsr.training.recipes import Recipe


class _Help(argparse.RawDescriptionHelpFormatter):
    """The docstring as it is, and each flag's default."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return explained(action)


def explained(action: argparse.Action) -> str:
    """A flag's help with its default: the same in --help and in docs/reference."""
    told = action.help or ""
    none = action.default in (None, "", [], argparse.SUPPRESS) or action.default is False
    return told if none or "default" in told else f"{told}; default %(default)s"


def described(docstring: str | None) -> argparse.ArgumentParser:
    """A parser that tells a script's docstring."""
    return argparse.ArgumentParser(description=docstring, formatter_class=_Help)


def add_fields(made: argparse.ArgumentParser, config: type[Config], names: Iterable[str]) -> None:
    """A flag for each of these fields, as the config itself describes them and checks them."""
    for name in names:
        field = config.model_fields[name]
        flag, told = f"--{name.replace('_', '-')}", _fragment(field.description or "")
        if field.annotation is bool:
            made.add_argument(flag, action="store_true", help=told)
        elif field.is_required():
            made.add_argument(flag, required=True, help=told)
        else:
            words = get_args(field.annotation) if get_origin(field.annotation) is Literal else None
            made.add_argument(flag, default=field.default, choices=words, help=told)


def _fragment(sentence: str) -> str:
    """As --help has it: on one line, without a capital (but of "GPU") and a full stop."""
    told = " ".join(sentence.split()).rstrip(".")
    return told if told[1:2].isupper() else told[:1].lower() + told[1:]


def parser(description: str | None) -> argparse.ArgumentParser:
    """Flags of both training jobs: which recipe, and every field of a ClusterConfig.

    Raises MissingExtra without the packages that they need.
    """
    require("train", "ray", "deepspeed")
    from linearsr.distributed.train.config import ClusterConfig
    from linearsr.training.recipes import RECIPES

    made = described(description)
    made.add_argument("--recipe", choices=RECIPES, default="tiny_cpu", help="what is trained, how")
    add_fields(made, ClusterConfig, ClusterConfig.model_fields)
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="any field of the recipe (docs/reference/recipe.md), as pretrain.steps=1000",
    )
    return made


def configs(options: argparse.Namespace) -> tuple[Recipe, ClusterConfig]:
    """What the flags say. Raises OptionError naming the field."""
    from linearsr.distributed.train.config import ClusterConfig
    from linearsr.training.recipes import RECIPES, override

    recipe = override(RECIPES[options.recipe](), options.set)
    fields = {name: getattr(options, name) for name in ClusterConfig.model_fields}
    return recipe, validated(ClusterConfig, fields)


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


def connect(*, data: bool = True) -> str:
    """Connect to the cluster that RAY_ADDRESS names (`ray job submit` sets it), or start one here.

    data: the job uses Ray Data. Returns http://HOST:PORT of the cluster's dashboard.
    Raises MissingExtra without Ray, LinearSRError when there is no such cluster.
    """
    require("data", "ray")
    import ray

    # A report waits for the controller's next look; its default of 2 s would be felt.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # A GPU node takes minutes to come. No deadline: after it Train asks for its workers again.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "900")
    try:
        joined = ray.init(log_to_driver=True, logging_level="WARNING")
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        # Nothing is there, another version of Ray, or no token for it.
        raise LinearSRError(f"no cluster to be reached: {error}; see RAY_ADDRESS") from error
    if data:
        from linearsr.distributed.compat import keep_data_actors_here

        keep_data_actors_here()
    return f"http://{joined.dashboard_url}"
