"""`linearsr upscale`: files or folders in, files out; its options serve the batch job as well."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from linearsr.cli.report import OK, SOME_FAILED, complain
from linearsr.config import FileOptions, Options, Solver
from linearsr.errors import InputError, LinearSRError, OptionError, OutputError

if TYPE_CHECKING:
    from linearsr.imaging.files import Picture
    from linearsr.pipeline.upscaler import Upscaler


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "upscale",
        help="upscale pictures",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="--detail is the slider between fidelity and perception: 0 is closest to the truth "
        "and softest (as --steps 1), 1 keeps all the detail that the further steps add.",
    )
    parser.set_defaults(run=_upscale)
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="files or folders")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a file or a folder")
    parser.add_argument("--skip-existing", action="store_true", help="leave finished outputs alone")
    add_options(parser)


def add_options(add: argparse.ArgumentParser) -> None:
    """The options of a single picture, here and in ray_jobs/upscale_dataset.py."""
    add.add_argument(
        "--scale",
        type=float,
        default=4,
        help="how many times larger, 1 to 4; 1 repairs without enlarging",
    )
    add.add_argument("--width", type=int, help="final width in pixels instead of --scale")
    add.add_argument("--height", type=int, help="final height in pixels instead of --scale")
    add.add_argument("--model", default="linearsr-tiny", help="a bundled model's name or a folder")
    add.add_argument("--steps", type=int, help="1 (fidelity) to 50; default: the model's own")
    add.add_argument(
        "--detail",
        type=float,
        default=1.0,
        help="0 (fidelity, as --steps 1) to 1 (all that the further steps add)",
    )
    add.add_argument(
        "--solver",
        choices=get_args(Solver),
        help="dpm and adams come further in as many steps; default: the model's own",
    )
    add.add_argument("--seed", type=int, default=0, help="same seed, same pixels")
    add.add_argument("--tags", default="", help='objects in the picture: "cat, grass", or auto')
    add.add_argument(
        "--tile", type=_tile, default="auto", help="auto, off, or input pixels (16 or more)"
    )
    add.add_argument(
        "--colour-fix",
        choices=("wavelet", "adain", "none"),
        default="wavelet",
        help="how the result gets the colours of the input back",
    )
    add.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    add.add_argument(
        "--compile",
        action="store_true",
        help="on CUDA, for many pictures of one size: torch.compile, anew for each size",
    )
    add.add_argument("--format", choices=("png", "jpg", "webp", "tif"), help="for folder outputs")
    add.add_argument("--quality", type=int, default=95, help="of JPEG and WebP, 1 to 100")
    add.add_argument("--max-pixels", type=int, default=100_000_000, help="largest input accepted")


def _tile(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def parse(arguments: argparse.Namespace) -> tuple[Options, FileOptions]:
    """What `add_options` added, checked. Raises OptionError."""
    fields = vars(arguments)
    return (
        Options.parse(**{name: fields[name] for name in Options.model_fields}),
        FileOptions.parse(**{name: fields[name] for name in FileOptions.model_fields}),
    )


def _upscale(arguments: argparse.Namespace) -> int:
    options, files = parse(arguments)
    pairs, failed = _pairs(arguments.inputs, arguments.output, files)
    from linearsr.pipeline.upscaler import Upscaler

    chosen = arguments.model, arguments.device
    upscaler = Upscaler.load(*chosen, compiled=arguments.compile) if pairs else None
    for number, (source, target) in enumerate(pairs, 1):
        if arguments.skip_existing and os.path.exists(target):
            continue
        try:
            assert upscaler is not None
            _one(upscaler, options, files, source, target, f"[{number}/{len(pairs)}]")
        except OptionError:
            raise  # what is wrong with one picture's options is wrong with all
        except (LinearSRError, MemoryError) as error:
            failed += 1
            complain(_naming(source, error), SOME_FAILED)
    if failed and len(pairs) > 1:
        written = "; the rest are written" if failed < len(pairs) else ""
        print(f"linearsr: {failed} failed{written}", file=sys.stderr)
    return SOME_FAILED if failed else OK


def _naming(source: Path, error: Exception) -> Exception:
    """The error with its picture's name, where the message has none."""
    message = str(error) or "out of memory"
    return LinearSRError(message if str(source) in message else f"{source}: {message}")


