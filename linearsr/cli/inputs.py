"""From the inputs and the output of a command to pairs of files: a picture and its result."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from linearsr.cli.report import SOME_FAILED, complain
from linearsr.errors import InputError, OptionError, OutputError

if TYPE_CHECKING:
    from linearsr.storage.targets import TargetCheck


class Pair(NamedTuple):
    """A picture and the file of its result."""

    source: Path
    target: Path


def pair_files(
    inputs: list[Path], output: Path, format: str | None, *, skip_existing: bool
) -> tuple[list[Pair], int]:
    """Return each picture that is to be upscaled, and how many inputs cannot be.

    Failures and what is left out are printed. Raises OptionError for a request that makes no sense
    as a whole, and OutputError if the output cannot be written at all.
    """
    from linearsr.storage.targets import TargetCheck

    single = len(inputs) == 1 and not os.path.isdir(inputs[0])
    if single and not os.path.isdir(output) and output.suffix:
        pairs, failed = [_pair_with_file(inputs[0], output)], 0
    else:
        pairs, failed = _pair_with_folder(inputs, output, format, skip_existing)
    if skip_existing:
        pairs = [pair for pair in pairs if not os.path.exists(pair.target)]
    check = TargetCheck()
    if len(pairs) > 1:
        check.folder(output)
    writable = [pair for pair in pairs if _is_writable(pair.target, check)]
    return writable, failed + len(pairs) - len(writable)


def list_folder(folder: Path) -> tuple[list[Path], int]:
    """Return the pictures of a folder and the number of subfolders that cannot be listed.

    These subfolders and what is left out are printed. Raises InputError if `folder` itself cannot
    be listed, or has no picture.
    """
    from linearsr.imaging.listing import find_images
    from linearsr.storage.walk import Notes

    notes = Notes()
    pictures = find_images(folder, notes)
    failed = notes.tell(str(folder))
    if not pictures and not failed:
        raise InputError(f"{folder}: no picture in this folder")
    return pictures, failed


def _pair_with_file(source: Path, output: Path) -> Pair:
    from linearsr.imaging.files import WRITE_SUFFIXES

    if output.suffix.lower() not in WRITE_SUFFIXES:
        raise OptionError(f"{output}: the suffix must be one of {', '.join(WRITE_SUFFIXES)}")
    return _checked(Pair(source, output))


def _pair_with_folder(
    inputs: list[Path], output: Path, format: str | None, skip_existing: bool
) -> tuple[list[Pair], int]:
    from linearsr.imaging.files import WRITE_SUFFIXES, result_name
    from linearsr.storage.targets import check_collisions

    advice = "give a folder for the results of several inputs"
    if os.path.isfile(output):
        raise OptionError(f"{output} is a file; {advice}")
    if output.suffix.lower() in WRITE_SUFFIXES and not os.path.isdir(output):
        raise OptionError(f"{output} has the name of a picture; {advice}")
    listed, failed = _list_inputs(inputs, output)
    pairs = [Pair(source, output / result_name(name, format)) for source, name in listed]
    if skip_existing:
        pairs = _without_results(pairs)
    check_collisions(
        ((source, str(target)) for source, target in pairs),
        ((source, str(output / result_name(name, None))) for source, name in listed),
        "rename one, or upscale them into different folders",
    )
    return [_checked(pair) for pair in pairs], failed


def _list_inputs(inputs: list[Path], output: Path) -> tuple[list[tuple[Path, Path]], int]:
    """Return all pictures, each with its path below its input, and the number of failures."""
    listed: list[tuple[Path, Path]] = []
    failed = 0
    for path in inputs:
        if not os.path.isdir(path):
            listed.append((path, Path(path.name)))
            continue
        try:
            pictures, unlisted = list_folder(path)
            listed += _outside(pictures, path, output)
            failed += unlisted
        except InputError as error:
            failed += 1
            complain(error, SOME_FAILED)
    return listed, failed


def _outside(pictures: list[Path], folder: Path, output: Path) -> list[tuple[Path, Path]]:
    """Return the pictures with their paths below a folder, without the results in `output`."""
    from linearsr.storage.targets import is_inside, is_same

    if not is_same(output, folder):
        pictures = [picture for picture in pictures if not is_inside(picture, output)]
    return [(picture, picture.relative_to(folder)) for picture in pictures]


def _without_results(pairs: list[Pair]) -> list[Pair]:
    """Return the pairs without the sources that an earlier run has written as results."""
    from linearsr.imaging.files import read_provenance

    targets = {os.path.realpath(pair.target) for pair in pairs}
    return [
        pair
        for pair in pairs
        if os.path.realpath(pair.source) not in targets or read_provenance(pair.source) is None
    ]


def _checked(pair: Pair) -> Pair:
    from linearsr.storage.targets import is_same

    if is_same(pair.source, pair.target):
        raise OptionError(f"{pair.source} would be overwritten; choose another output")
    return pair


def _is_writable(target: Path, check: TargetCheck) -> bool:
    try:
        check.file(target)
    except OutputError as error:
        complain(error, SOME_FAILED)
        return False
    return True
