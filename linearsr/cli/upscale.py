"""`linearsr upscale`: files or folders in, files out. The dataset job shares its options."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from linearsr.cli.flags import HelpFormatter, add_fields
from linearsr.cli.inputs import pair_files
from linearsr.cli.report import OK, SOME_FAILED, complain
from linearsr.config import FileOptions, Options
from linearsr.errors import (
    LinearSRError,
    OptionError,
    OutputError,
    WeightsError,
    printable,
    reason,
)

if TYPE_CHECKING:
    from linearsr.imaging.files import Picture
    from linearsr.pipeline.upscaler import Upscaler


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "upscale",
        help="upscale picture files",
        description="Upscale picture files.",
        formatter_class=HelpFormatter,
        epilog="--detail trades fidelity for sharpness: 0 is closest to the truth and softest (as "
        "--steps 1), 1 is sharpest and keeps all the detail that the further steps add.",
    )
    parser.set_defaults(run=_run)
    parser.add_argument(
        "inputs", nargs="+", type=Path, metavar="INPUT", help="picture files, or folders of them"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        help="file to write the result to, or folder for the results of several inputs (required)",
    )
    parser.add_argument(
        "--skip-existing", action="store_true", help="skip inputs whose result exists already"
    )
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the model, the pictures and their files; the dataset job has them too."""
    parser.add_argument(
        "--model", default="linearsr-tiny", help="name of a bundled model, or a folder of weights"
    )
    parser.add_argument(
        "--device", default="auto", help="device that the model runs on: auto, cpu, cuda or mps"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the model with torch.compile, once per picture size; only on CUDA, and only "
        "worthwhile for many pictures of one size",
    )
    add_fields(parser, Options)
    add_fields(parser, FileOptions)


def parse(arguments: argparse.Namespace) -> tuple[Options, FileOptions]:
    """Return the options that the flags of `add_options` describe. Raises OptionError."""
    fields = vars(arguments)
    return (
        Options.parse(**{name: fields[name] for name in Options.model_fields}),
        FileOptions.parse(**{name: fields[name] for name in FileOptions.model_fields}),
    )


def _run(arguments: argparse.Namespace) -> int:
    options, files = parse(arguments)
    pairs, failed = pair_files(
        arguments.inputs,
        arguments.output,
        files.format,
        skip_existing=arguments.skip_existing,
    )
    if not pairs:
        return SOME_FAILED if failed else OK
    from linearsr.pipeline.upscaler import Upscaler

    upscaler = Upscaler.load(arguments.model, arguments.device, compiled=arguments.compile)
    for number, (source, target) in enumerate(pairs, 1):
        line = _Line(f"[{number}/{len(pairs)}] {source.name}")
        try:
            _upscale_file(upscaler, options, files, source, target, line)
        except (OptionError, WeightsError):
            raise  # the next picture would fail as well
        except Exception as error:  # one bad picture must not end the run
            failed += 1
            path = target if isinstance(error, OutputError) else source
            message = reason(error)
            named = message if str(path) in message else f"{path}: {message}"
            complain(LinearSRError(named), SOME_FAILED)
    if failed and len(pairs) > 1:
        written = "; the others are written" if failed < len(pairs) else ""
        print(f"linearsr: {failed} failed{written}", file=sys.stderr)
    return SOME_FAILED if failed else OK


def _upscale_file(
    upscaler: Upscaler,
    options: Options,
    files: FileOptions,
    source: Path,
    target: Path,
    line: _Line,
) -> None:
    """Upscale one file, and print a line with its size, time and any resampling."""
    from linearsr.imaging.files import WRITE_SUFFIXES, write_encoded
    from linearsr.pipeline.codec import upscale_encoded

    began = time.perf_counter()
    note = ""

    def on_stage(stage: str, picture: Picture) -> None:
        nonlocal note
        if stage == "upscale":
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputError(
                    f"the folder {target.parent} cannot be created ({error.strerror}); choose "
                    "another"
                ) from error
            note = _resampling(upscaler, picture, options)

    result = upscale_encoded(
        upscaler,
        source,
        options,
        files,
        format=WRITE_SUFFIXES[target.suffix.lower()],
        progress=line.show,
        on_stage=on_stage,
    )
    write_encoded(target, result.data)
    seconds = time.perf_counter() - began
    line.end(f"{target}  {result.width}x{result.height}  {seconds:.1f} s{note}")
    for remark in result.notes:
        print(f"linearsr: {source}: {remark}", file=sys.stderr)


def _resampling(upscaler: Upscaler, picture: Picture, options: Options) -> str:
    """A note if the model was not trained for the requested scale."""
    from linearsr.pipeline.sizes import requested_scale

    height, width = picture.pixels.shape[-2:]
    requested = requested_scale(height, width, options)
    scale = upscaler.network_scale(picture, options)
    if requested == scale:
        return ""
    return f"  computed at x{scale:g}, then {'enlarged' if requested > scale else 'shrunk'}"


class _Line:
    """One picture's line: on a terminal it shows which expert is working, at the end the result."""

    def __init__(self, label: str) -> None:
        self.label = printable(label)
        self.live = sys.stderr.isatty()

    def show(self, expert: str, done: int, steps: int) -> None:
        """Replace the line with the expert's progress."""
        if self.live:
            print(f"\r\x1b[K{self.label}  {expert} {done}/{steps}", end="", file=sys.stderr)

    def end(self, text: str) -> None:
        """Replace the line with the result."""
        if self.live:
            print("\r\x1b[K", end="", file=sys.stderr)
        print(f"{self.label} -> {printable(text)}")
