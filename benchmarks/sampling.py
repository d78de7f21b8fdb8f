"""Measure each solver at each number of steps: metrics, and distance from the exact solution.

    python -m benchmarks.sampling --data Set5 BSD100 --every 8

All start from the same noise for a picture. "error" is the PSNR (whole RGB, not rounded) between a
result and that of a hundred Euler steps: the error of the solver alone, without that of the model.
The other columns are `linearsr evaluate`'s.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.image import psnr
from linearsr import Options, Upscaler
from linearsr.cli.flags import Parser
from linearsr.cli.report import exit_code
from linearsr.config import Solver
from linearsr.diffusion.experts import plan
from linearsr.diffusion.schedule import shifted
from linearsr.errors import InputError
from linearsr.evaluation.judge import DEGRADATIONS, seeded_lr, upscaled
from linearsr.imaging.files import Picture, read
from linearsr.imaging.listing import find_images
from linearsr.metrics.measure import has_reference, measure

METRICS = ("psnr", "ssim", "niqe", "piqe")
REFERENCE = 100
ASKED: dict[Solver, tuple[int, ...]] = {
    "euler": (1, 2, 3, 4, 10, 20),
    "dpm": (4, 6, 8, 10, 20),
    "adams": (2, 3, 4, 6, 8, 10),
}
Values = dict[str, dict[str, float]]


def main() -> None:
    """Measure, print a line of values per picture, and a table per folder."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders of HR")
    parser.add_argument(
        "--every", type=int, default=1, help="only every n-th picture, in folders of more than ten"
    )
    parser.add_argument("--model", default="linearsr-tiny")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    chosen = {folder: _chosen(folder, options.every) for folder in options.data}
    upscaler = Upscaler.load(options.model, options.device)
    print(f"{upscaler.experts[0].embed.weight.dtype} on {options.device}", flush=True)
    for folder, paths in chosen.items():
        measured = []
        for path in paths:
            measured.append(_measured(upscaler, path))
            print(json.dumps({path.name: measured[-1]}), flush=True)
        print(f"\n{folder.name}, {len(paths)} pictures\n{_table(measured)}\n", flush=True)


def _chosen(folder: Path, every: int) -> list[Path]:
    paths = find_images(folder)
    if not paths:
        raise InputError(f"{folder}: no pictures in it")
    return paths[::every] if len(paths) > 10 else paths


def _measured(upscaler: Upscaler, path: Path) -> Values:
    hr = read(path).pixels
    hr = hr[:, : hr.shape[1] // 4 * 4, : hr.shape[2] // 4 * 4]
    lr = seeded_lr(hr, path.name, 4, DEGRADATIONS["clean"])
    there = _reference(upscaler, lr)
    values: Values = defaultdict(dict)
    for name, picture in {"HR": hr, **dict(_results(upscaler, lr))}.items():
        for metric in METRICS:
            if name != "HR" or not has_reference(metric):
                values[name][metric] = measure(metric, picture[None], hr[None], 4)
        if name != "HR":
            values[name]["error"] = psnr(picture, there)
    return dict(values)


def _results(upscaler: Upscaler, lr: Tensor) -> Iterator[tuple[str, Tensor]]:
    for solver, counts in ASKED.items():
        for steps in counts:
            yield f"{solver} {steps}", upscaled(upscaler, lr, Options(steps=steps, solver=solver))


@torch.inference_mode()
def _reference(upscaler: Upscaler, lr: Tensor) -> Tensor:
    """Latents after more steps than a request may ask for."""
    job = upscaler.prepare(Picture(lr), Options())
    sampling = upscaler.config.sampling
    timesteps = tuple(shifted(REFERENCE, sampling.flow_shift))
    segments = tuple(plan(timesteps[:-1], sampling.boundaries))
    job = dataclasses.replace(job, timesteps=timesteps, segments=segments, solver="euler")
    for segment in segments:
        job = upscaler.denoise(job, segment)
    return upscaler.finish(job).pixels


def _table(measured: list[Values]) -> str:
    columns = (*METRICS, "error")
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in measured[0]:
        means = []
        for column in columns:
            known = [values[name][column] for values in measured if column in values[name]]
            means.append(f"{sum(known) / len(known):.3f}" if known else "")
        lines.append(f"| {name} | {' | '.join(means)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(exit_code(main, "what was measured is above"))
