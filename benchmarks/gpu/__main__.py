"""Prove, measure and train on a GPU, in the minutes that there are.

    python -m benchmarks.gpu --minutes 15 --out RESULTS
    python -m benchmarks.gpu --minutes 15 --out RESULTS --photos PHOTOS --start RUN   # and train

Stages run in order of worth, each in a process and with a time limit of its own:

    machine   name, driver, clocks, bandwidth of copies, rate of bfloat16 products
    kernels   all tests of the kernels on the device, forward and backward
    tuning    the gated convolution with other launch settings than those of the package
    forward   forwards of the 1.6B and 0.6B models: PyTorch, Triton, compiled, CUDA graph
    picture   whole pictures in 20, 4, 2 and 1 steps, with a DC-AE of the real size
    bundled   the bundled model: pictures a second, and its pixels against those of the CPU
    training  steps of training on one rank, and their memory against the counted one
    train     the bundled model is trained for the rest of the time (with --photos)

Each row is on disk as soon as it is measured (RESULTS/STAGE.jsonl), and RESULTS/README.md is
written after each stage, so a run that is cut off keeps what it had. Packages that are missing
(diffusers, deepspeed, pytest) are named, and their rows left out. Without a GPU the same stages run
on the CPU at toy sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.gpu.goals import goals
from benchmarks.gpu.stage import Settings, read_rows, record, table
from linearsr.pipeline.device import best_dtype
from linearsr.storage import atomic


class Stage(NamedTuple):
    """A stage of the run. seconds: in a run of 15 minutes; the last one takes all that is left."""

    name: str
    title: str
    seconds: float


STAGES = (
    Stage("machine", "The machine", 25),
    Stage("kernels", "Kernels on the device, against float64", 70),
    Stage("tuning", "Launch settings of the gated convolution", 20),
    Stage("forward", "One forward of the denoiser", 110),
    Stage("picture", "Whole pictures", 80),
    Stage("bundled", "The bundled model", 35),
    Stage("training", "Training on one rank", 45),
    Stage("train", "Training of the bundled model", 480),
)
STATE = "stages.json"
# Seconds that a process has to end by itself before it is killed.
GRACE = 5.0


class Outcome(NamedTuple):
    """How a stage ended. outcome: "done", or what happened instead."""

    name: str
    seconds: float
    outcome: str


def main() -> int:
    """Run all stages, or one in this process."""
    options = _parser().parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.stage:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        settings = Settings(
            device,
            best_dtype(device),
            toy=device.type == "cpu",
            seconds=options.seconds,
            out=options.out,
            photos=options.photos,
            start=options.start,
        )
        module = import_module(f"benchmarks.gpu.{options.stage}")
        record(options.out, options.stage, module.rows(settings))
        return 0
    outcomes = _run_all(options)
    print(f"written to {options.out}")
    return int(any(outcome.outcome != "done" for outcome in outcomes))


def _run_all(options: argparse.Namespace) -> list[Outcome]:
    began, outcomes = time.monotonic(), list[Outcome]()
    for number, stage in enumerate(STAGES):
        left = 60 * options.minutes - (time.monotonic() - began)
        share = stage.seconds / sum(later.seconds for later in STAGES[number:])
        last = stage is STAGES[-1]
        limit = left if last else min(left * share, max(stage.seconds, left * share / 2))
        if stage.name not in options.only:
            continue
        outcomes.append(_run(stage, limit, options))
        state = [outcome._asdict() for outcome in outcomes]
        atomic.write(options.out / STATE, json.dumps(state, indent=1).encode())
        atomic.write(options.out / "README.md", _page(options, outcomes).encode())
    return outcomes


def _run(stage: Stage, limit: float, options: argparse.Namespace) -> Outcome:
    """Run a stage in a process of its own, and end it with all that it started when time is up."""
    print(f"{stage.title}, at most {limit:.0f} s", flush=True)
    command = [sys.executable, "-m", "benchmarks.gpu", "--stage", stage.name]
    command += ["--seconds", f"{limit:.1f}", "--out", str(options.out)]
    if options.photos:
        command += ["--photos", *map(str, options.photos)]
    if options.start:
        command += ["--start", str(options.start)]
    began = time.monotonic()
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        # Triton reads it as it is imported, and other modules import Triton.
        environment["TRITON_INTERPRET"] = "1"
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        try:
            code = process.wait(max(limit, 1.0))
            outcome = "done" if code == 0 else f"failed with code {code}"
        except subprocess.TimeoutExpired:
            outcome = f"cut off after {limit:.0f} s"
        finally:
            _end(process)
    seconds = time.monotonic() - began
    print(f"{stage.title}: {outcome}, {seconds:.0f} s", flush=True)
    return Outcome(stage.name, round(seconds, 1), outcome)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process group of a stage: first by SIGTERM, then by SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _page(options: argparse.Namespace, outcomes: Sequence[Outcome]) -> str:
    """Return the page of the stages so far."""
    machine = read_rows(options.out, "machine")
    name = next((row["value"] for row in machine if row.get("what") == "name"), "this machine")
    parts = [
        f"# {name}",
        f"`python -m benchmarks.gpu --minutes {options.minutes:g}`; torch {torch.__version__}",
        goals(options.out),
    ]
    for outcome in outcomes:
        (title,) = (stage.title for stage in STAGES if stage.name == outcome.name)
        rows = read_rows(options.out, outcome.name)
        how = "" if outcome.outcome == "done" else f", {outcome.outcome}"
        parts += [f"## {title}", f"{outcome.seconds:g} s{how}."]
        parts += [table(rows)] if rows else []
    return "\n\n".join(parts) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    names = [stage.name for stage in STAGES]
    add("--minutes", type=float, default=15.0, help="time of all stages together (default: 15)")
    add("--out", type=Path, required=True, help="folder of the results")
    add("--only", nargs="+", choices=names, default=names, help="stages to run (default: all)")
    add("--photos", nargs="+", type=Path, default=[], help="folders of photographs to train on")
    add("--start", type=Path, help="folder of tools.train_bundled to go on from")
    add("--stage", choices=names, help=argparse.SUPPRESS)
    add("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
