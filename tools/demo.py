"""`make demo`: upscale one photograph and draw input, bicubic and LinearSR side by side."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from linearsr.cli.flags import Parser
from linearsr.cli.progress import Display
from linearsr.config import Options
from linearsr.errors import LinearSRError, require
from linearsr.evaluation.drawing import Row, details, sheet
from linearsr.imaging.files import Picture, from_pil, read, to_pil, write
from linearsr.imaging.resample import resize
from linearsr.pipeline.upscaler import Upscaler

PANEL, CROP = 480, 192
LARGEST = 256 * 256


def main() -> int:
    """Write OUTPUT/input.png, OUTPUT/upscaled.png and OUTPUT/compare.png; return the exit code."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--input", type=Path, help="photograph to upscale (default: scikit-image's cat)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("demo"), help="folder to write to (default: demo)"
    )
    parser.add_argument(
        "--model",
        default="linearsr-tiny",
        help="name of a bundled model, or a folder of weights (default: linearsr-tiny)",
    )
    options = parser.parse_args()
    try:
        _demo(options.input, options.output, options.model)
    except (LinearSRError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


def _demo(source: Path | None, output: Path, model: str) -> None:
    picture = _fit(read(source)) if source else _cat()
    output.mkdir(parents=True, exist_ok=True)
    with Display(f"loading {model}") as display:
        upscaler = Upscaler.load(model)
        began = time.perf_counter()
        result = upscaler.upscale(
            picture, Options(), lambda done: display.show(f"{done.expert} expert", done.fraction)
        )
    seconds = time.perf_counter() - began
    write(picture, output / "input.png")
    write(result, output / "upscaled.png", provenance=upscaler.describe(Options()))
    write(from_pil(compare(picture, result)), output / "compare.png")
    size = "{1}x{0}".format(*result.pixels.shape[-2:])
    print(f"{output}/upscaled.png  {size} in {seconds:.1f} s\n{output}/compare.png")


def _fit(picture: Picture) -> Picture:
    """Shrink a picture to at most 256 x 256 pixels in all, so that a CPU needs only seconds."""
    height, width = picture.pixels.shape[-2:]
    shrink = (LARGEST / (height * width)) ** 0.5
    if shrink >= 1:
        return picture
    size = max(1, round(height * shrink)), max(1, round(width * shrink))
    print(
        f"  the demo first shrinks {width}x{height} to {size[1]}x{size[0]}; to upscale all of it:"
    )
    print("  .venv/bin/linearsr upscale PHOTO -o OUTPUT")
    pixels = resize(picture.pixels[None], *size)[0].clamp(0, 1)
    alpha = picture.alpha
    if alpha is not None:
        alpha = resize(alpha[None], *size)[0].clamp(0, 1)
    return dataclasses.replace(picture, pixels=pixels, alpha=alpha)


def _cat() -> Picture:
    """Return the photograph in the scikit-image wheel at half its size: it is a little soft."""
    require("demo", "skimage")
    import skimage.data

    photo = Image.fromarray(np.asarray(skimage.data.chelsea()))
    return from_pil(photo.resize((photo.width // 2, photo.height // 2), Image.Resampling.BICUBIC))


def compare(picture: Picture, result: Picture) -> Image.Image:
    """Draw input, bicubic and `result` in a row, and below it enlarged details of each."""
    size = result.pixels.shape[-2:]
    bicubic = resize(picture.pixels[None], *size)[0].clamp(0, 1)
    small = _rgb(picture)
    wide = (size[1], size[0])
    versions = {
        "input": small.resize(wide, Image.Resampling.NEAREST),
        "bicubic": _rgb(dataclasses.replace(picture, pixels=bicubic, alpha=None)),
        "LinearSR": _rgb(result),
    }
    panel_height = max(1, round(PANEL * size[0] / size[1]))
    labels = [f"{name}  {image.width}x{image.height}" for name, image in versions.items()]
    labels[0] = f"input  {small.width}x{small.height}"
    rows = [Row(labels, [_fitted(image, panel_height) for image in versions.values()])]
    for corner in details(result.pixels, CROP, 2):
        rows.append(Row([""] * 3, [_enlarged(image, *corner) for image in versions.values()]))
    return sheet(rows, PANEL)


def _fitted(image: Image.Image, height: int) -> Image.Image:
    return image.resize((PANEL, height), Image.Resampling.LANCZOS)


def _enlarged(image: Image.Image, top: int, left: int) -> Image.Image:
    box = (left, top, min(left + CROP, image.width), min(top + CROP, image.height))
    return image.crop(box).resize((PANEL, PANEL), Image.Resampling.NEAREST)


def _rgb(picture: Picture) -> Image.Image:
    # PIL would clip 16-bit grey to white; eight bits are enough for display.
    return to_pil(dataclasses.replace(picture, bits=8)).convert("RGB")


if __name__ == "__main__":
    sys.exit(main())
