"""Exit codes, and errors as one line on stderr."""

from __future__ import annotations

import sys

OK, SOME_FAILED, USAGE = 0, 1, 2


def complain(error: Exception, code: int) -> int:
    """Print the error on one line; returns `code`."""
    print(f"linearsr: {' '.join(str(error).split())}", file=sys.stderr)
    return code
