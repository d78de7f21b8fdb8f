"""Exit codes, and errors as one line on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable

from linearsr.errors import LinearSRError, OptionError, WeightsError, printable

OK, SOME_FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def complain(error: Exception, code: int) -> int:
    """Print the error on one line; returns `code`."""
    print(f"linearsr: {printable(' '.join(str(error).split()))}", file=sys.stderr)
    return code


def exit_code(run: Callable[[], int | None], interrupted: str) -> int:
    """Call `run` and return its exit code (None is 0); for an error, print it and return its code.

    interrupted: printed after Ctrl-C; says what is kept or how to continue.
    """
    try:
        return run() or OK
    except (OptionError, WeightsError) as error:
        return complain(error, USAGE)
    except (LinearSRError, OSError) as error:
        return complain(error, SOME_FAILED)
    except KeyboardInterrupt:
        print(f"linearsr: interrupted; {interrupted}", file=sys.stderr)
        return INTERRUPTED
