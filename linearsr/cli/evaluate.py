"""`linearsr evaluate`: compare models and results with bicubic and the truth.

The evaluation job (ray_jobs/evaluate.py) shares its options.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from linearsr.cli.flags import Commands
from linearsr.cli.report import OK, SOME_FAILED, complain
from linearsr.config import Solver
from linearsr.errors import OptionError, printable, require

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from linearsr.evaluation.config import Score
    from linearsr.evaluation.judge import Judge
    from linearsr.evaluation.report import Report
    from linearsr.evaluation.run import Evaluation, Request

FIELDS = ("hr", "lr", "steps", "solvers", "metrics", "scale", "seed", "every", "rank", "examples")


def add(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "evaluate",
        help="measure models and results",
        description="Compare models and finished pictures with bicubic and the truth.",
        epilog="Metrics have pyiqa's names, but lpips uses SqueezeNet as its trunk. All except "
        "lpips, psnr and ssim need the extra quality, whose licence forbids commercial use. A "
        "metric whose weights are not available is listed as skipped.",
    )
    parser.set_defaults(run=_evaluate)
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of an evaluation, which the command and the Ray job share."""
    parser.add_argument(
        "folder", nargs="?", help="folder of finished pictures; short for --results NAME=FOLDER"
    )
    parser.add_argument("-o", "--output", required=True, help="folder for the report (required)")
    parser.add_argument(
        "--hr", help="folder of true pictures, or of Parquet shards with columns id, lr and hr"
    )
    parser.add_argument(
        "--lr",
        help="folder of LR pictures, or the degradation that makes them from HR "
        "(docs/guides/datasets.md): clean, mild, camera, web, seesr, real-esrgan, mixed or "
        "degraded (default: LR of the shards, or else clean)",
    )
    parser.add_argument(
        "--models",
        nargs="*",
        metavar="[NAME=]MODEL",
        help="bundled models, folders of weights, or checkpoints of other programs that spandrel "
        "loads: .safetensors, .pth, .pt, .ckpt (default: linearsr-tiny, or none with --results)",
    )
    parser.add_argument(
        "--steps", nargs="+", type=int, default=[1, 2], help="numbers of steps to try on each model"
    )
    parser.add_argument(
        "--solvers",
        nargs="+",
        choices=get_args(Solver),
        default=[],
        help="solvers to try on each model (default: the model's own)",
    )
    parser.add_argument(
        "--results",
        nargs="+",
        default=[],
        metavar="NAME=FOLDER",
        help="folders with results of other programs: pictures, or Parquet shards with a column id "
        "and a column hr or image",
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        help="metrics to measure, by pyiqa's names (default: those that are quick and need no "
        "download, which docs/guides/evaluation.md lists)",
    )
    parser.add_argument(
        "--device", default="auto", help="device that models run on: auto, cpu, cuda or mps"
    )
    parser.add_argument(
        "--scale", type=int, choices=(2, 3, 4), default=4, help="scale from LR to HR"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed for the models' noise")
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="evaluate only every N-th picture"
    )
    parser.add_argument(
        "--rank",
        metavar="METRIC",
        help="metric that orders the contact sheet (default: the first one)",
    )
    parser.add_argument(
        "--examples",
        type=int,
        default=3,
        help="number of best, and of worst, pictures on the contact sheet",
    )


def parse(arguments: argparse.Namespace) -> Request:
    """Return the request that the flags of `add_options` describe. Raises OptionError."""
    from linearsr.evaluation.run import Request

    results = dict(_named(text, "--results", "NAME=FOLDER") for text in arguments.results)
    if arguments.folder:
        results = {Path(arguments.folder).name or arguments.folder: arguments.folder, **results}
    models = arguments.models
    if models is None:
        models = [] if results else ["linearsr-tiny"]
    fields = {name: getattr(arguments, name) for name in FIELDS}
    return Request.parse(**fields, results=results, models=_models(models, results))


def _models(texts: Sequence[str], results: Mapping[str, str]) -> dict[str, str]:
    """Models by name. Raises OptionError unless all names of models and results differ."""
    models: dict[str, str] = {}
    for name, model in map(_model, texts):
        if name in models or name in results:
            raise OptionError(
                f"--models {name}: two models or results have this name; rename one, as NAME=MODEL"
            )
        models[name] = model
    return models


def _named(text: str, flag: str, expected: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if not name or not value:
        raise OptionError(f"{flag} {text}: give {expected}")
    return name, value


def _model(text: str) -> tuple[str, str]:
    from linearsr.evaluation.checkpoint import is_checkpoint

    if "=" in text:
        return _named(text, "--models", "NAME=MODEL")
    return (Path(text).stem if is_checkpoint(text) else text, text)


def print_report(report: Report, output: str) -> int:
    """Print the table and the failures; returns the exit code."""
    from linearsr.evaluation.report import table

    print(table(report))
    for name, reason in report.skipped.items():
        print(f"skipped: {name}: {reason}")
    for line in report.notes():
        print(printable(f"linearsr: {line}"), file=sys.stderr)
    for line in report.failures:
        complain(OSError(line), SOME_FAILED)
    print(f"{output}/report.md")
    return SOME_FAILED if report.failures else OK


def _evaluate(arguments: argparse.Namespace) -> int:
    # A missing package is reported before hours of work, not after.
    require("evaluation", "lpips", "pyarrow", "torchmetrics")
    request = parse(arguments)
    from linearsr.evaluation.judge import Judge, load_model
    from linearsr.evaluation.run import ModelViews, finish, plan
    from linearsr.evaluation.sources import list_pictures, read_source
    from linearsr.storage.location import check_writable, locate

    evaluation = plan(request, list_pictures)
    output = locate(arguments.output)
    check_writable(output)
    judge = Judge(
        evaluation.settings, read_source, lambda model: load_model(model, arguments.device)
    )
    report = finish(
        evaluation,
        _scores(evaluation, judge),
        lambda items: ModelViews(judge.describe(), [judge.example(item) for item in items]),
        lambda name, data: (output / name).write(data),
    )
    return print_report(report, arguments.output)


def _scores(evaluation: Evaluation, judge: Judge) -> list[Score]:
    from tqdm import tqdm

    bar = tqdm(evaluation.items, unit="picture", desc="evaluate", file=sys.stderr)
    return [score for item in bar for score in judge.scores(item)]