def _one(
    upscaler: Upscaler,
    options: Options,
    files: FileOptions,
    source: Path,
    target: Path,
    counter: str,
) -> None:
    from linearsr.imaging.files import read, write

    began = time.perf_counter()
    picture = read(source, max_pixels=files.max_pixels)
    _make_folder(target.parent)
    bar = _Progress(f"{counter} {source.name}")
    options = upscaler.with_tags(picture, options)
    result = upscaler.upscale(picture, options, bar)
    provenance = upscaler.describe(options)
    write(result, target, quality=files.quality, provenance=provenance)
    height, width = result.pixels.shape[-2:]
    note = _resampled(upscaler, picture, options)
    bar.done(f"{target}  {width}x{height}  {time.perf_counter() - began:.1f} s{note}")


def _resampled(upscaler: Upscaler, picture: Picture, options: Options) -> str:
    """A note for a scale that the model was not trained for."""
    from linearsr.pipeline.upscaler import asked_scale

    height, width = picture.pixels.shape[-2:]
    asked = asked_scale(height, width, options)
    scale = upscaler.scale_of(picture, options)
    if asked == scale:
        return ""
    return f"  computed at x{scale:g}, then {'enlarged' if asked > scale else 'shrunk'}"


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made ({error.strerror}); choose another") from error


class _Progress:
    """One line that says which expert is at work; plain lines where stderr is no terminal."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.live = sys.stderr.isatty()

    def __call__(self, expert: str, done: int, steps: int) -> None:
        if self.live:
            print(f"\r\x1b[K{self.label}  {expert} {done}/{steps}", end="", file=sys.stderr)

    def done(self, text: str) -> None:
        if self.live:
            print("\r\x1b[K", end="", file=sys.stderr)
        print(f"{self.label} -> {text}")


def _pairs(
    inputs: list[Path], output: Path, files: FileOptions
) -> tuple[list[tuple[Path, Path]], int]:
    """Each input picture with its result's file, and how many inputs could not be listed."""
    from linearsr.imaging.files import WRITE_SUFFIXES, result_name

    single = len(inputs) == 1 and not os.path.isdir(inputs[0])
    if single and not os.path.isdir(output) and output.suffix:
        if output.suffix.lower() not in WRITE_SUFFIXES:
            raise OptionError(f"{output}: the suffix must be one of {', '.join(WRITE_SUFFIXES)}")
        return [_checked(inputs[0], output)], 0
    if os.path.isfile(output):
        raise OptionError(f"{output} is a file; several inputs need a folder to go to")
    taken: dict[Path, Path] = {}
    failed = 0
    for given in inputs:
        try:
            found = _sources(given, output)
        except InputError as error:
            failed += 1
            complain(error, SOME_FAILED)
            continue
        for source, inside in found:
            target = output / result_name(inside, files.format)
            if target in taken:
                raise OptionError(f"{taken[target]} and {source} would both become {target}")
            taken[target] = source
    return [_checked(source, target) for target, source in taken.items()], failed


def _sources(given: Path, output: Path) -> list[tuple[Path, Path]]:
    """Pictures of one input, each with its path inside it; earlier results are left out."""
    if not os.path.isdir(given):
        return [(given, Path(given.name))]
    from linearsr.imaging.files import find_images

    results = os.path.realpath(output)
    nested = results != os.path.realpath(given)
    found = [p for p in find_images(given) if not (nested and _is_below(p, results))]
    if not found:
        raise InputError(f"{given}: no picture in this folder")
    return [(path, path.relative_to(given)) for path in found]


def _is_below(path: Path, folder: str) -> bool:
    return os.path.realpath(path).startswith(folder + os.sep)


def _checked(source: Path, target: Path) -> tuple[Path, Path]:
    if os.path.realpath(source) == os.path.realpath(target):
        raise OptionError(f"{source} would be overwritten; choose another output")
    return source, target
