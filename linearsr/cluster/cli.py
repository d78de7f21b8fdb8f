"""What the training jobs' command lines share. A job is a thin script in ray_jobs/."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from linearsr.cluster.config import ClusterConfig
from linearsr.errors import LinearSRError, OptionError, WeightsError
from linearsr.training.recipes import RECIPES, Recipe, override

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
    """Flags of both training jobs."""
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
    return ClusterConfig.model_fields[flag.replace("-", "_")].default


def configs(options: argparse.Namespace) -> tuple[Recipe, ClusterConfig]:
    """What the flags say. Raises OptionError naming the field."""
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


def run(job: Callable[[], int | None]) -> int:
    """Connect to the cluster (or start one here), do the job; returns the exit code.

    The job's own (None is 0); 2 with one line for what is wrong with the request, 1 for the rest.

    On a cluster RAY_ADDRESS is set by `ray job submit`.
    """
    import ray

    # A report waits for the controller's next look; its default of 2 s would be felt.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    try:
        ray.init(log_to_driver=True, logging_level="WARNING")
        return job() or 0
    except ConnectionError as error:
        print(f"error: no cluster to be reached: {error}; see RAY_ADDRESS", file=sys.stderr)
        return 1
    except LinearSRError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, (OptionError, WeightsError)) else 1
    except KeyboardInterrupt:
        print("interrupted; start it again to go on", file=sys.stderr)
        return 130
