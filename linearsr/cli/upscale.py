"""`linearsr upscale`: files or folders in, files out. The dataset job shares its options."""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from linearsr.cli.flags import Commands, add_fields, read_fields
from linearsr.cli.inputs import Pair, pair_files
from linearsr.cli.report import OK, SOME_FAILED, complain, say
from linearsr.cli.tag import add_tagger_options, tagger_config
from linearsr.config import Acceleration, FileOptions, Options
from linearsr.errors import (
    LinearSRError,
    OptionError,
    OutputError,
    WeightsError,
    printable,
    reason,
)
from linearsr.tags.base import TaggerConfig

if TYPE_CHECKING:
    from linearsr.cli.progress import Display
    from linearsr.imaging.files import Picture
    from linearsr.pipeline.upscaler import Progress, Upscaler

# Longer names of files are cut in the progress bar.
NAME_SHOWN = 30


def add(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "upscale",
        help="upscale picture files",
        description="Upscale picture files.",
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
    add_fields(parser, Acceleration)
    add_fields(parser, Options)
    add_fields(parser, FileOptions)
    add_tagger_options(parser.add_argument_group("tagger", "the tagger of --tags auto"))


def parse(arguments: argparse.Namespace) -> tuple[Options, FileOptions]:
    """Return the options that the flags of `add_options` describe. Raises OptionError."""
    return read_fields(arguments, Options), read_fields(arguments, FileOptions)


def tagger(arguments: argparse.Namespace) -> TaggerConfig:
    """Return the tagger of --tags auto. Raises OptionError for a tagger that no tags come from."""
    config = tagger_config(arguments)
    if config != TaggerConfig() and arguments.tags != "auto":
        raise OptionError("a tagger is chosen, but used for --tags auto alone; add --tags auto")
    return config


def _run(arguments: argparse.Namespace) -> int:
    options, files = parse(arguments)
    chosen = tagger(arguments)
    from linearsr.cli.progress import Display

    with Display(f"loading {arguments.model}") as display:
        with display.cleared():
            pairs, failed = pair_files(
                arguments.inputs,
                arguments.output,
                files.format,
                skip_existing=arguments.skip_existing,
            )
        if not pairs:
            return SOME_FAILED if failed else OK
        from linearsr.pipeline.upscaler import Upscaler

        upscaler = Upscaler.load(
            arguments.model,
            arguments.device,
            acceleration=read_fields(arguments, Acceleration),
            tagger=chosen,
        )
        failed += _upscale_files(upscaler, options, files, pairs, display)
    if failed and len(pairs) > 1:
        written = "; the others are written" if failed < len(pairs) else ""
        say(f"linearsr: {failed} failed{written}", error=True)
    return SOME_FAILED if failed else OK


def _upscale_files(
    upscaler: Upscaler,
    options: Options,
    files: FileOptions,
    pairs: Sequence[Pair],
    display: Display,
) -> int:
    """Upscale files one after the other, and return how many failed."""
    failed = 0
    areas = _areas(pairs)
    for number, (source, target) in enumerate(pairs):
        line = _Line(display, source.name, number, areas)
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
    return failed


def _areas(pairs: Sequence[Pair]) -> list[int]:
    """Return the number of pixels of each picture, from headers; 1 if a header cannot be read."""
    import PIL.Image

    areas = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for source, _ in pairs:
            try:
                with PIL.Image.open(source) as image:
                    areas.append(max(1, image.width * image.height))
            except Exception:  # reading the picture says what is wrong with it
                areas.append(1)
    return areas


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
        else:
            line.encoding()

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
        say(f"linearsr: {source}: {remark}", error=True)


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
    """One picture's part of the progress, and its line with the result."""

    def __init__(self, display: Display, name: str, number: int, areas: Sequence[int]) -> None:
        """Begin picture `number` (from 0) of those with these numbers of pixels."""
        self.display = display
        self.name = printable(name)
        self.number, self.count = number, len(areas)
        self.before, self.area, self.total = sum(areas[:number]), areas[number], sum(areas)
        self.fraction = 0.0

    def show(self, progress: Progress) -> None:
        """Show which tile and which step the picture has come to."""
        self.fraction = progress.fraction
        self._show(
            "joining the tiles"
            if progress.fraction == 1
            else f"{progress.expert}, tile {progress.tile}/{progress.tiles}, "
            f"step {progress.step}/{progress.steps}"
        )

    def encoding(self) -> None:
        """Show that the result is being encoded and written."""
        self._show("writing the result")

    def _show(self, activity: str) -> None:
        name = self.name
        if len(name) > NAME_SHOWN:
            name = f"{name[: NAME_SHOWN - 1]}…"
        done = self.before + self.area * self.fraction
        pictures = f"{self.number} of {self.count} done, " if self.count > 1 else ""
        self.display.show(f"{pictures}{name}: {activity}", done / self.total)

    def end(self, text: str) -> None:
        """Print the line of the result."""
        say(f"[{self.number + 1}/{self.count}] {self.name} -> {printable(text)}")
