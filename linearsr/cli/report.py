"""Exit codes, and errors as one line on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable

from linearsr.errors import LinearSRError, OptionError, WeightsError

OK, SOME_FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def complain(error: Exception, code: int) -> int:
    """Print the error on one line; returns `code`."""
    print(f"linearsr: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def exit_code(run: Callable[[], int | None], interrupted: str) -> int:
    """What `run` returns (None is 0), or the code of the error it raises, which is told.

    `interrupted`: what to tell whoever pressed Ctrl-C.
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
