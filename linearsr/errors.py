"""Errors a user can act on. Each message names the thing that is wrong and what to do about it."""

from importlib.util import find_spec


class LinearSRError(Exception):
    """Base of every error this package raises on purpose; the CLI prints it as one line."""


class InputError(LinearSRError):
    """A picture that cannot be read or used: truncated, not an image, too large, zero-sized."""


class NoPicture(InputError):
    """Bytes of no format that is read here."""


class TooLarge(InputError):
    """More pixels or bytes than are allowed, or than there is memory for."""


class OutputError(LinearSRError):
    """A result that cannot be written: no permission, disk full, unsupported format."""


class MissingFile(InputError):
    """A file, or an object of a bucket, that is not there."""


class StorageError(InputError, OutputError):
    """Storage that cannot be used for a reason that is not in the file: the next fails as well.

    Both of what reading raises and of what writing does. A subclass names the reason.
    """


class Throttled(StorageError):
    """The storage asked to slow down, again and again."""


class Denied(StorageError):
    """No credentials, wrong ones, or no permission."""


class MissingBucket(StorageError):
    """There is no such bucket."""


class WrongRegion(StorageError):
    """The bucket is in another region than the one that was asked."""


class Unreachable(StorageError):
    """No answer from the storage, or none but errors of its own."""


class OptionError(LinearSRError, ValueError):
    """An option or argument outside its documented range."""


class MissingExtra(OptionError, ImportError):
    """What is asked for needs packages that this installation was made without."""


class WeightsError(LinearSRError):
    """Weights that are missing, of a wrong shape, non-finite, or not ours."""


def require(extra: str, *packages: str) -> None:
    """Raise MissingExtra, naming the extra that brings them, unless all `packages` are installed.

    To be called before they are imported. One that is installed but broken passes: what its import
    raises then says more than advice to install it could.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        told = f"{', '.join(missing)}: not installed here; pip install 'linearsr[{extra}]'"
        raise MissingExtra(told)


def one_line(error: Exception) -> str:
    """The message of a library's error on one line, short enough to end one of ours."""
    return " ".join(str(error).split())[:300]
