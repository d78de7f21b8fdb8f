"""Quality of models against bicubic on folders of HR pictures.

    python -m benchmarks.quality --data ../data/val/Set5 --models linearsr-tiny --steps 1 4

LR is made here, seeded by the file name: clean (bicubic, 8 bit), mixed (blur, noise and JPEG, each
on half of the pictures) or degraded (all three on every picture).
Prints a Markdown table with a row for HR itself, one for bicubic, and one per model and step count.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from linearsr.config import Options
from linearsr.imaging.degrade import CAMERA, CLEAN, MILD, Degradation, degrade
from linearsr.imaging.files import Picture, find_images, read
from linearsr.imaging.resample import resize
from linearsr.quality.metrics import conventions, measure
from linearsr.upscaler import Upscaler

# Every picture gets some of each: Gaussian blur, noise of 2 to 8 levels, JPEG 60 to 90.
_STAGE = CAMERA.stages[0].model_copy(
    update={
        "blur_sigma": (0.5, 2.0),
        "gaussian_probability": 1.0,
        "gaussian_sigma": (2.0, 8.0),
        "jpeg_quality": (60.0, 90.0),
    }
)
LR = {"clean": CLEAN, "mixed": MILD, "degraded": Degradation(stages=(_STAGE,))}
SCALE = 4


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of HR pictures")
    parser.add_argument("--models", nargs="+", default=["linearsr-tiny"])
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--lr", choices=LR, default="clean")
    parser.add_argument("--metrics", nargs="+", default=["psnr", "ssim", "niqe", "piqe"])
    parser.add_argument("--every", type=int, default=1, help="only every n-th picture")
    parser.add_argument("--json", type=Path, help="also write the means here")
    options = parser.parse_args()
    rows = _rows(options)
    _print(rows, options)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return 0


def _rows(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    upscalers = {name: Upscaler.load(name, "cpu") for name in options.models}
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    paths = find_images(options.data)[:: options.every]
    for number, path in enumerate(paths, 1):
        hr, lr = _pair(path, LR[options.lr])
        for row, picture in _results(hr, lr, upscalers, options.steps):
            for metric in options.metrics:
                sums[row][metric] += measure(metric, picture, hr, SCALE) / len(paths)
        print(f"{number}/{len(paths)} {path.name}", file=sys.stderr, flush=True)
    return {row: dict(values) for row, values in sums.items()}


def _pair(path: Path, config: Degradation) -> tuple[Tensor, Tensor]:
    hr = read(path).pixels
    hr = hr[:, : hr.shape[1] // SCALE * SCALE, : hr.shape[2] // SCALE * SCALE]
    rng = np.random.default_rng(zlib.crc32(path.name.encode()))
    return hr[None], degrade(hr, SCALE, config, rng)


def _results(
    hr: Tensor, lr: Tensor, upscalers: dict[str, Upscaler], steps: list[int]
) -> Iterator[tuple[str, Tensor]]:
    yield "HR", hr
    yield "bicubic", resize(lr[None], *hr.shape[-2:])
    for name, upscaler in upscalers.items():
        for count in dict.fromkeys(steps):
            yield f"{name}, {count} steps", _upscaled(upscaler, lr, count)


def _upscaled(upscaler: Upscaler, lr: Tensor, steps: int) -> Tensor:
    picture = Picture(lr, None, 8, False, None, None, "png")
    return upscaler.upscale(picture, Options(steps=steps)).pixels[None]


def _print(rows: dict[str, dict[str, float]], options: argparse.Namespace) -> None:
    print(f"\n{options.data.name}, x{SCALE}, {options.lr} LR ({conventions()})\n")
    cell: Callable[[object], str] = "{:>8}".format
    print("|", " | ".join([f"{'':24}", *map(cell, options.metrics)]), "|")
    print("|", " | ".join(["---"] * (len(options.metrics) + 1)), "|")
    for row, values in rows.items():
        numbers = [
            cell("" if row == "HR" and m == "psnr" else f"{v:.3f}") for m, v in values.items()
        ]
        print("|", " | ".join([f"{row:24}", *numbers]), "|")


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
