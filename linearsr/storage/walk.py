"""Walk a local folder, links included, and note what a listing leaves out. Needs no pyarrow."""

from __future__ import annotations

import errno
import heapq
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from linearsr.errors import InputError, printable
from linearsr.storage import atomic

# The most names of one kind that a line shows.
NAMES_SHOWN: Final = 3


class Kind(NamedTuple):
    """A kind of files that a listing leaves out, in words for one and for several of them."""

    one: str
    many: str
    advice: str = ""
    named: bool = True
    """Whether the line shows the names of some of the files."""


DANGLING: Final = Kind("link that leads nowhere", "links that lead nowhere")
NO_FILE: Final = Kind("pipe, socket or device", "pipes, sockets or devices")
LOOP: Final = Kind("link that leads in a circle", "links that lead in circles")
DOUBLE: Final = Kind(
    "link to a folder that is listed already", "links to folders that are listed already"
)


@dataclass
class Notes:
    """The files that a listing leaves out, by kind, and the reason for each name that failed."""

    left_out: dict[Kind, list[str]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def leave_out(self, kind: Kind, name: str) -> None:
        """Note a file that is left out on purpose."""
        self.left_out.setdefault(kind, []).append(name)

    def fail(self, name: str, reason: str) -> None:
        """Note why a name failed. It becomes text, as lists of failures hold nothing else."""
        self.failures[printable(name)] = reason

    def add(self, other: Notes, folder: str) -> None:
        """Add the notes of a folder's listing; names are below `folder` then."""
        for kind, names in other.left_out.items():
            self.left_out.setdefault(kind, []).extend(f"{folder}/{name}" for name in names)
        failures = other.failures.items()
        self.failures.update({f"{folder}/{name}": reason for name, reason in failures})

    def lines(self) -> list[str]:
        """Return one line for each kind of files that is left out."""
        return [_line(kind, names) for kind, names in self.left_out.items()]

    def check(self, folder: str) -> None:
        """Raise InputError for the first failure, where `folder` must be listed as a whole."""
        for name, reason in self.failures.items():
            raise InputError(f"{folder}/{printable(name)}: {reason}; check the folder")

    def tell_left_out(self) -> None:
        """Print what is left out."""
        for line in self.lines():
            print(f"linearsr: {line}", file=sys.stderr)

    def tell(self, folder: str) -> int:
        """Print what is left out and what failed below `folder`; return the number of failures."""
        self.tell_left_out()
        prefix = f"{folder.rstrip('/')}/"
        for name, reason in self.failures.items():
            print(f"linearsr: {printable(prefix + name)}: {reason}", file=sys.stderr)
        return len(self.failures)


def _line(kind: Kind, names: list[str]) -> str:
    words = f"left out: {len(names)} {kind.one if len(names) == 1 else kind.many}"
    if kind.named:
        more = ", ..." if len(names) > NAMES_SHOWN else ""
        words += f" ({', '.join(map(printable, sorted(names)[:NAMES_SHOWN]))}{more})"
    return f"{words}: {kind.advice}" if kind.advice else words


def walk(folder: str, notes: Notes) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield the path below `folder` of each regular file, in no order, and its entry.

    Links are followed. Each real folder is walked once: a link to a folder that is in the tree
    already, or to one that the link lies in, goes to `notes`, as do a link that leads nowhere and a
    pipe or device, which is never opened. A subfolder that cannot be listed becomes a failure.
    Unfinished files of a killed process are left out.

    Raises OSError if `folder` itself cannot be listed.
    """
    tree = _Tree(folder, notes)
    folders, links = [""], list[str]()
    while folders or links:
        # All real folders come before the first link, so that a link never takes their place.
        below = folders.pop() if folders else heapq.heappop(links)
        for entry in tree.entries(below):
            name = f"{below}/{entry.name}" if below else entry.name
            if entry.is_symlink() and not tree.leads_somewhere(entry.path, name):
                continue
            if entry.is_dir():
                heapq.heappush(links, name) if entry.is_symlink() else folders.append(name)
            elif not entry.is_file():
                notes.leave_out(NO_FILE, name)
            elif not atomic.is_temporary(entry.name):
                yield name, entry


class _Tree:
    """A folder that is being walked: the real folders that were listed, and the notes."""

    def __init__(self, folder: str, notes: Notes) -> None:
        self.folder, self.notes = folder, notes
        self.root = _with_slash(os.path.realpath(folder))
        self.listed: set[tuple[int, int]] = set()

    def entries(self, below: str) -> list[os.DirEntry[str]]:
        """Return the entries of a folder, or none if it is left out or has failed."""
        path = os.path.join(self.folder, below) if below else self.folder
        try:
            if self._is_new(path, below):
                with os.scandir(path) as entries:
                    return list(entries)
        except OSError as error:
            if not below:
                raise
            self._fail(below, error)
        return []

    def _is_new(self, path: str, below: str) -> bool:
        status = os.stat(path)
        identity = (status.st_dev, status.st_ino)
        is_link = bool(below) and os.path.islink(path)
        if is_link and self._is_around(path):
            self.notes.leave_out(LOOP, below)
            return False
        if is_link and identity in self.listed:
            self.notes.leave_out(DOUBLE, below)
        is_new = identity not in self.listed
        self.listed.add(identity)
        return is_new

    def _is_around(self, link: str) -> bool:
        """Return whether the whole tree or the link itself lies in the folder it leads to."""
        target = _with_slash(os.path.realpath(link))
        place = _with_slash(os.path.realpath(os.path.dirname(link)))
        return self.root.startswith(target) or place.startswith(target)

    def leads_somewhere(self, link: str, name: str) -> bool:
        """Return whether a link leads to a file or folder, and note it if it does not."""
        try:
            os.stat(link)
        except (FileNotFoundError, NotADirectoryError):
            self.notes.leave_out(DANGLING, name)
        except OSError as error:
            if error.errno == errno.ELOOP:
                self.notes.leave_out(LOOP, name)
            else:
                self._fail(name, error)
        else:
            return True
        return False

    def _fail(self, name: str, error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # it may have been deleted meanwhile
            self.notes.fail(name, f"cannot be listed ({error.strerror or error})")


def _with_slash(path: str) -> str:
    return f"{path.rstrip('/')}/"
