"""The `linearsr` command: words into calls, errors into one line each; decides nothing else.

Exit codes: 0 all done; 1 some inputs failed (each named, the rest written); 2 usage.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from linearsr import __version__
from linearsr.errors import InputError, LinearSRError, OptionError, OutputError, WeightsError

if TYPE_CHECKING:
    from linearsr.config import Options
    from linearsr.upscaler import Upscaler

OK, SOME_FAILED, USAGE = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names need not be valid text
            stream.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (OptionError, WeightsError) as error:
        return _complain(error, USAGE)
    except LinearSRError as error:
        return _complain(error, SOME_FAILED)
    except KeyboardInterrupt:
        print("linearsr: interrupted; finished files are kept", file=sys.stderr)
        return 130
    except OSError as error:
        return _complain(error, SOME_FAILED)


def _complain(error: Exception, code: int) -> int:
    print(f"linearsr: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="linearsr", description=__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"linearsr {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_upscale(commands)
    models = commands.add_parser("models", help="list models: parameters, experts, steps, licence")
    models.set_defaults(run=_models)
    return parser


def _add_upscale(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    add = commands.add_parser(
        "upscale",
        help="upscale pictures",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="--steps is the knob between fidelity and perception: 1 is closest to the truth and "
        "softest, more steps are sharper but invent texture.",
    )
    add.set_defaults(run=_upscale)
    add.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="files or folders")
    add.add_argument("-o", "--output", type=Path, required=True, help="a file or a folder")
    add.add_argument("--scale", type=int, choices=(2, 3, 4), default=4)
    add.add_argument("--width", type=int, help="final width in pixels instead of --scale")
    add.add_argument("--height", type=int, help="final height in pixels instead of --scale")
    add.add_argument("--model", default="linearsr-tiny", help="a bundled model's name or a folder")
    add.add_argument("--steps", type=int, help="1 (fidelity) to 50; default: the model's own")
    add.add_argument("--seed", type=int, default=0, help="same seed, same pixels")
    add.add_argument("--tags", default="", help='objects in the picture: "cat, grass"')
    add.add_argument(
        "--tile", type=_tile, default="auto", help="auto, off, or input pixels (16 or more)"
    )
    add.add_argument("--colour-fix", choices=("wavelet", "adain", "none"), default="wavelet")
    add.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    add.add_argument("--format", choices=("png", "jpg", "webp", "tif"), help="for folder outputs")
    add.add_argument("--quality", type=int, default=95, help="of JPEG and WebP, 1 to 100")
    add.add_argument("--max-pixels", type=int, default=100_000_000, help="largest input accepted")
    add.add_argument("--skip-existing", action="store_true", help="leave finished outputs alone")


def _tile(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _upscale(arguments: argparse.Namespace) -> int:
    from linearsr.config import Options

    options = Options.parse(
        tags=tuple(tag.strip() for tag in arguments.tags.split(",") if tag.strip()),
        **{name: getattr(arguments, name) for name in _SAME_NAME},
    )
    if not 1 <= arguments.quality <= 100:
        raise OptionError(f"quality must be 1 to 100, not {arguments.quality}")
    if arguments.max_pixels < 1:
        raise OptionError(f"max-pixels must be at least 1, not {arguments.max_pixels}")
    pairs, failed = _pairs(arguments.inputs, arguments.output, arguments.format)
    from linearsr.upscaler import Upscaler

    upscaler = Upscaler.load(arguments.model, arguments.device) if pairs else None
    for number, (source, target) in enumerate(pairs, 1):
        if arguments.skip_existing and os.path.exists(target):
            continue
        try:
            assert upscaler is not None
            _one(upscaler, options, arguments, source, target, f"[{number}/{len(pairs)}]")
        except OptionError:
            raise  # what is wrong with one picture's options is wrong with all
        except (LinearSRError, MemoryError) as error:
            failed += 1
            _complain(_naming(source, error), SOME_FAILED)
    if failed and len(pairs) > 1:
        written = "; the rest are written" if failed < len(pairs) else ""
        print(f"linearsr: {failed} failed{written}", file=sys.stderr)
    return SOME_FAILED if failed else OK


def _naming(source: Path, error: Exception) -> Exception:
    """The error with its picture's name, where the message has none."""
    message = str(error) or "out of memory"
    return LinearSRError(message if str(source) in message else f"{source}: {message}")


_SAME_NAME = ("scale", "width", "height", "steps", "seed", "tile", "colour_fix")


def _one(
    upscaler: Upscaler,
    options: Options,
    arguments: argparse.Namespace,
    source: Path,
    target: Path,
    counter: str,
) -> None:
    from linearsr.imaging.files import read, write

    began = time.perf_counter()
    picture = read(source, max_pixels=arguments.max_pixels)
    _make_folder(target.parent)
    bar = _Progress(f"{counter} {source.name}")
    result = upscaler.upscale(picture, options, bar)
    provenance = upscaler.describe(options)
    write(result, target, quality=arguments.quality, provenance=provenance)
    height, width = result.pixels.shape[-2:]
    bar.done(f"{target}  {width}x{height}  {time.perf_counter() - began:.1f} s")


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
    inputs: list[Path], output: Path, suffix: str | None
) -> tuple[list[tuple[Path, Path]], int]:
    """Each input picture with its result's file, and how many inputs could not be listed."""
    from linearsr.imaging.files import WRITE_SUFFIXES

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
            _complain(error, SOME_FAILED)
            continue
        for source, inside in found:
            target = output / _named(inside, suffix)
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


def _named(path: Path, suffix: str | None) -> Path:
    """The same name, with a suffix that can be written."""
    from linearsr.imaging.files import WRITE_SUFFIXES

    if suffix:
        return path.with_suffix(f".{suffix}")
    return path if path.suffix.lower() in WRITE_SUFFIXES else path.with_suffix(".png")


def _models(_: argparse.Namespace) -> int:
    from linearsr import weights

    for name in weights.available():
        bundle = weights.load(name)
        count = sum(p.numel() for p in bundle.experts[0].parameters())
        print(
            f"{name}: x{bundle.config.scale}, {len(bundle.experts)} experts of {count / 1e6:.2f} M "
            f"parameters, {bundle.config.sampling.steps} steps, "
            f"{bundle.provenance.get('licence', 'licence unknown')}"
        )
    return OK


if __name__ == "__main__":
    sys.exit(main())
