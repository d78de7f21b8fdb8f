"""Errors a user can act on. Each message names the thing that is wrong and what to do about it."""


class LinearSRError(Exception):
    """Base of every error this package raises on purpose; the CLI prints it as one line."""


class InputError(LinearSRError):
    """A picture that cannot be read or used: truncated, not an image, too large, zero-sized."""


class OutputError(LinearSRError):
    """A result that cannot be written: no permission, disk full, unsupported format."""


class OptionError(LinearSRError, ValueError):
    """An option or argument outside its documented range."""


class WeightsError(LinearSRError):
    """Weights that are missing, of a wrong shape, non-finite, or not ours."""


def one_line(error: Exception) -> str:
    """The message of a library's error on one line, short enough to end one of ours."""
    return " ".join(str(error).split())[:300]
