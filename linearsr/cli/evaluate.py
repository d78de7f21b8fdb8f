"""`linearsr evaluate`: models and results against bicubic and the truth.

Its options serve ray_jobs/evaluate.py as well.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from linearsr.cli.report import OK, SOME_FAILED, complain
from linearsr.config import Solver
from linearsr.errors import OptionError, OutputError, require
from linearsr.storage import atomic

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from linearsr.evaluation.config import Score
    from linearsr.evaluation.judge import Judge
    from linearsr.evaluation.report import Report
    from linearsr.evaluation.run import Plan, Request

FIELDS = ("hr", "lr", "steps", "solvers", "metrics", "scale", "seed", "every", "rank", "examples")


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "evaluate",
        help="measure models and results",
        epilog="Metrics go by pyiqa's names, but lpips has SqueezeNet as its trunk. Those whose "
        "weights cannot be had here are listed as skipped, and the rest go on.",
    )
    parser.set_defaults(run=_evaluate)
    add_options(parser)


def add_options(add: argparse.ArgumentParser) -> None:
    """What is evaluated, how, and where the report goes."""
    add.add_argument("folder", nargs="?", help="finished pictures to judge as --results does")
    add.add_argument("-o", "--output", required=True, help="folder of the report")
    add.add_argument("--hr", help="true pictures, or Parquet shards with columns id, lr and hr")
    add.add_argument(
        "--lr",
        help="how LR is made from HR (clean, mixed, degraded, mild, camera, seesr, real-esrgan; "
        "default clean), or a folder of it",
    )
    add.add_argument(
        "--models",
        nargs="*",
        metavar="[NAME=]MODEL",
        help="bundled models, folders of weights, or checkpoints of other programs that spandrel "
        "loads (.safetensors, .pth, .pt, .ckpt); default linearsr-tiny, none with results",
    )
    add.add_argument("--steps", nargs="+", type=int, default=[1, 2], help="of each model")
    add.add_argument(
        "--solvers",
        nargs="+",
        choices=get_args(Solver),
        default=[],
        help="by which each takes its steps; default: each model's own",
    )
    add.add_argument(
        "--results",
        nargs="+",
        default=[],
        metavar="NAME=FOLDER",
        help="of others: pictures, or shards with columns id and hr or image",
    )
    add.add_argument(
        "--metrics", nargs="+", help="default: all quick ones that need no download here"
    )
    add.add_argument("--device", default="auto", help="for models: auto, cpu, cuda, mps")
    add.add_argument("--scale", type=int, choices=(2, 3, 4), default=4, help="of HR to LR")
    add.add_argument("--seed", type=int, default=0, help="of the models' noise")
    add.add_argument("--every", type=int, default=1, help="only every n-th picture")
    add.add_argument("--rank", metavar="METRIC", help="of the contact sheet; default: the first")
    add.add_argument("--examples", type=int, default=3, help="best and worst pictures shown")


def parse(arguments: argparse.Namespace) -> Request:
    """What `add_options` added, checked. Raises OptionError."""
    from linearsr.evaluation.run import Request

    results = dict(_named(text, "--results") for text in arguments.results)
    if arguments.folder:
        results = {Path(arguments.folder).name or arguments.folder: arguments.folder, **results}
    models = arguments.models
    if models is None:
        models = [] if results else ["linearsr-tiny"]
    fields = {name: getattr(arguments, name) for name in FIELDS}
    return Request.parse(**fields, results=results, models=_models(models, results))


def _models(texts: Sequence[str], results: Mapping[str, str]) -> dict[str, str]:
    """Models by their names in tables, which differ from each other's and from those of results."""
    models: dict[str, str] = {}
    for name, model in map(_model, texts):
        if name in models or name in results:
            raise OptionError(f"--models {name}: two methods of this name; give one as NAME=MODEL")
        models[name] = model
    return models


def _named(text: str, flag: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if not name or not value:
        raise OptionError(f"{flag} {text}: should be NAME=FOLDER")
    return name, value


def _model(text: str) -> tuple[str, str]:
    from linearsr.evaluation.checkpoint import is_checkpoint

    if "=" in text:
        return _named(text, "--models")
    return (Path(text).stem if is_checkpoint(text) else text, text)


def tell(report: Report, output: str) -> int:
    """Print the table and what failed; returns the exit code."""
    from linearsr.evaluation.report import table

    print(table(report))
    for name, reason in report.skipped.items():
        print(f"skipped: {name}: {reason}")
    for line in report.failures:
        complain(OSError(line), SOME_FAILED)
    print(f"{output}/report.md")
    return SOME_FAILED if report.failures else OK


def _evaluate(arguments: argparse.Namespace) -> int:
    # Better before hours of work than after.
    require("quality", "pyiqa", "lpips", "pyarrow", "tqdm")
    request = parse(arguments)
    from linearsr.evaluation.judge import Judge, load_model
    from linearsr.evaluation.run import Seen, finish, plan
    from linearsr.evaluation.sources import list_pictures, read_source

    made = plan(request, list_pictures)
    output = _folder(arguments.output)
    judge = Judge(made.settings, read_source, lambda model: load_model(model, arguments.device))
    report = finish(
        made,
        _scores(made, judge),
        lambda items: Seen(judge.describe(), [judge.example(item) for item in items]),
        lambda name, data: _write(output / name, data),
    )
    return tell(report, arguments.output)


def _scores(made: Plan, judge: Judge) -> list[Score]:
    from tqdm import tqdm

    bar = tqdm(made.items, unit="picture", desc="evaluate", file=sys.stderr)
    return [score for item in bar for score in judge.scores(item)]


def _folder(output: str) -> Path:
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{output}: cannot be made ({error.strerror}); choose another") from error
    return Path(output)


def _write(path: Path, data: bytes) -> None:
    try:
        atomic.write(path, data)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from error
