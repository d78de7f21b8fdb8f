"""Measure how fast LinearSR is on this machine, beside the models that people would use instead.

    python -m benchmarks                            # this machine's best device, a few minutes
    python -m benchmarks --device cuda --models linearsr-1.6b linearsr-0.6b --sides 512 1024 2048
    python -m benchmarks --only gains --sides 1024  # what each optimisation gives

Models have random weights at their real configs; before anything is timed, every way to run them
must be as close to float64 as the plain one. Writes a page, its plots and the numbers into
benchmarks/results/MACHINE. Runs that would take longer than --limit seconds are marked as such.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import attention, forward, gains, gate, image
from benchmarks.contestants import Contestants
from benchmarks.gate import GateError
from benchmarks.machine import Machine
from benchmarks.tables import Row
from benchmarks.timing import Settings
from linearsr.cli.flags import Parser
from linearsr.config import MODELS
from linearsr.errors import OptionError
from linearsr.pipeline.device import best_dtype, pick_device

SECTIONS = {m.__name__.split(".")[-1]: m for m in (attention, forward, image, gains)}
RESULTS = Path(__file__).parent / "results"


def main() -> int:
    """Measure, print and write."""
    parser = _parser()
    options = parser.parse_args()
    try:
        device = pick_device(options.device)
    except OptionError as error:
        parser.error(str(error))
    if device.type not in ("cpu", "cuda"):
        parser.error(f"{device.type} cannot be timed; choose --device cpu or cuda")
    # Beyond this limit torch would run uncompiled code without saying so.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", module="torch")
    machine = Machine.here(device, best_dtype(device))
    settings = Settings(
        models=tuple(MODELS[name] for name in options.models or _models(device)),
        sides=tuple(options.sides),
        rounds=options.rounds,
        limit=options.limit,
        compiled_up_to=options.compiled_up_to,
        real_esrgan=options.real_esrgan,
    )
    folder = options.output / (options.name or machine.slug)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with torch.inference_mode():
            for config in settings.models:
                gate.check(Contestants(config, device, machine.dtype), compiled=False)
            for name in options.only:
                text, rows = SECTIONS[name].run(machine, settings, folder)
                print(text, flush=True)
                _write(folder, machine, name, text, rows)
    except GateError as error:
        print(f"refusing to time it: {error}", file=sys.stderr)
        return 1
    print(f"written to {folder}")
    return 0


def _write(folder: Path, machine: Machine, name: str, text: str, rows: Sequence[Row]) -> None:
    """Write one section; sections of earlier runs stay until they are measured again."""
    described = machine.describe()
    how = [f"- {key}: {value}" for key, value in described.items()]
    command = " ".join(["python -m benchmarks", *sys.argv[1:]])
    section = "\n".join([text, "", *how, f"- command: `{command}`", ""])
    (folder / f"{name}.md").write_text(section)
    numbers = {"machine": described, "rows": [row._asdict() for row in rows]}
    (folder / f"{name}.json").write_text(json.dumps(numbers, indent=1) + "\n")
    pages = [folder / f"{section}.md" for section in SECTIONS]
    whole = [f"# {machine.name}\n", *(page.read_text() for page in pages if page.exists())]
    (folder / "README.md").write_text("\n".join(whole))


def _models(device: torch.device) -> Sequence[str]:
    """Names of the models to time by default: the large ones only on GPUs."""
    return list(MODELS) if device.type == "cuda" else ["linearsr-tiny"]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="number of CPU threads; all by default")
    parser.add_argument("--models", nargs="+", choices=MODELS)
    sides = [512, 1024, 2048, 4096, 8192]
    parser.add_argument(
        "--sides", nargs="+", type=int, default=sides, help="sides of the outputs in pixels"
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--limit", type=float, default=60.0, help="longest time of a call in seconds"
    )
    parser.add_argument(
        "--compiled-up-to",
        type=int,
        default=1024,
        help="largest side to time compiled; each size is compiled separately",
    )
    parser.add_argument(
        "--real-esrgan", type=Path, help="weights of Real-ESRGAN; random ones by default"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--name", help="name of the folder; the machine's name by default")
    return parser


if __name__ == "__main__":
    sys.exit(main())
