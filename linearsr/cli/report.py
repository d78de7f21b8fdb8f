"""Exit codes, and lines that a progress bar does not garble: results, and errors as one line."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

from linearsr.errors import LinearSRError, OptionError, WeightsError, printable, visible

OK, SOME_FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def say(text: str, *, error: bool = False) -> None:
    """Print a line on stdout, or on stderr, above the progress bar if there is one."""
    text, stream = visible(text), sys.stderr if error else sys.stdout
    if "tqdm" in sys.modules:  # otherwise there is no bar
        from tqdm import tqdm

        tqdm.write(text, file=stream)
        stream.flush()
    else:
        print(text, file=stream, flush=True)


def complain(error: Exception, code: int) -> int:
    """Print the error on one line; returns `code`."""
    say(f"linearsr: {printable(' '.join(str(error).split()))}", error=True)
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
        # A second Ctrl-C would interrupt the end of Ray's cluster, and leave some of its processes.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        say(f"linearsr: interrupted; {interrupted}", error=True)
        return INTERRUPTED
