"""Errors that a user can act on. Each message names what is wrong and says what to do about it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path


class LinearSRError(Exception):
    """The base of all errors raised on purpose; the CLI prints one as a single line."""


class InputError(LinearSRError):
    """A picture that cannot be read or used: truncated, not an image, too large, zero-sized."""


class NoPicture(InputError):
    """Bytes that are not in any supported picture format."""


class TooLarge(InputError):
    """A picture with more pixels or bytes than are allowed, or than fit into memory."""


class OutputError(LinearSRError):
    """A result that cannot be written: no permission, disk full, unsupported format."""


class MissingFile(InputError):
    """A file, or an object of a bucket, that does not exist."""


class StorageError(InputError, OutputError):
    """Storage that cannot be used at all, so that the next file would fail as well.

    It is both an InputError and an OutputError. Subclasses name the reason.
    """


class Throttled(StorageError):
    """The storage repeatedly asked for fewer requests."""


class Denied(StorageError):
    """Missing or wrong credentials, or missing permissions."""


class MissingBucket(StorageError):
    """A bucket that does not exist."""


class WrongRegion(StorageError):
    """A bucket in another region than the request was sent to."""


class Unreachable(StorageError):
    """Storage that does not answer, or only with errors of its own."""


class OptionError(LinearSRError, ValueError):
    """An option or argument outside its documented range."""


class MissingExtra(OptionError, ImportError):
    """A feature that needs packages which are not installed."""


class WeightsError(LinearSRError):
    """Weights that are missing, of a wrong shape, not finite, or not LinearSR's."""


def require(extra: str, *packages: str) -> None:
    """Raise MissingExtra, naming the extra to install, unless all `packages` are installed.

    Call this before importing them. An installed but broken package passes, because the error of
    its import says more than advice to install it could.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise MissingExtra(f"{', '.join(missing)}: not installed here; {_install(extra)}")


def _install(extra: str) -> str:
    """Return the command that adds an extra to this installation: a clone, or a wheel."""
    clone = Path(__file__).parents[1]
    if not (clone / "pyproject.toml").is_file():
        return f"pip install 'linearsr[{extra}]'"
    return f"pip install -e '{'.' if clone == Path.cwd() else clone}[{extra}]'"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" with the nearest known word, or "" if none is near."""
    from difflib import get_close_matches

    near = get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def reason(error: Exception) -> str:
    """Return an error's message on one line, with its class if it is none of ours."""
    if isinstance(error, MemoryError):
        return "out of memory"
    kind = "" if isinstance(error, LinearSRError) else f"{type(error).__name__}: "
    return kind + one_line(error)


def one_line(error: Exception | str) -> str:
    """Return a library's error, or its message, on one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]


def printable(text: str) -> str:
    r"""Return text in which the bytes of a file name that are not UTF-8 read like `\xe9`."""
    return re.sub("[\udc80-\udcff]", lambda byte: f"\\x{ord(byte[0]) - 0xDC00:02x}", text)


def visible(text: str) -> str:
    r"""Return text for a terminal, in which control characters read like `\x1b`.

    A file's name may hold some, and a terminal would obey them. Line breaks and tabs stay.
    """
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda c: f"\\x{ord(c[0]):02x}", text)


def is_text(name: str) -> bool:
    """Return whether a file name is UTF-8, so that it can be an id or a key."""
    return printable(name) == name
