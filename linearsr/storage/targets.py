"""Check before the work whether and where local results can be written. Needs no pyarrow."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from linearsr.errors import OptionError, OutputError

# The longest name of a file, in bytes, where the file system does not say.
NAME_BYTES: Final = 255


def is_same(path: str | Path, other: str | Path) -> bool:
    """Return whether two paths are one once their links are followed."""
    return os.path.realpath(path) == os.path.realpath(other)


def is_inside(path: str | Path, folder: str | Path) -> bool:
    """Return whether a path lies in a folder once their links are followed."""
    return os.path.realpath(path).startswith(os.path.join(os.path.realpath(folder), ""))


class TargetCheck:
    """Checks files before they are written. It creates nothing and tries each folder once."""

    def __init__(self) -> None:
        self._faults: dict[str, str] = {}
        self._longest: dict[str, int] = {}

    def folder(self, folder: str | Path) -> None:
        """Raise OutputError unless files can be written to a folder, which may not exist yet."""
        path = str(folder)
        if path not in self._faults:
            self._faults[path] = _fault(path)
        if self._faults[path]:
            raise OutputError(self._faults[path])

    def file(self, file: str | Path) -> None:
        """Raise OutputError for a file that cannot be written.

        The reason is its folder, a name that is too long, or a folder of the same name.
        """
        folder, name = os.path.split(file)
        try:
            self.folder(folder)
        except OutputError as error:
            raise OutputError(f"{file}: {error}") from error
        if folder not in self._longest:
            self._longest[folder] = _longest_name(folder)
        size = len(os.fsencode(name))
        if size > self._longest[folder]:
            raise OutputError(
                f"{file}: the name has {size} bytes, and the file system allows "
                f"{self._longest[folder]}; rename the picture"
            )
        if os.path.isdir(file):
            raise OutputError(f"{file}: a folder has this name; choose another output")


def check_collisions(
    targets: Iterable[tuple[object, str]],
    plain: Iterable[tuple[object, str]],
    ways: str,
    *,
    nested: bool = False,
) -> None:
    """Raise OptionError if two results have one name, or one has the name of another's folder.

    targets: each source with the path of its result; plain: the same without --format. ways: what
    else a user can do. nested: whether a file may have the name of a folder, as on S3.
    """
    if fault := _collision(targets, nested):
        way = "" if _collision(plain, nested) else "leave out --format, "
        raise OptionError(f"{fault}; {way}{ways}")


def _collision(targets: Iterable[tuple[object, str]], nested: bool) -> str:
    """Return what is wrong with the names of results; empty if nothing is."""
    sources: dict[str, object] = {}
    for source, target in targets:
        if target in sources:
            return f"{sources[target]} and {source} would both become {target}"
        sources[target] = source
    if nested:
        return ""
    folders: set[str] = set()
    for target, source in sources.items():
        folder = os.path.dirname(target)
        while folder and folder not in folders:
            if folder in sources:
                return (
                    f"{sources[folder]} would become {folder}, which is the folder of {target}, "
                    f"the result of {source}"
                )
            folders.add(folder)
            folder = os.path.dirname(folder)
    return ""


def _fault(folder: str) -> str:
    """Try the folder, or the nearest one around it that exists, with a file without a name."""
    existing = _nearest(folder)
    try:
        with tempfile.TemporaryFile(dir=existing):
            return ""
    except OSError as error:
        verb = "written to" if os.path.isdir(folder) else "created"
        return f"the folder {folder} cannot be {verb} ({error.strerror}); choose another"


def _longest_name(folder: str) -> int:
    try:
        return os.pathconf(_nearest(folder), "PC_NAME_MAX")
    except (OSError, ValueError):
        return NAME_BYTES


def _nearest(folder: str) -> str:
    while not os.path.lexists(folder) and os.path.dirname(folder) != folder:
        folder = os.path.dirname(folder)
    return folder or os.curdir
